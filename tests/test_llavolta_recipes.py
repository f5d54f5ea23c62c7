"""Recipes of LLaVolta: published settings, both stages in a row, frames of videos as runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import run_here, steps, weights, with_drawn_data
from fixtures_video import write_video

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.compression import CompressionConfig, resolve_schedule
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.text.templates import VIDEO_MARKER
from llava_uhd.train.sequence import STAGES, make_plan
from llava_uhd.train.stages import part_of

RECIPES = [name for name in list_recipes() if name.startswith("llavolta/")]
# Scheme -> words of its folders, schedule of both stages, K/s of each stage of the second one.
SCHEMES: dict[str, tuple[str, tuple[str | None, str | None], str]] = {
    "reproduce": ("reproduce", (None, None), ""),
    "4stage": ("4stage", (None, "four_stage"), "2/8 2/2 16/2 off"),
    "heavy_compression": ("heavy-compression", ("heavy", "heavy"), "2/8"),
    "light_compression": ("light-compression", ("light", "light"), "16/8"),
    "video_4stage": ("video-4stage", (None, "four_stage"), "2/8 2/2 16/2 off"),
}
LETTER = {"remainder": "drop", "positions": "half"}


def both(scheme: str, *words: str) -> list[Any]:
    return [load_recipe(f"llavolta/{stage}_{scheme}", words) for stage in STAGES[:2]]


# --- settings -------------------------------------------------------------------------------------


def test_every_recipe_is_looked_at() -> None:
    assert set(RECIPES) == {f"llavolta/{stage}_{each}" for stage in STAGES[:2] for each in SCHEMES}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_published_settings(scheme: str) -> None:
    video = scheme == "video_4stage"
    for recipe, rate, batch, device, deepspeed, template, strategy, saved, learn in zip(
        both(scheme),
        (1e-3, 2e-5),
        (256, 128),
        (32, 16),
        ("zero2", "zero2" if video else "zero3"),
        ("plain", "v1"),
        ("square", "pad"),
        (24000, 50000),
        ({"projector": None}, {"projector": None, "language_model": None}),
        strict=True,
    ):
        given = recipe.trainer.arguments
        shared = ("num_train_epochs", "weight_decay", "warmup_steps", "lr_scheduler_type")
        assert [given[name] for name in shared] == [1, 0, 0.03, "cosine"]
        shared = ("bf16", "tf32", "gradient_checkpointing", "save_total_limit", "logging_steps")
        assert [given[name] for name in shared] == [True, True, True, 1, 1]
        assert (given["learning_rate"], given["save_steps"]) == (rate, saved)
        assert (given["dataloader_num_workers"], recipe.trainer.global_batch_size) == (4, batch)
        assert recipe.trainer.batch_plan(8) == (device, 1)
        assert (recipe.deepspeed, recipe.model.template) == (deepspeed, template)
        assert recipe.stage.learn == learn
        assert recipe.trainer.group_by_modality_length is (template == "v1")
        assert recipe.data.max_length == (4096 if video and template == "v1" else 2048)
        config = describe_recipe(recipe)
        side = 224 if video else 336
        image = config.image
        assert (image.strategy, image.layout, image.scale_resolution) == (strategy, "flat", side)
        assert (config.vision_config.image_size, config.select_layer) == (side, -2)
        assert (config.projector.type, config.text_config.num_hidden_layers) == ("mlp2x_gelu", 32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schedules_and_folders(scheme: str) -> None:
    folder, schedules, stages = SCHEMES[scheme]
    first, second = both(scheme)
    assert (first.compression.schedule, second.compression.schedule) == schedules
    for recipe in (first, second):
        compressed = recipe.compression.schedule is not None
        expected = {"method": "avgpool1d", **LETTER} if compressed else {}
        assert vars(recipe.compression) == {
            **vars(CompressionConfig()),
            **expected,
            "schedule": recipe.compression.schedule,
        }
    if stages:
        found = resolve_schedule(schedules[1] or "", 32).stages
        assert " ".join(stage.label for stage in found) == stages
    assert first.output_dir == f"checkpoints/llava-v1.5-7b-pretrain-{folder}"
    assert second.output_dir == f"checkpoints/llava-v1.5-7b-{folder}"
    # Each reads its own first stage (the published light one reads that of the heavy one).
    assert second.model.projector_file == first.output_dir
    assert [step.options for step in make_plan(f"llavolta/{scheme}", []).steps] == [[], []]


def test_no_two_recipes_share_a_folder() -> None:
    folders = [load_recipe(name).output_dir for name in list_recipes()]
    assert len(set(folders)) == len(folders)


def test_video_fits_into_the_context() -> None:
    recipe = load_recipe("llavolta/finetune_video_4stage")
    config = describe_recipe(recipe)
    assert (config.video.max_frames, config.video.force_sample) == (8, True)
    side = config.image.scale_resolution // config.image.patch_size
    assert config.video.max_frames * side * side == 2048 < recipe.data.max_length
    assert recipe.data.max_length == 4096, "of Vicuna"


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_drawn_data(tmp_path_factory.mktemp("llavolta"))


@pytest.fixture
def train(workplace: Path) -> Callable[..., Path]:
    return lambda *words: run_here(workplace, *words)


def strides(folder: Path) -> list[int]:
    return [entry["compression_stride"] for entry in steps(folder)]


@pytest.mark.parametrize(
    ("scheme", "expected", "result"),
    [
        # The tiny model has two layers: 2 and 16 of 32 are scaled to 1.
        ("4stage", [8, 2, 2, 1], ("none", -1, 1)),
        ("heavy_compression", [8, 8, 8, 8], ("avgpool1d", 1, 8)),
        ("light_compression", [8, 8, 8, 8], ("avgpool1d", 1, 8)),
        ("reproduce", None, ("none", -1, 1)),
    ],
)
def test_both_stages(
    train: Callable[..., Path], scheme: str, expected: list[int] | None, result: tuple[Any, ...]
) -> None:
    first = train(f"llavolta/pretrain_{scheme}", f"{scheme}/first", "--debug")
    words = ("--debug", "--model.projector_file", f"{scheme}/first")
    second = train(f"llavolta/finetune_{scheme}", f"{scheme}/second", *words)
    assert len(steps(first)) == len(steps(second)) == 4
    if expected is None:
        assert not any("compression_stride" in entry for entry in steps(second))
    else:
        assert strides(second) == expected
    early = "compression" in scheme
    assert early == any("compression_stride" in entry for entry in steps(first))
    # The first stage reaches the second one.
    before, after = weights(first), weights(second)
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert {"projector", "language_model"} <= moved
    model, processor = load_pretrained(second)
    found = model.config.compression
    assert (found.method, found.layer, found.stride, found.schedule) == (*result, None)
    if scheme != "reproduce":
        assert {name: getattr(found, name) for name in LETTER} == LETTER
    assert processor.num_image_tokens(300, 200) == 64
    assert json.loads((second / "llava_uhd.json").read_text())["finished"]


def test_videos(train: Callable[..., Path], workplace: Path, tmp_path: Path) -> None:
    """A real file: eight frames, each compressed by itself."""
    write_video(tmp_path / "clip.mp4", frames=30, rate=10)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "bars"}]
    records = [{"id": str(i), "video": "clip.mp4", "conversations": turns} for i in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = ("--data.path", str(tmp_path / "data.json"), "--data.video_folder", str(tmp_path))
    words = ("--debug", "--trainer.max_steps", "2", *data, "--model.projector_file", "null")
    folder = train("llavolta/finetune_video_4stage", "video/file", *words)
    assert strides(folder) == [2, 1], "of four stages the last ones have the steps"
    model, processor = load_pretrained(folder)
    text = f"USER: {VIDEO_MARKER}\nWhat? ASSISTANT:"
    inputs = processor(text=text, videos=[str(tmp_path / "clip.mp4")])
    places = model.get_visual_runs(
        inputs["input_ids"], inputs["view_grids"], inputs.get("token_maps")
    )
    assert places.shape == (1, 8, 3)
    starts, lengths, columns = places[0].T.tolist()
    assert (lengths, columns) == ([64] * 8, [8] * 8)
    assert [start - starts[0] for start in starts] == [64 * i for i in range(8)]
    short = model(**inputs, compression=CompressionConfig("avgpool1d", 1, 8)).logits
    assert short.shape[1] == inputs["input_ids"].shape[1] - 8 * (64 - 8)


def test_videos_among_pictures_and_texts(train: Callable[..., Path]) -> None:
    folder = train("llavolta/finetune_video_4stage", "video/mixed", "--debug",
                   "--model.projector_file", "null")  # fmt: skip
    assert strides(folder) == [8, 2, 2, 1]
    manifest = json.loads((folder / "llava_uhd.json").read_text())
    assert manifest["data"]["samples"] == 16
