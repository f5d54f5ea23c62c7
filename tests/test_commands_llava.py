"""The published commands of LLaVA-1.5, LLaVA-OneVision and LLaVA-Video, and their flags one by one.

Rebuilt from their descriptions. Each command is read over its own recipe, which it must not change,
and over a recipe of another system, which it must turn into the same run.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.images.anyres import expand_pinpoints

CLIP, SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"

COMMON = """
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4 --evaluation_strategy "no"
    --save_strategy "steps" --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --gradient_checkpointing True --lazy_preprocess True
    --report_to wandb
"""
# --- LLaVA-1.5 ------------------------------------------------------------------------------------
V1_5 = f"""{COMMON} --vision_tower {CLIP} --mm_projector_type mlp2x_gelu --model_max_length 2048
    --dataloader_num_workers 4 --save_total_limit 1
"""
V1_5_PRETRAIN = f"""{V1_5} --deepspeed ./scripts/zero2.json --version plain
    --model_name_or_path lmsys/vicuna-7b-v1.5 --tune_mm_mlp_adapter True
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images
    --output_dir ./checkpoints/llava-v1.5-7b-pretrain --per_device_train_batch_size 32
    --gradient_accumulation_steps 1 --save_steps 24000 --learning_rate 1e-3
"""
INSTRUCT = f"""{V1_5} --version v1 --image_aspect_ratio pad --group_by_modality_length True
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
    --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --save_steps 50000
    --deepspeed ./scripts/zero3.json
"""
PROJECTOR = "--pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin"
VICUNA = f"--model_name_or_path lmsys/vicuna-7b-v1.5 {PROJECTOR}"
WHOLE = "--model_name_or_path liuhaotian/llava-v1.5-7b"
LORA = """--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5
    --learning_rate 2e-4"""
# The two older scripts, whose model is the first LLaVA: a 224 pixel tower and one linear layer.
OLDER = f"""{COMMON} --vision_tower openai/clip-vit-large-patch14 --mm_projector_type linear
    --model_max_length 2048 --dataloader_num_workers 4 --save_total_limit 1
    --per_device_train_batch_size 16 --gradient_accumulation_steps 1
"""
QLORA = f"""{OLDER} --deepspeed ./scripts/zero2.json --lora_enable True --bits 4 --version v1
    --model_name_or_path ./checkpoints/vicuna-v1-3-7b {PROJECTOR}
    --data_path ./playground/data/llava_instruct_80k.json --image_folder coco/train2017
    --output_dir ./checkpoints/llava-finetune_lora --save_steps 50000 --learning_rate 2e-5
"""
# Further options that the published program declares, at their defaults.
DECLARED = """
    --freeze_backbone False --is_multimodal True --freeze_mm_mlp_adapter False --optim adamw_torch
    --remove_unused_columns False --mpt_attn_impl triton --double_quant True --quant_type nf4
    --bits 16 --lora_weight_path "" --mm_patch_merge_type flat --mm_vision_select_feature patch
"""

# --- LLaVA-OneVision ------------------------------------------------------------------------------
NEXT = f"""{COMMON} --deepspeed scripts/zero3.json --vision_tower {SIGLIP}
    --mm_projector_type mlp2x_gelu --run_name a_name
"""
OV_STAGE1 = f"""{NEXT} --model_name_or_path Qwen/Qwen2-7B-Instruct --version plain
    --mm_tunable_parts="mm_mlp_adapter" --model_max_length 8192 --dataloader_num_workers 16
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images --per_device_train_batch_size 16
    --gradient_accumulation_steps 1 --save_steps 50000 --learning_rate 1e-3
    --output_dir checkpoints/projectors/a_name --attn_implementation sdpa
"""
OV = f"""{NEXT} --version qwen_1_5 --image_folder playground/data --video_folder playground/data
    --mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model"
    --mm_vision_tower_lr=2e-6 --group_by_modality_length True --image_aspect_ratio anyres_max_9
    --image_grid_pinpoints "(1x1),...,(6x6)" --mm_patch_merge_type spatial_unpad
    --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --save_total_limit 1
    --learning_rate 1e-5 --model_max_length 32768 --dataloader_num_workers 4
    --torch_compile True --torch_compile_backend "inductor" --dataloader_drop_last True
"""
OV_SI = f"""{OV} --data_path playground/mixtures/onevision_single_image.yaml --save_steps 1000
    --model_name_or_path checkpoints/llava-onevision-qwen2-7b-stage1_5 --frames_upbound 32
    --output_dir checkpoints/llava-onevision-qwen2-7b-si
"""
OV_OV = f"""{OV} --data_path playground/mixtures/onevision.yaml --save_steps 1000
    --model_name_or_path checkpoints/llava-onevision-qwen2-7b-si --frames_upbound 32
    --output_dir checkpoints/llava-onevision-qwen2-7b-ov
"""
VIDEO = f"""{OV} --data_path playground/mixtures/onevision.yaml --save_steps 1000
    --model_name_or_path lmms-lab/llava-onevision-qwen2-7b-si --output_dir ./work_dirs/a_name
    --frames_upbound 64 --mm_newline_position grid --add_time_instruction True
    --force_sample True --mm_spatial_pool_stride 2
"""

COMMANDS: dict[str, tuple[str, str]] = {
    "v1_5 pretrain": ("llava_1_5/pretrain_vicuna7b", V1_5_PRETRAIN),
    "v1_5 finetune": (
        "llava_1_5/finetune_vicuna7b",
        f"{INSTRUCT} {VICUNA} --learning_rate 2e-5 --output_dir ./checkpoints/llava-v1.5-7b",
    ),
    "v1_5 lora": (
        "llava_1_5/lora_vicuna7b",
        f"{INSTRUCT} {VICUNA} {LORA} --output_dir ./checkpoints/llava-v1.5-7b-lora",
    ),
    "v1_5 task": (
        "llava_1_5/task_finetune",
        f"{INSTRUCT} {WHOLE} --learning_rate 2e-5 --output_dir ./checkpoints/llava-v1.5-7b-task",
    ),
    "v1_5 task lora": (
        "llava_1_5/task_lora",
        f"{INSTRUCT} {WHOLE} {LORA} --output_dir ./checkpoints/llava-v1.5-7b-task-lora",
    ),
    "onevision stage 1": ("onevision/stage1_qwen2_7b", OV_STAGE1),
    "onevision single images": ("onevision/stage2_si_qwen2_7b", OV_SI),
    "onevision": ("onevision/stage2_ov_qwen2_7b", OV_OV),
    "llava video": ("onevision/video_qwen2_7b", VIDEO),
}


def load(recipe: str, command: str) -> Recipe:
    return load_recipe(recipe, shlex.split(command))


def essence(recipe: Recipe) -> dict[str, Any]:
    """What a run is, without places of files and without what a command adds to a recipe."""
    values = recipe.to_dict()
    config = describe_recipe(recipe)
    trainer = values["trainer"]
    for name in (
        *("output_dir", "report_to", "run_name", "per_device_eval_batch_size", "optim", "seed"),
        *("torch_compile", "torch_compile_backend", "remove_unused_columns", "save_total_limit"),
        "eval_strategy",  # nothing is held out in these runs
        *("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
    ):
        trainer.pop(name, None)
    return {
        "model": config.to_dict(),
        "pinpoints": expand_or_none(config.image.pinpoints, config.image.scale_resolution),
        "template": (recipe.model.template, recipe.model.template_mode),
        "checkpoint": recipe.model.checkpoint is not None,
        "projector_file": recipe.model.projector_file is not None,
        "learn": recipe.stage.learn,
        "data": {name: value for name, value in values["data"].items() if "folder" not in name},
        "trainer": {name: value for name, value in trainer.items() if value is not None},
        "lora": values["lora"],
        "deepspeed": recipe.deepspeed,
    }


def expand_or_none(pinpoints: Any, tile: int) -> Any:
    return None if pinpoints is None else expand_pinpoints(pinpoints, tile)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Paths without their leading ``./``, so that two ways to write one are the same."""
    data = dict(values["data"])
    data["path"] = str(Path(data["path"]))
    return {**values, "data": data}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_published_command_is_its_recipe(name: str) -> None:
    recipe, command = COMMANDS[name]
    own, read = plain(essence(load_recipe(recipe))), plain(essence(load(recipe, command)))
    for part, value in own.items():
        if part == "trainer" and name == "onevision stage 1":
            value = value | {"save_steps": 50000}  # longer than the run in both
        assert read[part] == value, part


@pytest.mark.parametrize("name", COMMANDS)
def test_the_batches_are_published(name: str) -> None:
    recipe, command = COMMANDS[name]
    devices = 8 if "llava_1_5" in recipe else 128
    ours, theirs = (
        each.trainer.batch_plan(devices) for each in (load_recipe(recipe), load(recipe, command))
    )
    if "stage1" in recipe:  # the paper's 512 over 128 devices; the script says 16 a device
        assert (ours, theirs) == ((4, 1), (16, 1))
    else:
        assert ours == theirs


# The same over recipes of another system: what the commands do not say, these recipes do.
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("other", ["uhd_v1/{}_vicuna7b", "uhd_v2/{}_vicuna7b"])
def test_the_command_says_it_all(name: str, other: str) -> None:
    recipe, command = COMMANDS[name]
    stage = "pretrain" if "stage1" in recipe or "pretrain" in recipe else "finetune"
    own, read = (
        plain(essence(each)) for each in (load_recipe(recipe), load(other.format(stage), command))
    )
    for part in ("template", "checkpoint", "lora", "deepspeed"):
        assert read[part] == own[part], part
    learn = dict(read["learn"])
    if "uhd_v2" in other and "tunable" not in command and stage == "finetune":
        assert learn.pop("vision_tower") is None  # of that recipe: no flag of LLaVA-1.5 takes it
    assert learn == own["learn"]
    image, wanted = read["model"]["image"], own["model"]["image"]
    for key in ("strategy", "layout", "scale_resolution", "max_tiles"):
        assert image[key] == wanted[key], key
    assert read["pinpoints"] == own["pinpoints"]
    assert read["model"]["projector"]["type"] == "mlp2x_gelu"
    assert read["model"]["projector"]["scales"] == [1]
    assert read["model"]["vision_config"] == own["model"]["vision_config"]
    for key in ("overview_only", "textvqa_long_side", "six_slice_probability", "max_length"):
        assert read["data"][key] == own["data"][key], key


def test_everything_declared_is_understood() -> None:
    recipe, command = COMMANDS["v1_5 finetune"]
    assert essence(load(recipe, command + DECLARED)) == essence(load(recipe, command))


def test_the_older_scripts() -> None:
    recipe = load("llava_1_5/qlora_vicuna7b", QLORA)
    image, lora = recipe.model.image, recipe.lora
    assert (image.strategy, image.layout, image.scale_resolution) == ("square", "flat", 224)
    assert recipe.model.projector.type == "linear"
    assert (lora.r, lora.alpha, lora.dropout, lora.quantization) == (64, 16, 0.05, "4bit")
    assert recipe.stage.learn == {"projector": None, "language_model": None}
    assert recipe.deepspeed == "zero2" and not recipe.trainer.group_by_modality_length
    assert recipe.trainer.arguments["learning_rate"] == 2e-5
    # The recipe has the same rates and adapters, on the parts of LLaVA-1.5.
    ours = load_recipe("llava_1_5/qlora_vicuna7b")
    assert dataclasses.asdict(ours.lora) == dataclasses.asdict(lora)
    assert ours.trainer.arguments["learning_rate"] == 2e-5
    first = load(
        "llava_1_5/pretrain_vicuna7b",
        f"{OLDER} --deepspeed /path/to/deepspeed.json --tune_mm_mlp_adapter True --version plain"
        " --model_name_or_path ./checkpoints/vicuna-v1-3-7b --learning_rate 2e-3"
        " --data_path a.json --image_folder b --output_dir c --save_steps 24000",
    )
    assert first.model.image.scale_resolution == 224
    assert first.stage.learn == {"projector": None}
    assert first.trainer.batch_plan(8) == (16, 1)
