from __future__ import annotations

import shlex

import pytest

from llava_uhd.config.aliases import ALIASES
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import recipe_keys, training_argument_types

PRETRAIN, FINETUNE = "uhd_v1/pretrain_vicuna13b", "uhd_v1/finetune_vicuna13b"

# The published commands of LLaVA-UHD v1, rebuilt from its description; LLaVA 1.5 lacks --single.
COMMON = """
    --deepspeed ./scripts/zero2.json --model_name_or_path ./pretrained_models/vicuna-13b-v1.5
    --vision_tower ./pretrained_models/clip-vit-large-patch14-336
    --mm_projector_type adapt_spatial_resampler --mm_vision_select_layer -2
    --mm_vision_select_feature patch --mm_patch_merge_type flat
    --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
    --output_dir ./checkpoints_new/llava-uhd-144-13b --num_train_epochs 1
    --per_device_eval_batch_size 4 --evaluation_strategy "no" --save_strategy "steps"
    --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""
PUBLISHED_PRETRAIN = f"""{COMMON} --version plain --single True --tune_mm_mlp_adapter True
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images --learning_rate 1e-3
    --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --save_steps 24000
"""
PUBLISHED_FINETUNE = f"""{COMMON} --version v1 --image_aspect_ratio pad
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
    --pretrain_mm_mlp_adapter ./checkpoints_new/llava-uhd-144-13b/mm_projector.bin
    --group_by_modality_length True --learning_rate 2e-5
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --save_steps 50000
"""
# Every further option that the published program declares, at its default.
DECLARED = """
    --freeze_backbone False --is_multimodal False --freeze_mm_mlp_adapter False --optim adamw_torch
    --remove_unused_columns False --mpt_attn_impl triton --double_quant True --quant_type nf4
    --bits 16 --lora_enable False --lora_r 64 --lora_alpha 16 --lora_dropout 0.05
    --lora_weight_path "" --lora_bias none --cache_dir none --local_rank=0
"""


def test_published_pretrain_command() -> None:
    recipe = load_recipe(FINETUNE, shlex.split(PUBLISHED_PRETRAIN + DECLARED))
    assert recipe.model.language_model == "./pretrained_models/vicuna-13b-v1.5"
    assert recipe.model.vision_tower == "./pretrained_models/clip-vit-large-patch14-336"
    assert (recipe.model.projector.type, recipe.model.projector.num_queries) == (
        "spatial_resampler",
        144,
    )
    assert (recipe.model.template, recipe.model.select_layer) == ("plain", -2)
    assert recipe.data.path == "./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    assert recipe.data.image_folder == "./playground/data/LLaVA-Pretrain/images"
    assert (recipe.data.overview_only, recipe.data.max_length) == (True, 2048)
    assert recipe.stage.learn == {"projector": None}
    assert recipe.deepspeed == "zero2"
    assert recipe.output_dir == "./checkpoints_new/llava-uhd-144-13b"
    assert recipe.trainer.batch_plan(8) == (32, 1)
    wanted = {
        "learning_rate": 1e-3,
        "warmup_steps": 0.03,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 24000,
        "save_total_limit": 1,
        "weight_decay": 0.0,
        "num_train_epochs": 1,
        "per_device_eval_batch_size": 4,
        "bf16": True,
        "tf32": True,
        "gradient_checkpointing": True,
        "dataloader_num_workers": 4,
        "logging_steps": 1,
        "report_to": "wandb",
        "optim": "adamw_torch",
        "remove_unused_columns": False,
    }
    got = recipe.trainer.arguments
    assert {name: got.get(name) for name in wanted} == wanted


def test_published_finetune_command(caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(PRETRAIN, shlex.split(PUBLISHED_FINETUNE))
    assert recipe.model.projector_file == "./checkpoints_new/llava-uhd-144-13b/mm_projector.bin"
    assert recipe.model.template == "v1"
    assert recipe.model.image.strategy == "slices"
    assert recipe.trainer.group_by_modality_length is True
    assert recipe.trainer.arguments["learning_rate"] == 2e-5
    assert recipe.trainer.batch_plan(8) == (4, 4)
    assert recipe.trainer.batch_plan(4) == (4, 4), "without a global batch the product rules"
    told = [record.message for record in caplog.records if "image_aspect_ratio" in record.message]
    assert len(told) == 1 and "no effect" in told[0]


def test_projector_rate_survives_the_order_of_flags() -> None:
    rate, only = "--mm_projector_lr 3e-5", "--tune_mm_mlp_adapter True"
    for words in (f"{rate} {only}", f"{only} {rate}"):
        assert load_recipe(FINETUNE, words.split()).stage.learn == {"projector": 3e-5}
    recipe = load_recipe(FINETUNE, "--mm_projector_lr 3e-5 --freeze_backbone True".split())
    assert recipe.stage.learn == {"projector": 3e-5}


def test_alias_table_points_at_real_keys() -> None:
    known = set(recipe_keys())
    for name in ALIASES:
        alias = ALIASES.get(name)
        assert sum(part is not None for part in (alias.key, alias.translate, alias.inert)) == 1
        assert alias.key is None or alias.key in known, name
    assert not {"output_dir", "deepspeed"} & set(training_argument_types())
