"""Recipes of LLaVA-1.5, LLaVA-OneVision and LLaVA-Video: published settings, and runs in a row."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import ROOT, run_here, weights, with_drawn_data
from safetensors.torch import load_file

from llava_uhd import inspect
from llava_uhd.bench.cost import describe
from llava_uhd.bench.output import make_console
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.shapes import KNOWN_CHECKPOINTS, describe_recipe
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.config.typed import load_yaml
from llava_uhd.data.mixture import parse_strategy
from llava_uhd.data.synthetic import embedded_split
from llava_uhd.errors import UserError
from llava_uhd.images.cost import count_parameters
from llava_uhd.images.strategies import plan_image
from llava_uhd.train.stages import part_of

RECIPES = [name for name in list_recipes() if name.startswith(("llava_1_5/", "onevision/"))]
SIZES = ("0_5b", "7b", "72b")
OV_STAGES = ("stage1", "stage1_5", "stage2_si", "stage2_ov")
EVERYTHING = {
    "vision_tower": 2e-6,
    "projector": None,
    "image_newline": None,
    "language_model": None,
}
ONE_STEP = ("--debug", "--trainer.max_steps", "1", "--trainer.save_steps", "1")
ONE_STEP += ("--trainer.warmup_steps", "0", "--trainer.learning_rate", "1e-3")


def arguments(recipe: Recipe, *names: str) -> list[Any]:
    return [recipe.trainer.arguments.get(name) for name in names]


# --- settings of LLaVA-1.5 ------------------------------------------------------------------------

# learning rate, global and per-device batch, DeepSpeed, strategy, grouped, template, saved every
V1_5: dict[str, tuple[float, int, int, str, str, bool, str, int]] = {
    "pretrain_vicuna7b": (1e-3, 256, 32, "zero2", "square", False, "plain", 24000),
    "pretrain_vicuna13b": (1e-3, 256, 32, "zero2", "square", False, "plain", 24000),
    "finetune_vicuna7b": (2e-5, 128, 16, "zero3", "pad", True, "v1", 50000),
    "finetune_vicuna13b": (2e-5, 128, 16, "zero3", "pad", True, "v1", 50000),
    "lora_vicuna7b": (2e-4, 128, 16, "zero3", "pad", True, "v1", 50000),
    "lora_vicuna13b": (2e-4, 128, 16, "zero3", "pad", True, "v1", 50000),
    "qlora_vicuna7b": (2e-5, 128, 16, "zero2", "square", False, "v1", 50000),
    "task_finetune": (2e-5, 128, 16, "zero3", "pad", True, "v1", 50000),
    "task_lora": (2e-4, 128, 16, "zero3", "pad", True, "v1", 50000),
    "pretrain_vicuna7b_unshuffle": (1e-3, 256, 32, "zero2", "square", False, "plain", 24000),
    "finetune_vicuna7b_unshuffle": (2e-5, 128, 16, "zero3", "pad", True, "v1", 50000),
}


def test_every_recipe_is_looked_at() -> None:
    expected = {f"llava_1_5/{name}" for name in V1_5} | {"onevision/video_qwen2_7b"}
    assert set(RECIPES) == expected | {
        f"onevision/{stage}_qwen2_{size}" for stage in OV_STAGES for size in SIZES
    }


@pytest.mark.parametrize("name", V1_5)
def test_settings_of_llava_1_5(name: str) -> None:
    recipe = load_recipe(f"llava_1_5/{name}")
    config = describe_recipe(recipe)
    rate, batch, per_device, deepspeed, strategy, grouped, template, saved = V1_5[name]
    assert arguments(recipe, "learning_rate", "save_steps") == [rate, saved]
    assert recipe.trainer.global_batch_size == batch
    assert recipe.trainer.batch_plan(8) == (per_device, 1)
    assert recipe.deepspeed == deepspeed
    assert recipe.trainer.group_by_modality_length is grouped
    assert (recipe.model.template, recipe.model.template_mode) == (template, "clean")
    shared = ("num_train_epochs", "weight_decay", "warmup_steps", "lr_scheduler_type", "bf16")
    assert arguments(recipe, *shared) == [1, 0, 0.03, "cosine", True]
    assert arguments(recipe, "tf32", "gradient_checkpointing", "seed") == [True, True, 42]
    assert arguments(recipe, "dataloader_num_workers", "optim") == [4, "adamw_torch"]
    assert recipe.data.max_length == 2048 and recipe.data.image_first is True
    image = config.image
    assert (image.strategy, image.layout, image.scale_resolution) == (strategy, "flat", 336)
    kind = "pixel_unshuffle_mlp" if "unshuffle" in name else "mlp2x_gelu"
    assert (config.projector.type, config.select_layer) == (kind, -2)
    adapters = (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.quantization)
    if "qlora" in name:
        assert adapters == (64, 16, 0.05, "4bit")
    elif "lora" in name:
        assert adapters == (128, 256, 0.05, None)
    else:
        assert not recipe.lora.enabled
    learn = {"projector": 2e-5 if "lora" in name and "qlora" not in name else None}
    if "pretrain" not in name:
        learn["language_model"] = None
    assert recipe.stage.learn == learn


@pytest.mark.parametrize("name", ["vicuna7b", "vicuna13b", "vicuna7b_unshuffle"])
def test_the_stages_of_llava_1_5_find_each_other(name: str) -> None:
    first = load_recipe(f"llava_1_5/pretrain_{name}")
    second = load_recipe(f"llava_1_5/finetune_{name}")
    assert second.model.projector_file == first.output_dir
    assert second.model.language_model == first.model.language_model
    if "unshuffle" not in name:
        lora = load_recipe(f"llava_1_5/lora_{name}")
        assert lora.model.projector_file == first.output_dir != lora.output_dir


def test_no_two_recipes_share_a_folder() -> None:
    folders = [load_recipe(name).output_dir for name in RECIPES]
    assert len(set(folders)) == len(folders)


# --- settings of LLaVA-OneVision ------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_settings_of_onevision(size: str) -> None:
    stages = {stage: load_recipe(f"onevision/{stage}_qwen2_{size}") for stage in OV_STAGES}
    for stage, recipe in stages.items():
        config = describe_recipe(recipe)
        assert config.vision_config.model_type == "siglip_vision_model"
        assert (config.projector.type, config.image.scale_resolution) == ("mlp2x_gelu", 384)
        assert recipe.deepspeed == "zero3" and recipe.model.template_mode == "clean"
        shared = ("num_train_epochs", "weight_decay", "warmup_steps", "lr_scheduler_type")
        assert arguments(recipe, *shared) == [1, 0, 0.03, "cosine"]
        if stage == "stage1":
            continue
        assert recipe.stage.learn == EVERYTHING
        assert arguments(recipe, "learning_rate", "save_steps", "save_total_limit") == [
            1e-5,
            1000,
            1,
        ]
        assert arguments(recipe, "dataloader_drop_last") == [True]
        assert recipe.trainer.group_by_modality_length
        assert (recipe.model.template, recipe.data.max_length) == ("qwen_1_5", 32768)
        image, video = config.image, config.video
        assert (image.strategy, image.layout, image.several) == ("anyres", "unpad", "pad")
        wide = stage != "stage1_5"
        assert image.pinpoints == ("(1x1),...,(6x6)" if wide else "(1x1),...,(2x2)")
        assert image.max_tiles == (9 if wide else None)
        assert (video.max_frames, video.pool_stride, video.pool_mode) == (32, 2, "bilinear")
        assert (video.fps, video.newline, video.force_sample) == (1, "one_token", False)
        large = 512 if (stage, size) == ("stage1_5", "0_5b") else 256
        assert recipe.trainer.global_batch_size == large
        assert recipe.trainer.batch_plan(128) == (1, large // 128)
    first = stages["stage1"]
    image = describe_recipe(first).image
    assert (image.strategy, image.layout) == ("squeeze", "flat")
    assert (first.model.template, first.data.max_length) == ("plain", 8192)
    assert first.stage.learn == {"projector": None}
    assert first.trainer.global_batch_size == 512 and first.trainer.batch_plan(32) == (16, 1)
    assert arguments(first, "learning_rate") == [1e-3]


@pytest.mark.parametrize("size", SIZES)
def test_the_stages_of_onevision_find_each_other(size: str) -> None:
    first, mid, single, last = (load_recipe(f"onevision/{each}_qwen2_{size}") for each in OV_STAGES)
    # Stage 1 has no newline yet, so the next one is put together from parts.
    assert mid.model.projector_file == first.output_dir and mid.model.checkpoint is None
    assert mid.model.language_model == first.model.language_model
    assert single.model.checkpoint == mid.output_dir
    assert last.model.checkpoint == single.output_dir
    assert not describe_recipe(first).has_newline and describe_recipe(mid).has_newline


def test_settings_of_llava_video() -> None:
    recipe = load_recipe("onevision/video_qwen2_7b")
    config = describe_recipe(recipe)
    video = config.video
    assert (video.max_frames, video.newline, video.pool_stride) == (64, "grid", 2)
    assert video.force_sample and video.time_instruction
    assert (config.image.pinpoints, config.image.max_tiles) == ("(1x1),...,(6x6)", 9)
    assert recipe.stage.learn == EVERYTHING
    assert recipe.model.checkpoint == "pretrained_models/llava-onevision-qwen2-7b-si"


def test_mixtures() -> None:
    named = {load_recipe(name).data.path for name in RECIPES}
    files = {
        f"playground/mixtures/{file.name}" for file in (ROOT / "playground/mixtures").iterdir()
    }
    assert files <= named
    for file in files:
        entries = load_yaml(ROOT / file)["datasets"]
        for entry in entries:
            assert set(entry) <= {"json_path", "sampling_strategy"}
            parse_strategy(entry.get("sampling_strategy", "all"))
        assert len({entry["json_path"] for entry in entries}) == len(entries)


# --- what a model looks like before it is there ---------------------------------------------------

# Of the published language models, by their config.json.
LANGUAGE = {"0_5b": 494_032_768, "7b": 7_615_616_512, "72b": 72_706_203_648}


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size: str) -> None:
    count = count_parameters(describe_recipe(load_recipe(f"onevision/stage2_ov_qwen2_{size}")))
    assert count.language == LANGUAGE[size]
    width = {"0_5b": 896, "7b": 3584, "72b": 8192}[size]
    assert count.projector == 1152 * width + width + width * width + width


@pytest.mark.parametrize("name", RECIPES)
def test_costs(name: str) -> None:
    options = argparse.Namespace(image=(640, 480), overview_only=False, text_tokens=0)
    config = describe_recipe(load_recipe(name))
    found = describe(make_console(), name, config, options)
    assert found["flops"]["language"] > found["flops"]["tower"] * 0.3
    plan = plan_image(config.image, 640, 480)
    lines = inspect.describe(plan, config)
    # 640 x 480 on 2 x 2 tiles, or one view.
    expected = {"onevision": 2929, "unshuffle": 144, "stage1_qwen2": 729}
    tokens = next((n for key, n in reversed(expected.items()) if key in name), 576)
    assert f"{tokens} visual" in next(line for line in lines if "tokens     " in line)


def test_a_checkpoint_that_is_here_goes_first(tmp_path: Path) -> None:
    """Its own configuration counts, not that of the recipe that makes such folders."""
    name = "llava-onevision-qwen2-7b-si"
    assert name in KNOWN_CHECKPOINTS
    config = describe_recipe(load_recipe(KNOWN_CHECKPOINTS[name]))
    config.image = dataclasses.replace(config.image, max_tiles=4)
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / name / "processor_config.json").write_text("{}")
    words = ["--model.checkpoint", str(tmp_path / name)]
    found = describe_recipe(load_recipe("onevision/stage2_ov_qwen2_7b", words))
    assert found.image.max_tiles == 4
    elsewhere = ["--model.checkpoint", str(tmp_path / "nothing")]
    with pytest.raises(UserError, match="is not here"):
        describe_recipe(load_recipe("onevision/stage2_ov_qwen2_7b", elsewhere))


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_drawn_data(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def train(workplace: Path) -> Callable[..., Path]:
    return lambda *words: run_here(workplace, *words)


def learned(folder: Path) -> set[str]:
    """Parts in the checkpoint of the only step; all where everything learned."""
    file = folder / "checkpoint-1/trainable.safetensors"
    names = load_file(file) if file.is_file() else weights(folder)
    return {part_of(name) for name in names}


def test_both_stages_of_llava_1_5(train: Callable[..., Path]) -> None:
    first = train("llava_1_5/pretrain_vicuna7b", "v1_5/first", *ONE_STEP)
    assert learned(first) == {"projector"}
    words = ("--model.projector_file", "v1_5/first")
    second = train("llava_1_5/finetune_vicuna7b", "v1_5/second", *ONE_STEP, *words)
    assert learned(second) == {"projector", "language_model"}
    model, processor = load_pretrained(second)
    assert (processor.image_config.strategy, model.config.projector.type) == ("pad", "mlp2x_gelu")
    assert processor.num_image_tokens(500, 300) == 64, "8 x 8 patches of the tiny tower"
    # The finished model goes on learning.
    task = train(
        "llava_1_5/task_finetune", "v1_5/task", *ONE_STEP, "--model.checkpoint", "v1_5/second"
    )
    before, after = weights(second), weights(task)
    assert before.keys() == after.keys()
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"projector", "language_model"}


def test_all_stages_of_onevision(train: Callable[..., Path], workplace: Path) -> None:
    def stage(name: str, *words: str) -> Path:
        return train(f"onevision/{name}_qwen2_0_5b", f"ov/{name}", *ONE_STEP, *words)

    first = stage("stage1")
    assert learned(first) == {"projector"}
    mid = stage("stage1_5", "--model.projector_file", "ov/stage1")
    assert learned(mid) == set(EVERYTHING)
    single = stage("stage2_si", "--model.checkpoint", "ov/stage1_5", "--model.image.max_tiles", "2")
    # Every record once: images, pairs, videos and texts.
    last = stage("stage2_ov", "--model.checkpoint", "ov/stage2_si", "--trainer.max_steps", "4")
    assert json.loads((last / "llava_uhd.json").read_text())["data"]["samples"] == 16
    before, after = weights(mid), weights(last)
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(EVERYTHING), "the newline too"
    model, processor = load_pretrained(last)
    image, video = processor.image_config, processor.video_config
    assert (image.strategy, image.layout, image.several, image.max_tiles) == (
        *("anyres", "unpad", "pad"),
        2,
    )
    assert (video.max_frames, video.pool_stride, video.newline) == (3, 2, "one_token")
    assert model.config.vision_config.model_type == "siglip_vision_model"
    # A view of 62 pixels has 7 patches of 8 a side and a rest; 14 x 14 shrink to 9 x 9.
    assert processor.num_image_tokens(124, 124) == 49 + 9 * 10
    assert processor.num_image_tokens(124, 124, several=True) == 50
    assert processor.num_video_tokens(3, 124, 124) == 3 * 16 + 1
    assert json.loads((single / "llava_uhd.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("recipe", "checkpoint", "parts"),
    [
        ("llava_1_5/task_finetune", "llava_1_5", {"projector", "language_model"}),
        ("onevision/stage2_ov_qwen2_7b", "llava_onevision", set(EVERYTHING)),
    ],
)
def test_published_checkpoints_go_on(
    recipe: str, checkpoint: str, parts: set[str], train: Callable[..., Path], golden: Path
) -> None:
    source = golden / checkpoint / "model/checkpoint"
    words = ("--model.checkpoint", str(source), "--data.embedded", "debug")
    folder = train(recipe, f"published/{checkpoint}", *ONE_STEP, *words)
    model, processor = load_pretrained(folder)
    before = load_pretrained(source)[0].state_dict()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert {part_of(n) for n in before if not torch.equal(before[n], after[n])} == parts
    strategy = "pad" if checkpoint == "llava_1_5" else "anyres"
    assert processor.image_config.strategy == strategy


def test_what_a_model_does_not_have_cannot_learn(train: Callable[..., Path]) -> None:
    for words, message in (
        (("--stage.learn.image_newline", "true"), "the layout flat has no learned newline"),
        (("--model.projector.type", "identity"), r"no weights there \(projector identity\)"),
    ):
        with pytest.raises(UserError, match=message):
            train("llava_1_5/pretrain_vicuna7b", "none", *ONE_STEP, *words)
    flat = train("llava_1_5/finetune_vicuna7b", "flat", *ONE_STEP)
    words = ("--model.checkpoint", str(flat), "--model.image.layout", "unpad")
    with pytest.raises(UserError, match="only 'unpad' has a learned newline"):
        train("llava_1_5/task_finetune", "none", *ONE_STEP, *words)


def test_the_embedded_records_are_of_every_kind(workplace: Path) -> None:
    split = embedded_split("debug_mixed", "finetune", workplace / "playground/data")
    records = json.loads(split.file.read_text())
    assert [set(record) - {"id", "conversations"} for record in records[:4]] == [
        {"image"},
        {"image"},
        {"video"},
        set(),
    ]
    assert len(records[1]["image"]) == 2 and split.video_folder is not None
    frames = sorted((split.video_folder / records[2]["video"]).iterdir())
    assert len(frames) == 5
    for record in records:
        given = record.get("image", [])
        for image in [given] if isinstance(given, str) else given:
            assert (split.image_folder / image).is_file()


def test_videos_with_the_time_told(train: Callable[..., Path]) -> None:
    folder = train("onevision/video_qwen2_7b", "ov/video", *ONE_STEP)
    _, processor = load_pretrained(folder)
    video = processor.video_config
    assert video.time_instruction and video.force_sample and video.newline == "grid"
    assert processor.num_video_tokens(3, 124, 124) == 3 * 4 * 5
