"""The model: published numbers, counts for any image size, packing, gradients, losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import QWEN2, picture, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.config.training import DataConfig
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import build_dataset
from llava_uhd.images.geometry import plan_slices
from llava_uhd.images.pixels import open_image
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn

Parts = tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]
QUERIES = 4


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts()


# --- golden ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(golden: Path) -> Path:
    return golden / "uhd_v1"


@pytest.fixture(scope="module", params=["recorded tower", "tower override"])
def published(source: Path, request: pytest.FixtureRequest) -> Parts:
    folder = source / "tiny_checkpoint"
    override = folder / "clip" if request.param == "tower override" else None
    return load_pretrained(folder, vision_tower=override)


def within(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest excess over the bound 1e-4 + 1e-4 * |wanted|: not above zero where all agree."""
    assert found.shape == wanted.shape
    return float(((found - wanted).abs() - 1e-4 - 1e-4 * wanted.abs()).max())


def test_golden_logits_features_and_answers(source: Path, published: Parts) -> None:
    model, processor = published
    tensors = load_file(source / "tiny_outputs.safetensors")
    cases = json.loads((source / "tiny_cases.json").read_text())["cases"]
    compared = set()
    for case in cases:
        key = case["key"]
        processor.image_config.long_side = 1024 if case["mode"] == "eval" else None
        inputs = processor(text=case["prompt"], images=[open_image(source / case["image"])])
        pixels, grids = inputs["pixel_values"], inputs["view_grids"]
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            rows = model.get_image_features(pixels, grids).view(case["num_views"], 144, -1)
            vision = model.vision_tower(pixels, grids)
        found = {
            "logits_last": logits,
            "proj_rows": rows[:, ::24],
            "proj_full": rows.flatten(0, 1),
            "vision_features_overview": vision[-int(grids[-1].prod()) :],
        }
        for name, values in found.items():
            wanted = tensors.get(f"{key}.{name}")
            if wanted is None:
                continue
            compared.add(f"{key}.{name}")
            assert within(values, wanted.reshape(values.shape)) <= 0, f"{key}.{name}"
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert new[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy_8"][1:], key
    processor.image_config.long_side = None
    stored = {name for name in tensors if not name.endswith("pixel_probe") and ".grad." not in name}
    assert compared == stored


def test_golden_projector_gradients(source: Path) -> None:
    model, processor = load_pretrained(source / "tiny_checkpoint")
    image, projector = processor.image_config, processor.projector_config
    processor = LlavaUHDProcessor(
        processor.tokenizer,
        dataclasses.asdict(image),
        dataclasses.asdict(projector),
        template_name="plain",
    )
    data = DataConfig(
        path=str(source / "pretrain_samples.json"),
        image_folder=str(source / "images"),
        overview_only=True,
    )
    batch = Collator(0)([build_dataset(data, processor)[0]])
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    loss = model(**batch).loss
    loss.backward()
    wanted = json.loads((source / "tiny_cases.json").read_text())["train"]["pretrain_plain"]
    assert float(loss.detach()) == pytest.approx(wanted["loss"], abs=1e-4)
    gradients = {name: p.grad for name, p in model.projector.named_parameters()}
    assert set(wanted["projector_grad_norms"]) == set(gradients)
    # Where the norm is rounding noise (the key bias has no gradient at all) 1e-6 is allowed.
    for name, norm in wanted["projector_grad_norms"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    tensors = load_file(source / "tiny_outputs.safetensors")
    for name, found in (
        ("pos_embed_rows", gradients["pos_embed"][::12]),
        ("query", gradients["query"]),
        ("kv_proj.weight", gradients["kv_proj.weight"]),
    ):
        expected = tensors[f"pretrain_plain.grad.{name}"]
        assert (found - expected).norm() <= 1e-3 * expected.norm(), name


# --- counts and packing ---------------------------------------------------------------------------


WIDE = tiny_parts(image={"bounded": False}, seed=1)
NARROW = tiny_parts(seed=1)


@settings(max_examples=60)
@given(st.integers(1, 6000), st.integers(1, 6000), st.booleans())
def test_rows_of_the_model_equal_the_geometry(width: int, height: int, bounded: bool) -> None:
    model, processor = NARROW if bounded else WIDE
    plan = plan_slices(width, height, 7, 32, 8, bounded=bounded)
    grids = torch.tensor(plan.view_grids)
    pixels = torch.zeros(int(grids.prod(1).sum()), 3 * 8 * 8)
    with torch.no_grad():
        rows = model.get_image_features(pixels, grids).shape[0]
    assert rows == plan.num_views * QUERIES
    assert processor.num_image_tokens(width, height) == rows + plan.num_slices


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (64, 64), (97, 31), (640, 480)])
@pytest.mark.parametrize("wide", [True, False])
def test_real_images_fit_their_placeholders(size: tuple[int, int], wide: bool) -> None:
    model, processor = WIDE if wide else NARROW
    inputs = processor(text="USER: <image>\nWhat?", images=[picture(*size)])
    with torch.no_grad():
        assert bool(model(**inputs).logits.isfinite().all())


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=2, max_size=5),
    st.booleans(),
)
def test_images_together_equal_images_alone(sizes: list[tuple[int, int]], wide: bool) -> None:
    model, processor = WIDE if wide else NARROW
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    together = processor(text="<image>" * len(sizes), images=pictures)
    with torch.no_grad():
        packed = model.get_image_features(together["pixel_values"], together["view_grids"])
        alone = []
        for image in pictures:
            one = processor(text="<image>", images=[image])
            alone.append(model.get_image_features(one["pixel_values"], one["view_grids"]))
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5


# --- errors ---------------------------------------------------------------------------------------


def test_miscounts_name_all_numbers(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(
        text=["<image>a<image>", "<image>"], images=[picture(32, 32, seed) for seed in range(3)]
    )
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == processor.image_token_id).nonzero()[0]] = 5
    with pytest.raises(ValueError, match=r"hold 11 .*per row: \[7, 4\].* give 12 tokens"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match=r"hold 11 .*per row: \[7, 4\].* give 12 tokens"):
        model.generate(**{**inputs, "input_ids": ids}, max_new_tokens=1)


def test_missing_pixels_are_named(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text="<image>", images=[picture(32, 32)])
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="hold 4 image placeholders but no pixel_values"):
        model(**text)
    with pytest.raises(ValueError, match="hold 4 image placeholders but no pixel_values"):
        model.generate(**text, max_new_tokens=2)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="need view_grids"):
            call(**text, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="either input_ids .* or inputs_embeds"):
        model()


def test_wrong_grids_are_named(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text="<image>", images=[picture(32, 32)])
    with pytest.raises(ValueError, match="describe 15 patches in 1 views, pixel_values has 16"):
        model(**{**inputs, "view_grids": torch.tensor([[5, 3]])})


def test_surplus_pixels_are_an_error(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text="<image>", images=[picture(32, 32)])
    text = processor(text="none")
    with pytest.raises(ValueError, match="hold 0 .* give 4 tokens"):
        model(**text, pixel_values=inputs["pixel_values"], view_grids=inputs["view_grids"])


# --- losses ---------------------------------------------------------------------------------------


def sample(processor: LlavaUHDProcessor, question: str, answer: str, *images: Any) -> dict:
    return processor.encode_conversation([Turn("human", question), Turn("gpt", answer)], images)


@pytest.fixture(scope="module")
def samples(parts: Parts) -> list[dict[str, Any]]:
    _, processor = parts
    return [
        sample(processor, "<image>\nWhat?", "red circle", picture(64, 32)),
        sample(processor, "How many?", "three"),
        sample(processor, "<image>\nWhich <image>?", "blue", picture(20, 30, 1), picture(9, 80, 2)),
    ]


def test_loss_is_the_mean_over_learned_tokens(parts: Parts, samples: list[dict]) -> None:
    model, _ = parts
    batch = Collator(0)(samples)
    with torch.no_grad():
        output = model(**batch)
        logits = model(**batch, logits_to_keep=0).logits
    assert output.logits is None and output.past_key_values is None
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        shared = model(**batch, num_items_in_batch=torch.tensor(1000)).loss
    learned = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert float(shared) == pytest.approx(float(expected) * learned / 1000, rel=1e-5)


def test_last_logits_only(parts: Parts, samples: list[dict]) -> None:
    model, _ = parts
    batch = Collator(0)(samples)
    batch.pop("labels")
    with torch.no_grad():
        every = model(**batch).logits
        last = model(**batch, logits_to_keep=2).logits
        chosen = model(**batch, logits_to_keep=torch.tensor([0, 5])).logits
    assert every.shape[1] == batch["input_ids"].shape[1]
    assert torch.allclose(last, every[:, -2:], atol=1e-5)
    assert torch.allclose(chosen, every[:, [0, 5]], atol=1e-5)


def test_a_batch_equals_its_rows(parts: Parts, samples: list[dict]) -> None:
    model, _ = parts
    together = Collator(0)(samples)
    together.pop("labels")
    with torch.no_grad():
        batched = model(**together).logits
        for row, one in enumerate(samples):
            alone = Collator(0)([one])
            alone.pop("labels")
            logits = model(**alone).logits[0]
            assert (batched[row, : len(logits)] - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_packed_samples_do_not_see_each_other(text: str, samples: list[dict]) -> None:
    model = tiny_parts(QWEN2)[0] if text == "qwen2" else tiny_parts()[0]
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in samples])[None],
        "labels": torch.cat([one["labels"] for one in samples])[None],
        "position_ids": torch.cat([torch.arange(len(one["input_ids"])) for one in samples])[None],
        "pixel_values": torch.cat([one["pixel_values"] for one in samples if "view_grids" in one]),
        "view_grids": torch.cat([one["view_grids"] for one in samples if "view_grids" in one]),
    }
    with torch.no_grad():
        separate = model(**Collator(0)(samples), logits_to_keep=0)
        one_row = model(**packed, logits_to_keep=0)
    assert float(one_row.loss) == pytest.approx(float(separate.loss), rel=1e-5)
    start = 0
    for row, one in enumerate(samples):
        stop = start + len(one["input_ids"])
        wanted = separate.logits[row, : stop - start]
        assert (one_row.logits[0, start:stop] - wanted).abs().max() <= 1e-4
        start = stop


# --- gradients ------------------------------------------------------------------------------------


def gradients(model: LlavaUHDForConditionalGeneration, batch: dict) -> dict[str, Any]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def test_text_alone_reaches_every_trained_parameter(samples: list[dict]) -> None:
    model, _ = tiny_parts()
    model.train()
    seen: list[int] = []
    model.vision_tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = gradients(model, Collator(0)([samples[1]]))
    assert [name for name, grad in found.items() if grad is None] == []
    for name, grad in found.items():
        if not name.startswith("language_model."):
            assert float(grad.abs().max()) == 0, name
    assert seen == [4], "four patches are all it may cost"
    model.eval()
    assert gradients(model, Collator(0)([samples[1]]))["projector.query"] is None


def test_text_alone_has_the_same_loss_in_training(samples: list[dict]) -> None:
    model, _ = tiny_parts()
    batch = Collator(0)([samples[1]])
    with torch.no_grad():
        before = model(**batch).loss
        during = model.train()(**batch).loss
    assert torch.equal(before, during)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_images_reach_every_trained_parameter(samples: list[dict], checkpointing: bool) -> None:
    model, _ = tiny_parts()
    model.train()
    plain = gradients(model, Collator(0)(samples))
    assert all(grad is not None and bool(grad.any()) for grad in plain.values())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, grad in gradients(model, Collator(0)(samples)).items():
            assert torch.allclose(grad, plain[name], rtol=1e-4, atol=1e-6), name


def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(samples: list[dict]) -> None:
    model, _ = tiny_parts()
    model.train()
    model.vision_tower.requires_grad_(False)
    batch = Collator(0)(samples)
    features = model.vision_tower(batch["pixel_values"], batch["view_grids"])
    assert not features.requires_grad
    found = gradients(model, batch)
    assert all((grad is None) == name.startswith("vision_tower.") for name, grad in found.items())


def test_features_may_be_handed_over(parts: Parts, samples: list[dict]) -> None:
    model, _ = parts
    batch = Collator(0)(samples)
    pixels, grids = batch.pop("pixel_values"), batch.pop("view_grids")
    with torch.no_grad():
        features = model.get_image_features(pixels, grids)
        direct = model(**batch, pixel_values=pixels, view_grids=grids).loss
        handed = model(**batch, image_features=features).loss
    assert torch.equal(direct, handed)


def test_image_order_matters(parts: Parts) -> None:
    model, processor = parts
    one, two = picture(32, 32, 1), picture(32, 32, 2)
    with torch.no_grad():
        forth, back = (
            model(**processor(text="<image>a<image>b", images=images)).logits[0, -1]
            for images in ([one, two], [two, one])
        )
    assert (forth - back).abs().max() > 1e-3
