"""The golden checkpoints of LLaVA-1.5 and LLaVA-OneVision give the numbers of their own code."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_checkpoint import Parts
from PIL import Image

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.published import find_layout
from llava_uhd.checkpoint.published.layout import published_key
from llava_uhd.config.training import DataConfig
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import ConversationDataset, build_dataset
from llava_uhd.text.processor import LlavaUHDProcessor

SYSTEMS = ("llava_1_5", "llava_onevision")
# Where the original code has one negative number for an image or video.
IMAGE_INDEX = -200

CASES = [
    *((SYSTEMS[0], name) for name in (
        "single_landscape", "single_portrait", "single_square", "image_after_text", "two_images",
        "two_turns_image_first", "images_in_two_turns", "text_only",
    )),
    *((SYSTEMS[1], name) for name in (
        "single_anyres", "single_anyres_portrait", "single_anyres_downscaled", "single_pad",
        "two_images_pad", "two_images_two_turns_pad", "video_4_frames_one_token",
        "video_4_frames_grid", "video_4_frames_frame", "video_4_frames_no_token", "text_only",
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded(golden: Path) -> dict[str, Parts]:
    return {name: load_pretrained(golden / name / "model/checkpoint") for name in SYSTEMS}


@pytest.fixture(scope="module")
def wanted(golden: Path) -> dict[str, tuple[Any, Any]]:
    """Cases and arrays of each system."""
    return {
        name: (
            json.loads((golden / name / "model/cases.json").read_text()),
            dict(np.load(golden / name / "model/outputs.npz")),
        )
        for name in SYSTEMS
    }


def test_no_case_is_left_out(wanted: dict[str, tuple[Any, Any]]) -> None:
    found = [(name, case["id"]) for name in SYSTEMS for case in wanted[name][0]["cases"]]
    assert found == CASES


def with_option(parts: Parts, option: str | None) -> Parts:
    """The model under another setting of its configuration, as the original code allows."""
    model, processor = parts
    config = copy.deepcopy(model.config)
    if option == "pad":
        config.image = dataclasses.replace(config.image, strategy="pad")
    elif option is not None:
        config.video = dataclasses.replace(config.video, newline=option)
    return model, LlavaUHDProcessor.from_parts(processor.tokenizer, config)


def close(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Within 1e-4 + 1e-4 |golden|."""
    return bool(np.allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-4))


def collapse(ids: list[int], placeholder: int, runs: list[int]) -> list[int]:
    """Each run of placeholders as one -200; ``runs`` are the tokens of each image."""
    found: list[int] = []
    place = 0
    remaining = iter(runs)
    while place < len(ids):
        if ids[place] != placeholder:
            found.append(ids[place])
            place += 1
            continue
        length = next(remaining)
        assert ids[place : place + length] == [placeholder] * length
        found.append(IMAGE_INDEX)
        place += length
    assert next(remaining, None) is None
    return found


def views(inputs: Any, patch: int) -> list[torch.Tensor]:
    """The packed patches as pictures (3, rows * patch, columns * patch)."""
    found, start = [], 0
    for rows, columns in inputs["view_grids"].tolist():
        patches = inputs["pixel_values"][start : start + rows * columns]
        tiles = patches.reshape(rows, columns, 3, patch, patch)
        found.append(tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * patch, columns * patch))
        start += rows * columns
    return found


@pytest.mark.parametrize(("name", "case_id"), CASES)
def test_pixels_projections_and_logits(
    name: str,
    case_id: str,
    golden: Path,
    loaded: dict[str, Parts],
    wanted: dict[str, tuple[Any, Any]],
) -> None:
    cases, arrays = wanted[name]
    case = next(each for each in cases["cases"] if each["id"] == case_id)
    model, processor = with_option(loaded[name], case.get("option"))
    pictures = [Image.open(golden / name / "model" / file) for file in case["images"]]
    text, given = case["prompt"], {"images": pictures}
    if case.get("modality") == "video":
        text, given = text.replace("<image>", "<video>"), {"videos": [pictures]}
        runs = [processor.num_video_tokens(len(pictures), *pictures[0].size)]
    else:
        several = len(pictures) > 1
        runs = [processor.num_image_tokens(*each.size, several=several) for each in pictures]
    inputs = processor(text=text, **given)
    ids = inputs["input_ids"][0].tolist()
    assert collapse(ids, processor.image_token_id, runs) == case["input_ids"]
    assert len(ids) == case["sequence_length_after_merge"]
    assert sum(runs) == case.get("visual_tokens", sum(runs))
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert close(logits[-1], arrays[f"{case_id}/last_logits"])
    assert close(logits.mean(0), arrays[f"{case_id}/mean_logits_over_positions"])
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert generated[0, len(ids) :].tolist() == case["greedy_new_tokens"]
    if pictures:
        checked = check_views(model, inputs, {
            key.removeprefix(f"{case_id}/"): value
            for key, value in arrays.items() if key.startswith(f"{case_id}/")
        })  # fmt: skip
        # The frames of a video are stored with its first case only.
        other_videos = case.get("modality") == "video" and not case_id.endswith("one_token")
        assert bool(checked) != other_videos


def check_views(model: Any, inputs: Any, arrays: dict[str, np.ndarray]) -> int:
    """Compares pixels and projected features with the stored ones; how many arrays there were."""
    pixels = views(inputs, model.config.image.patch_size)
    with torch.no_grad():
        features = model.vision_tower(inputs["pixel_values"], inputs["view_grids"])
        tokens = model.projector(features, inputs["view_grids"], inputs["pixel_values"])
    per_view = tokens.split([int(rows * columns) for rows, columns in inputs["view_grids"]])
    checked = 0
    for kind in ("pixel_values", "projected"):
        start = 0
        for key in sorted(key for key in arrays if key.startswith(kind)):
            checked += 1
            # (views, 3, side, side) or (views, tokens, width); what a view has beyond whole
            # patches is stored too, and read by nothing.
            for array in arrays[key]:
                if kind == "projected":
                    step = 48 if key.endswith("48th") else 243
                    assert close(per_view[start][::step], array)
                else:
                    step = 8 if key.endswith("stride8") else 32
                    ours = pixels[start][:, ::step, ::step]
                    assert close(ours, array[:, : ours.shape[1], : ours.shape[2]])
                start += 1
    return checked


# --- training -------------------------------------------------------------------------------------


# What the original data code does to the markers of a question.
MARKER_RULES: dict[str, Any] = {"llava_1_5": "llava_1_5", "llava_onevision": "onevision"}


def train_data(name: str, folder: Path, processor: LlavaUHDProcessor) -> ConversationDataset:
    config = DataConfig(
        path=str(folder / "train_batch.json"),
        image_folder=str(folder / "images"),
        image_first=MARKER_RULES[name],
        max_length=None,
    )
    return build_dataset(config, processor)


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_and_gradients(
    name: str, golden: Path, loaded: dict[str, Parts], wanted: dict[str, tuple[Any, Any]]
) -> None:
    model, processor = copy.deepcopy(loaded[name][0]), loaded[name][1]
    processor = LlavaUHDProcessor.from_parts(processor.tokenizer, model.config)
    processor.template_mode = "faithful"
    case = wanted[name][0]["train"]
    dataset = train_data(name, golden / name / "model", processor)
    assert dataset.lengths == case["lengths"]
    assert dataset.modality_lengths == case["modality_lengths"]
    samples = [dataset[index] for index in range(3)]
    assert [dataset.token_length(index) for index in range(3)] == [
        len(sample["input_ids"]) for sample in samples if isinstance(sample, dict)
    ]
    batch = Collator(processor.tokenizer.pad_token_id or 0)(samples)
    for row in range(3):
        real = sum(case["attention_mask"][row])
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
        text = ids != processor.image_token_id
        theirs = torch.tensor([case["input_ids"][row][:real], case["labels"][row][:real]])
        kept = theirs[0] != IMAGE_INDEX
        assert torch.equal(ids[text], theirs[0][kept])
        assert torch.equal(labels[text], theirs[1][kept])
        assert bool((labels[~text] == -100).all())
    assert list(batch["input_ids"].shape) == case["logits_shape"][:2]
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    found = {
        published_key(key, model.config): float(parameter.grad.norm())
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    for key, norm in case["grad_norms"].items():
        assert found.pop(key) == pytest.approx(norm, rel=1e-3, abs=1e-6), key
    # LLaVA-1.5 keeps the tower frozen.
    assert all(".vision_tower." in key for key in found)
    assert bool(found) == (name == "llava_1_5")


# --- configuration --------------------------------------------------------------------------------


def test_configuration(loaded: dict[str, Parts], golden: Path) -> None:
    for name, parts in loaded.items():
        values = json.loads((golden / name / "model/checkpoint/config.json").read_text())
        layout = find_layout(values)
        assert layout is not None and layout.slug == name
        assert parts[0].config.projector.type == "mlp2x_gelu"
    first, second = (loaded[name][0].config for name in SYSTEMS)
    image = first.image
    assert (image.strategy, image.layout, image.several) == ("pad", "flat", "same")
    assert (image.scale_resolution, image.patch_size, image.image_token_id) == (336, 14, 900)
    assert (first.template, first.select_layer, first.has_newline) == ("v1", -2, False)
    image = second.image
    assert (image.strategy, image.layout, image.several) == ("anyres", "unpad", "pad")
    assert (image.max_tiles, len(image.pinpoints or ()), image.scale_resolution) == (9, 36, 384)
    assert image.mean == image.std == (0.5, 0.5, 0.5)
    assert (second.template, second.select_layer, second.has_newline) == ("qwen_1_5", -2, True)
    video = second.video
    assert (video.pool_stride, video.pool_mode, video.newline) == (2, "bilinear", "one_token")
    vision = second.vision_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (32, 4, 3)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (384, 14, 64)
