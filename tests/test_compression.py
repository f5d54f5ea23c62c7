"""Compression between decoder layers: published outputs, and any batch against its rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fixtures_flash import PLAIN_FLASH
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llava_uhd.config.model import CompressionConfig
from llava_uhd.images.maps import Newline, whole_map
from llava_uhd.language.compressed import attention_of, decode_compressed
from llava_uhd.language.compression import build_map
from llava_uhd.language.compressors import COMPRESSORS, num_kept
from llava_uhd.language.runs import Run, place_runs
from llava_uhd.model.visual_runs import runs_of_maps

VISUAL, IMAGE = 576, -200
CASES = [
    *("a_all_text_batch", "a_avgpool1d_k0_s2", "a_avgpool1d_k1_s4", "a_avgpool1d_k2_s1"),
    *("a_avgpool1d_k2_s5", "a_avgpool1d_k2_s64", "a_avgpool1d_k2_s7", "a_avgpool1d_k2_s8"),
    *("a_avgpool1d_k3_s16", "a_avgpool1d_k5_s2", "a_avgpool1d_projector_out_s8", "a_image_first"),
    *("a_mixed_batch_row0", "a_mixed_batch_row1", "a_truncated_inside_image", "a_truncated_text"),
    *("a_two_images_k2_s8", "a_unequal_image_counts_row0", "a_unequal_image_counts_row1"),
    *("b_heavy_k2_s8", "b_k16_s2", "b_k2_s2", "b_laststage_k16_s4", "b_light_k16_s8"),
    "b_stage4_k0_s1",
]


class Batch(NamedTuple):
    """Embedded rows, padded at the right."""

    embeds: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    runs: torch.Tensor


class Published:
    """The two golden models, read once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with np.load(folder / "feature_pool.npz") as pool:
            self.pool = torch.from_numpy(pool["features"])
        self._models: dict[str, tuple[Any, nn.Module]] = {}

    def model(self, name: str) -> tuple[Any, nn.Module]:
        if name not in self._models:
            values = json.loads((self.folder / name / "config.json").read_text())
            state = load_file(self.folder / name / "model.safetensors")
            kept = LlamaConfig().to_dict().keys() & values.keys()
            skipped = {"model_type", "architectures", "torch_dtype", "transformers_version"}
            config = LlamaConfig(**{key: values[key] for key in kept - skipped})
            language = LlamaForCausalLM(config).eval()
            text = {key: each for key, each in state.items() if "mm_projector" not in key}
            language.load_state_dict(text)
            width = config.hidden_size
            projector = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width))
            prefix = "model.mm_projector."
            own = {key[len(prefix) :]: t for key, t in state.items() if key.startswith(prefix)}
            projector.load_state_dict(own)
            self._models[name] = language, projector
        return self._models[name]

    def batch(self, case: dict[str, Any], arrays: Any) -> Batch:
        """What the published merging makes of a case."""
        language, projector = self.model(case["model"])
        features = projector(self.pool)
        order, limit = iter(case["image_pool_ids"]), case["tokenizer_model_max_length"]
        rows, runs = [], []
        for ids, mask, labels in zip(
            arrays["input_ids"], arrays["attention_mask"], arrays["labels"], strict=True
        ):
            pieces, targets = [], []
            for token, label in zip(ids[mask.astype(bool)], labels[mask.astype(bool)], strict=True):
                if token == IMAGE:
                    pieces.append(features[next(order)])
                    targets += [IMAGE] * VISUAL
                else:
                    pieces.append(language.model.embed_tokens(torch.tensor([int(token)])))
                    targets.append(int(label))
            if IMAGE not in ids:
                next(order)  # a row without image takes a dummy one along
            row, found = torch.cat(pieces)[:limit], torch.tensor(targets[:limit])
            visual = int((found == IMAGE).sum())
            runs += [Run(min(VISUAL, visual - at)) for at in range(0, visual, VISUAL)]
            rows.append((row, found))
        longest = max(len(row) for row, _ in rows)
        embeds = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row, _ in rows])
        found = torch.stack([F.pad(each, (0, longest - len(each)), value=-100) for _, each in rows])
        mask = torch.stack([torch.arange(longest) < len(row) for row, _ in rows])
        table = place_runs(found == IMAGE, runs)
        return Batch(embeds, mask.long(), found.masked_fill(found == IMAGE, -100), table)


@pytest.fixture(scope="module")
def published(golden: Path) -> Published:
    return Published(golden / "llavolta")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_published_outputs(published: Published, name: str) -> None:
    """Logits, loss, positions, labels and lengths in the compatible mode."""
    case = json.loads((published.folder / f"cases/{name}.json").read_text())
    config = CompressionConfig(
        "avgpool1d", case["layer"], case["stride"], remainder="drop", positions="half"
    )
    language, _ = published.model(case["model"])
    with np.load(published.folder / f"cases/{name}.npz") as arrays:
        batch = published.batch(case, arrays)
        result = decode_compressed(language.model, config, batch.runs, batch.embeds, batch.mask)
        table = result.index_map
        assert table is not None and table.mask.shape[1] == case["final_len"]
        logits = language.lm_head(result.hidden)
        places = arrays["logit_positions"]
        kept = table.mask[:, places]
        error = (logits[:, places] - torch.from_numpy(arrays["logits"])).abs()
        assert float(error[kept].max()) <= 1e-4
        labels = table.labels(batch.labels)
        if "compressed_labels" in arrays:
            assert torch.equal(
                labels[table.mask], torch.from_numpy(arrays["compressed_labels"])[table.mask]
            )
        if "compressed_position_ids" in arrays:
            before = (batch.mask.cumsum(1) - 1).clamp(min=0)
            wanted = torch.from_numpy(arrays["compressed_position_ids"])
            assert torch.equal(table.positions(before, True)[table.mask], wanted[table.mask])
    if case["loss"] is not None:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert float(loss) == pytest.approx(case["loss"], abs=1e-4)


# --- any batch ------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
DECODERS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
# Runs of each row, and the text before, between and after them.
ROWS: list[list[Any]] = [[3, Run(9, 3), 2, Run(7), 4], [5], [Run(16, 4), Run(5), 1], [2, Run(1), 6]]


def rows_of(width: int) -> list[tuple[torch.Tensor, torch.Tensor, list[Run]]]:
    """(embeddings (T, D), visual (T,), runs) of each row."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in ROWS:
        flags = [isinstance(each, Run) for each in row for _ in range(_length(each))]
        embeds = torch.randn(len(flags), width, generator=generator)
        made.append((embeds, torch.tensor(flags), [each for each in row if isinstance(each, Run)]))
    return made


def _length(each: Any) -> int:
    return each.length if isinstance(each, Run) else each


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("remainder", ["keep", "drop"])
@pytest.mark.parametrize("layer", [-1, 0, 2, 3])
@pytest.mark.parametrize("method", ["avgpool1d", "avgpool2d", "fastv"])
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_batch_equals_its_rows(
    kind: str, method: str, layer: int, remainder: str, side: str
) -> None:
    """Rows of any make-up, padded on either side."""
    if method == "fastv" and layer < 1:
        pytest.skip("needs a layer before")
    torch.manual_seed(1)
    shape, make = DECODERS[kind]
    decoder = make(shape(**SHAPE)).eval().model
    config = CompressionConfig(method, layer, 4, remainder)
    rows = rows_of(SHAPE["hidden_size"])
    longest = max(len(embeds) for embeds, _, _ in rows)
    embeds = torch.zeros(len(rows), longest, int(SHAPE["hidden_size"]))
    mask, visual = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for index, (states, flags, _) in enumerate(rows):
        start = longest - len(states) if side == "left" else 0
        embeds[index, start : start + len(states)] = states
        mask[index, start : start + len(states)] = 1
        visual[index, start : start + len(states)] = flags.long()
    runs = place_runs(visual.bool(), [run for _, _, found in rows for run in found])
    together = decode_compressed(decoder, config, runs, embeds, mask)
    assert together.index_map is not None
    for index, (states, flags, found) in enumerate(rows):
        alone = decode_compressed(decoder, config, place_runs(flags[None], found), states[None])
        kept = together.hidden[index][together.index_map.mask[index]]
        assert len(kept) == alone.hidden.shape[1]
        torch.testing.assert_close(kept, alone.hidden[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "eager", PLAIN_FLASH])
@pytest.mark.parametrize(
    ("method", "layer"), [("avgpool1d", -1), ("avgpool1d", 0), ("avgpool1d", 2), ("fastv", 2)]
)
@torch.no_grad()
def test_packed_samples_equal_single_ones(method: str, layer: int, backend: str) -> None:
    """Also where a sample begins with visual tokens: no new position of it is 0.

    "fastv" follows the last token of each sample, not that of the row.
    """
    torch.manual_seed(1)
    decoder = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().model
    decoder.config._attn_implementation = backend
    config = CompressionConfig(method, layer, 4)
    rows = rows_of(SHAPE["hidden_size"])
    embeds = torch.cat([states for states, _, _ in rows])[None]
    visual = torch.cat([flags for _, flags, _ in rows])[None]
    positions = torch.cat([torch.arange(len(states)) for states, _, _ in rows])[None]
    runs = place_runs(visual, [run for _, _, found in rows for run in found])
    packed = decode_compressed(
        decoder, config, runs, embeds, position_ids=positions, use_cache=False
    ).hidden[0]
    start = 0
    for states, flags, found in rows:
        alone = decode_compressed(decoder, config, place_runs(flags[None], found), states[None])
        stop = start + alone.hidden.shape[1]
        torch.testing.assert_close(packed[start:stop], alone.hidden[0], atol=2e-5, rtol=1e-4)
        start = stop
    assert start == len(packed)


def test_groups_of_every_compressor() -> None:
    for name in COMPRESSORS:
        for keep in (True, False):
            for run in (Run(9, 3), Run(7), Run(1)):
                groups = COMPRESSORS.get(name).groups(run, 4, keep, torch.rand(run.length))
                used = groups[groups >= 0].unique()
                assert used.tolist() == list(range(len(used))), "numbered without gaps"
                if name != "avgpool2d":
                    assert len(used) == num_kept(run.length, 4, keep)
    squares = COMPRESSORS.get("avgpool2d").groups(Run(9, 3), 4, True, None)
    assert squares.reshape(3, 3).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]


def test_newlines_are_never_averaged() -> None:
    rows = whole_map((2, 4), newline=Newline.ROWS)
    assert runs_of_maps([rows]) == [Run(4, 4), Run(1)] * 2
    assert runs_of_maps([whole_map((2, 4), newline=Newline.END)]) == [Run(8, 4), Run(1)]
    visual = torch.ones(1, 10, dtype=torch.bool)
    table = place_runs(visual, runs_of_maps([rows]))
    index = build_map(CompressionConfig("avgpool1d", 0, 4, "drop"), table, visual)
    assert index.new_index[0].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 3]


def test_runs_that_do_not_fill_their_places() -> None:
    visual = torch.tensor([[False, True, True, False, True]])
    with pytest.raises(ValueError, match="do not fill"):
        place_runs(visual, [Run(3)])
    with pytest.raises(ValueError, match="more runs"):
        place_runs(visual, [Run(2), Run(1), Run(1)])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_followed_attention_is_the_layers_own(kind: str) -> None:
    """One row of the map that the library's attention computes, mean over the heads."""
    torch.manual_seed(1)
    shape, make = {**DECODERS, "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    decoder = make(shape(**SHAPE, head_dim=8, attn_implementation="eager")).eval().model
    for name, parameter in decoder.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            parameter.normal_()
    embeds, mask = torch.randn(2, 9, int(SHAPE["hidden_size"])), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        output_attentions=True,
        output_hidden_states=True,
    )
    rows, at = torch.tensor([0, 1, 1]), torch.tensor([8, 8, 5])
    found = attention_of(
        decoder, decoder.layers[1], output.hidden_states[1], positions, mask.bool()[rows], rows, at
    )
    expected = output.attentions[1][rows, :, at].mean(1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert float(expected.std()) > 0.01


def test_draws_are_new_in_training_and_repeat_otherwise() -> None:
    visual = torch.ones(1, 64, dtype=torch.bool)
    config, runs = CompressionConfig("random_drop", 1, 4), place_runs(visual, [Run(32), Run(32)])

    def drawn(training: bool) -> list[bool]:
        kept = build_map(config, runs, visual, training=training).new_index[0] >= 0
        return kept.tolist()

    torch.manual_seed(0)
    first, second = drawn(True), drawn(True)
    assert first != second and sum(first[:32]) == sum(first[32:]) == 8
    assert first[:32] != first[32:], "each run has its own"
    torch.manual_seed(0)
    assert drawn(True) == first
    once = drawn(False)
    assert drawn(False) == once and once[:32] != once[32:]
