"""Flags of LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and LLaVA-Video on views, tiles and videos.

Whole commands: `test_commands_llava`.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.images.anyres import expand_pinpoints

CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"


def load(recipe: str, command: str) -> Recipe:
    return load_recipe(recipe, shlex.split(command))


def image_of(recipe: str, words: str) -> tuple[str, str, int | None, int]:
    image = load(recipe, words).model.image
    return image.strategy, image.layout, image.max_tiles, image.scale_resolution


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        (
            "llava_1_5/finetune_vicuna7b",
            "--image_aspect_ratio square",
            ("square", "flat", None, 336),
        ),
        (
            "onevision/stage1_qwen2_7b",
            "--image_aspect_ratio square",
            ("squeeze", "flat", None, 384),
        ),
        ("onevision/stage1_qwen2_7b", "--image_aspect_ratio pad", ("pad", "flat", None, 384)),
        (
            "llava_1_5/finetune_vicuna7b",
            "--image_aspect_ratio anyres --image_grid_pinpoints (1x1),...,(2x2)"
            " --mm_patch_merge_type spatial_unpad",
            ("anyres", "unpad", None, 336),
        ),
        (
            "llava_1_5/finetune_vicuna7b",
            "--image_grid_pinpoints (1x1),...,(3x3) --image_aspect_ratio anyres_max_4"
            " --mm_patch_merge_type spatial",
            ("anyres", "spatial", 4, 336),
        ),
        (
            "llava_1_5/pretrain_vicuna7b",
            f"--vision_tower {SIGLIP}",
            ("squeeze", "flat", None, 384),
        ),
        ("llava_1_5/finetune_vicuna7b", f"--vision_tower {SIGLIP}", ("pad", "flat", None, 384)),
        (
            "llava_1_5/finetune_vicuna7b",
            f"--image_aspect_ratio square --vision_tower {SIGLIP}",
            ("squeeze", "flat", None, 384),
        ),
        (
            "onevision/stage1_qwen2_7b",
            f"--image_aspect_ratio square --vision_tower {CLIP}",
            ("square", "flat", None, 336),
        ),
        (
            "onevision/stage1_5_qwen2_7b",
            "--image_aspect_ratio anyres_max_4",
            ("anyres", "unpad", 4, 384),
        ),
        # Slices keep their own plan, layout and side.
        (
            "uhd_v1/finetune_vicuna7b",
            "--image_aspect_ratio pad --mm_patch_merge_type spatial_unpad"
            " --image_grid_pinpoints (1x1),...,(6x6)",
            ("slices", "slices", None, 336),
        ),
    ],
)
def test_views(recipe: str, words: str, expected: tuple[str, str, int | None, int]) -> None:
    assert image_of(recipe, words) == expected
    flags = [f"--{each}" for each in words.removeprefix("--").split(" --")]
    assert image_of(recipe, " ".join(reversed(flags))) == expected, "in another order"


def test_pinpoints_as_published_texts() -> None:
    words = '--image_grid_pinpoints "[(336, 672), (672, 336)]" --image_aspect_ratio anyres'
    image = load("llava_1_5/finetune_vicuna7b", words).model.image
    assert expand_pinpoints(image.pinpoints, 336) == ((336, 672), (672, 336))
    assert image.several == "pad"
    lists = load("onevision/stage1_5_qwen2_7b", "--image_grid_pinpoints [[384,768],[768,384]]")
    assert lists.model.image.pinpoints == ((384, 768), (768, 384))


def test_videos() -> None:
    words = (
        "--video_folder films --video_fps 2 --frames_upbound 8 --force_sample True"
        " --add_time_instruction True --mm_newline_position frame --mm_spatial_pool_mode average"
        " --mm_spatial_pool_stride 3"
    )
    recipe = load("onevision/stage1_5_qwen2_7b", words)
    video = recipe.model.video
    assert recipe.data.video_folder == "films"
    assert (video.fps, video.max_frames, video.force_sample) == (2, 8, True)
    assert (video.time_instruction, video.newline) == (True, "frame")
    assert (video.pool_mode, video.pool_stride) == ("average", 3)
    sliced = load("uhd_v2/finetune_vicuna13b", words)
    assert sliced.data.video_folder == "films" and sliced.model.video.max_frames == 8
    assert (sliced.model.video.pool_stride, sliced.model.video.newline) == (1, "one_token")


PARTS = "--mm_tunable_parts=mm_mlp_adapter,mm_language_model"


@pytest.mark.parametrize(
    ("recipe", "words", "learns"),
    [
        ("onevision/stage1_5_qwen2_7b", PARTS, True),
        ("onevision/stage1_5_qwen2_7b", "--mm_tunable_parts=mm_mlp_adapter", False),
        ("onevision/stage1_5_qwen2_7b", "--freeze_backbone True", False),
        ("onevision/stage1_5_qwen2_7b", "--mm_patch_merge_type flat", False),
        ("onevision/stage1_5_qwen2_7b", f"--mm_patch_merge_type flat {PARTS}", False),
        ("onevision/stage1_5_qwen2_7b", "--tune_mm_mlp_adapter True", False),
        ("llava_1_5/finetune_vicuna7b", "--mm_patch_merge_type spatial_unpad", True),
        ("llava_1_5/finetune_vicuna7b", f"--mm_patch_merge_type spatial_unpad {PARTS}", True),
        (
            "llava_1_5/finetune_vicuna7b",
            "--mm_patch_merge_type spatial_unpad --freeze_backbone True",
            False,
        ),
        ("llava_1_5/pretrain_vicuna7b", "--mm_patch_merge_type spatial_unpad", False),
        (
            "llava_1_5/pretrain_vicuna7b",
            "--mm_patch_merge_type spatial_unpad --unfreeze_language_model True",
            True,
        ),
        ("onevision/stage2_ov_qwen2_7b", PARTS, True),
        ("onevision/stage2_ov_qwen2_7b", "--mm_tunable_parts=mm_vision_tower", False),
        ("uhd_v2/finetune_vicuna13b", f"--mm_patch_merge_type spatial_unpad {PARTS}", False),
    ],
)
def test_the_newline_learns_with_the_language_model(recipe: str, words: str, learns: bool) -> None:
    for given in (words, " ".join(f"--{each}" for each in reversed(words[2:].split(" --")))):
        assert ("image_newline" in load(recipe, given).stage.learn) is learns, given


def test_rates_of_parts() -> None:
    words = f"{PARTS},mm_vision_tower --mm_vision_tower_lr 3e-6 --mm_projector_lr 1e-4"
    assert load("onevision/stage1_5_qwen2_7b", words).stage.learn == {
        "vision_tower": 3e-6,
        "projector": 1e-4,
        "language_model": None,
        "image_newline": None,
    }


def test_what_is_a_whole_model(tmp_path: Path) -> None:
    def kind(name: Any) -> tuple[Any, Any]:
        words = ["--model_name_or_path", str(name)]
        model = load_recipe("llava_1_5/finetune_vicuna7b", words).model
        return model.checkpoint, model.language_model

    for name in ("liuhaotian/llava-v1.6-34b", "checkpoints/llava-onevision-qwen2-7b-si/"):
        assert kind(name) == (name, None)
    for name in ("lmsys/vicuna-7b-v1.5", "checkpoints-llava/vicuna"):
        assert kind(name) == (None, name)
    for config, whole in (
        ({"model_type": "llama"}, False),
        ({"model_type": "llava_uhd"}, True),
        ({"model_type": "qwen2", "mm_vision_tower": "x"}, True),
    ):
        folder = tmp_path / f"llava-{len(config)}-{whole}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        assert kind(folder) == ((str(folder), None) if whole else (None, str(folder)))


def test_a_checkpoint_keeps_its_tower(caplog: pytest.LogCaptureFixture) -> None:
    recipe = load("onevision/stage2_ov_qwen2_7b", f"--vision_tower {SIGLIP}")
    assert recipe.model.vision_tower is None
    assert "the checkpoint brings its vision tower" in caplog.text
    given = load("onevision/stage2_ov_qwen2_7b", f"--model.vision_tower {SIGLIP}")
    assert given.model.vision_tower == SIGLIP


def test_a_tower_that_is_here_is_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "eyes"
    folder.mkdir()
    config = {"model_type": "siglip", "vision_config": {"image_size": 224}}
    (folder / "config.json").write_text(json.dumps(config))
    image = load("llava_1_5/pretrain_vicuna7b", f"--vision_tower {folder}").model.image
    assert (image.strategy, image.scale_resolution) == ("squeeze", 224)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_projectors_of_llava(kind: str) -> None:
    same = load("llava_1_5/finetune_vicuna7b", f"--mm_projector_type {kind}")
    assert same.model.projector.type == kind
    assert same.output_dir == load_recipe("llava_1_5/finetune_vicuna7b").output_dir
    stages = [
        load(f"uhd_v2/{each}_vicuna7b", f"--mm_projector_type {kind}")
        for each in ("pretrain", "finetune")
    ]
    for recipe in stages:
        image = recipe.model.image
        assert (image.strategy, image.layout) == ("square", "flat")
        assert recipe.model.projector.type == kind and recipe.model.upsampler_file is None
        assert "upsampler_fixup" not in recipe.stage.learn and not recipe.data.overview_only
    assert stages[1].model.projector_file == stages[0].output_dir
    assert stages[1].output_dir.endswith("-llava")


@pytest.mark.parametrize("recipe", ["llava_1_5/finetune_vicuna7b", "onevision/stage1_5_qwen2_7b"])
@pytest.mark.parametrize(
    ("words", "projector", "layout"),
    [
        ("--model_mode uhd_v2", "hiwin", "slices"),
        ("--feature_mode uhd_v1 --image_aspect_ratio pad", "spatial_resampler", "rows"),
        ("--mm_projector_type adapt_spatial_resampler_v1", "spatial_resampler", "slices"),
    ],
)
def test_llava_becomes_llava_uhd(recipe: str, words: str, projector: str, layout: str) -> None:
    read = load(recipe, words)
    assert (read.model.projector.type, read.model.image.layout) == (projector, layout)
    assert read.model.image.strategy == "slices" and read.model.image.several == "same"
    assert "image_newline" not in read.stage.learn
    assert read.output_dir != load_recipe(recipe).output_dir


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--image_aspect_ratio highres", "only square, pad, anyres and anyres_max_N"),
        ("--image_aspect_ratio anyres_max_0", "N at least 1"),
        ("--image_aspect_ratio anyres_max_9", "needs --image_grid_pinpoints"),
        ("--mm_patch_merge_type spatial_unpad_nobase", "only flat, spatial, spatial_unpad exist"),
        ("--mm_patch_merge_type maxpool2x2", "only flat, spatial, spatial_unpad exist"),
        ("--mm_newline_position everywhere", "model.video.newline must be one_token or grid"),
        ("--mm_spatial_pool_mode median", "model.video.pool_mode must be bilinear or average"),
        ("--mm_projector_type mlp2x_res2x_gelu", "linear, identity and mlp1x_gelu to mlp8x_gelu"),
        ("--mm_projector_type pooler", "linear, identity and mlp1x_gelu to mlp8x_gelu"),
        ("--image_crop_resolution 224", "crop_split and highres, which do not exist"),
        ("--image_split_resolution 224", "crop_split and highres, which do not exist"),
        ("--add_faster_video True", "leave it False"),
        ("--early_mix_text True", "use --group_by_length True instead"),
        ("--group_by_varlen True", "use --group_by_modality_length True"),
        ("--mm_use_im_start_end True", "leave it False"),
        ("--s2 True", "leave it False"),
        ("--mm_vision_select_feature cls_patch", "only 'patch' exists"),
        ("--use_pos_skipping True", "leave it False"),
        ("--rope_scaling_factor 2", "config.json"),
    ],
)
def test_what_does_not_exist_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load("llava_1_5/finetune_vicuna7b", words)
    assert "\n" not in str(caught.value)
