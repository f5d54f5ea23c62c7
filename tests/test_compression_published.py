"""The whole model against published LLaVolta outputs: generation, tower and all, broken batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_compression import IMAGE, VISUAL

from llava_uhd.config.model import CompressionConfig, LlavaUHDConfig
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration

PLACEHOLDER = 128  # behind the vocabulary of the golden models
GENERATED = ["gen_k0_s8_REFERENCE_WRONG", "gen_k2_s8", "gen_k5_s4", "gen_none"]
GENERATED += ["gen_projector_out_s8", "gen_two_images"]


class Published:
    """A golden model with a vision tower, and the cases."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        with np.load(folder / "feature_pool.npz") as pool:
            self.pool = torch.from_numpy(pool["features"])
        values = json.loads((folder / name / "config.json").read_text())
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps")
        vision = json.loads((folder / "clip_tiny/config.json").read_text())
        config = LlavaUHDConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **{name: values[name] for name in names}},
            image={
                "strategy": "square",
                "layout": "flat",
                "scale_resolution": 336,
                "patch_size": 14,
                "image_token_id": PLACEHOLDER,
            },
            projector={"type": "mlp2x_gelu"},
        )
        self.model = LlavaUHDForConditionalGeneration(config).eval()
        state = {}
        for key, tensor in load_file(folder / name / "model.safetensors").items():
            own = key.replace("model.mm_projector.", "projector.layers.")
            state[own if own.startswith("projector.") else f"language_model.{own}"] = tensor
        for key, tensor in load_file(folder / "clip_tiny/model.safetensors").items():
            state[f"vision_tower.{key.removeprefix('vision_model.').replace('encoder.', '')}"] = (
                tensor
            )
        missing, _ = self.model.load_state_dict(state, strict=False)
        assert not missing
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def case(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        case = json.loads((self.folder / f"cases/{name}.json").read_text())
        with np.load(self.folder / f"cases/{name}.npz") as arrays:
            return case, dict(arrays)

    def inputs(self, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """A padded batch with its image tokens; padding of 0 at the right."""
        order, used, rows, learned = iter(case.get("image_pool_ids", [])), [], [], []
        masks = arrays.get("attention_mask", np.ones_like(arrays["input_ids"])).astype(bool)
        targets = arrays.get("labels", arrays["input_ids"])
        for ids, mask, labels in zip(arrays["input_ids"], masks, targets, strict=True):
            row: list[int] = []
            wanted: list[int] = []
            for token, label in zip(ids[mask].tolist(), labels[mask].tolist(), strict=True):
                count = VISUAL if token == IMAGE else 1
                row += [PLACEHOLDER if token == IMAGE else token] * count
                wanted += [-100 if token == IMAGE else label] * count
            pictured = [next(order, 0) for token in ids if token == IMAGE]
            used += pictured
            if not pictured:
                next(order, None)  # the published code takes a dummy image along
            rows.append(row)
            learned.append(wanted)
        longest = max(map(len, rows))
        pad = [longest - len(row) for row in rows]
        features = [self.model.projector(self.pool[index], None, None) for index in used]
        return {
            "input_ids": torch.tensor([[*row, *[0] * n] for row, n in zip(rows, pad, strict=True)]),
            "labels": torch.tensor(
                [[*row, *[-100] * n] for row, n in zip(learned, pad, strict=True)]
            ),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * n for row, n in zip(rows, pad, strict=True)]
            ),
            "image_features": torch.cat(features),
            "view_grids": torch.tensor([[24, 24]] * len(features)),
        }


@pytest.fixture(scope="module")
def published(golden: Path) -> Published:
    return Published(golden / "llavolta", "model_a")


def options_of(case: dict[str, Any]) -> CompressionConfig:
    return CompressionConfig(case["grouping"], case["layer"], case["stride"], "drop", "half")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", GENERATED)
@torch.no_grad()
def test_generation(published: Published, name: str, use_cache: bool) -> None:
    """Tokens and logits of every step; at layer 0 too, where the published cache is wrong."""
    case, arrays = published.case(name)
    inputs = published.inputs(case, arrays)
    del inputs["labels"]
    output = published.model.generate(
        **inputs,
        compression=options_of(case),
        use_cache=use_cache,
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    assert new.tolist() == arrays["uncached_generated_ids"][0].tolist()
    logits = torch.stack(output.logits, 1)
    wanted = torch.from_numpy(arrays["uncached_step_logits"])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    if use_cache and case["layer"] > 0:
        lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        assert lengths == case["kv_len_per_layer_last_step"]


@torch.no_grad()
def test_tower_and_all(published: Published) -> None:
    """From pixels to logits and loss."""
    case, arrays = published.case("a_end_to_end_clip")
    low = torch.from_numpy(arrays["pixel_lowres"])
    pixels = low.repeat_interleave(14, 2).repeat_interleave(14, 3)
    pixels = pixels + 0.1 * torch.sin(0.9 * torch.arange(336, dtype=torch.float32))
    inputs = published.inputs(case, arrays)
    del inputs["image_features"]
    patches = pixels.reshape(2, 3, 24, 14, 24, 14).permute(0, 2, 4, 1, 3, 5)
    inputs["pixel_values"] = patches.reshape(2 * VISUAL, -1)
    output = published.model(**inputs, compression=options_of(case), logits_to_keep=20)
    kept = inputs["attention_mask"][:, -20:].bool()  # the rest is padding
    wanted = torch.from_numpy(arrays["logits"])[kept]
    torch.testing.assert_close(output.logits[kept], wanted, atol=1e-4, rtol=0)
    assert float(output.loss) == pytest.approx(case["loss"], abs=1e-4)
    features = published.model.vision_tower(inputs["pixel_values"], inputs["view_grids"])
    sampled = features.reshape(2, VISUAL, -1)[:, ::24]
    wanted = torch.from_numpy(arrays["tower_features_sample"])
    torch.testing.assert_close(sampled, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["a_mixed_batch", "a_unequal_image_counts"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_batches_that_the_published_code_cannot_read(
    published: Published, name: str, left: bool
) -> None:
    """Rows with unequal numbers of images, in one batch: each as its published row alone."""
    case, arrays = published.case(f"{name}_REFERENCE_FAILS")
    inputs = published.inputs(case, arrays)
    alone = [published.case(f"{name}_row{row}") for row in (0, 1)]
    lengths = inputs["attention_mask"].sum(1).tolist()
    if left:
        for key in ("input_ids", "attention_mask", "labels"):
            for row, length in enumerate(lengths):
                shift = inputs[key].shape[1] - length
                inputs[key][row] = inputs[key][row].roll(shift)
    output = published.model(**inputs, compression=options_of(case), logits_to_keep=0)
    weighted, learned = 0.0, 0
    for row, (single, results) in enumerate(alone):
        places = torch.from_numpy(results["logit_positions"])
        start = output.logits.shape[1] - single["final_len"] if left else 0
        wanted = torch.from_numpy(results["logits"])[0]
        torch.testing.assert_close(output.logits[row, places + start], wanted, atol=1e-4, rtol=0)
        count = int((results["compressed_labels"][0, 1:] != -100).sum())
        weighted, learned = weighted + single["loss"] * count, learned + count
    assert float(output.loss) == pytest.approx(weighted / learned, abs=1e-4)


@torch.no_grad()
def test_without_compression(published: Published) -> None:
    """The same model switched off: an ordinary LLaVA-1.5."""
    case, arrays = published.case("a_none")
    inputs = published.inputs(case, arrays)
    output = published.model(**inputs, compression=options_of(case), logits_to_keep=0)
    logits = output.logits[:, arrays["logit_positions"]]
    kept = inputs["attention_mask"][:, arrays["logit_positions"]].bool()
    wanted = torch.from_numpy(arrays["logits"])
    torch.testing.assert_close(logits[kept], wanted[kept], atol=1e-4, rtol=0)
    assert float(output.loss) == pytest.approx(case["loss"], abs=1e-4)


@pytest.mark.parametrize("name", ["a_avgpool1d_k2_s8", "b_heavy_k2_s8"])
def test_gradients(golden: Path, name: str) -> None:
    """Of the loss, as far as the projector; and the states that the compression gives."""
    published = Published(golden / "llavolta", f"model_{name[0]}")
    case, arrays = published.case(name)
    model, entering = published.model, []
    layer = model.language_model.model.layers[case["layer"]]
    layer.register_forward_pre_hook(lambda module, given: entering.append(given[0]))
    model(**published.inputs(case, arrays), compression=options_of(case)).loss.backward()
    found = entering[0][:, arrays["hidden_positions"]]
    wanted = torch.from_numpy(arrays["hidden_entering_compression_layer"])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for key, norm in case["grad_norms"].items():
        own = key.replace("model.mm_projector.", "projector.layers.")
        own = own if own.startswith("projector.") else f"language_model.{own}"
        gradient = model.get_parameter(own).grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4), key
    for key, own in (
        ("grad_mm_projector_0_weight", model.projector.layers[0].weight),
        ("grad_q_proj_layer0", model.language_model.model.layers[0].self_attn.q_proj.weight),
    ):
        wanted = torch.from_numpy(arrays[key])
        error = (own.grad[: len(wanted)] - wanted).norm() / wanted.norm()
        assert float(error) <= 1e-4, key
