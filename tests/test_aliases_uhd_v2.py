"""The published commands of LLaVA-UHD v2, rebuilt from its description, in both dialects."""

from __future__ import annotations

import shlex

import pytest

from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe

COMMON = """
    --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4 --evaluation_strategy "no"
    --save_strategy "steps" --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True --report_to wandb --mm_vision_select_layer -2
    --mm_vision_select_feature patch --mm_use_im_start_end False --mm_use_im_patch_token False
"""
OLD = f"""{COMMON}
    --deepspeed ./scripts/zero2.json --model_name_or_path ./pretrained_models/vicuna-7b-v1.5
    --vision_tower ./pretrained_models/clip-vit-large-patch14-336
    --mm_projector_type adapt_spatial_resampler --feature_mode featup_muti_res
    --jbu_ckpt ./pretrained_models/clip-large-vdim.ckpt --mm_patch_merge_type flat
"""
OLD_PRETRAIN = f"""{OLD} --version plain --single True --tune_mm_mlp_adapter True
    --sft_encoder False --feature_scale_mask 7
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images --learning_rate 1e-3
    --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --save_steps 24000
    --save_total_limit 1 --model_max_length 3072 --output_dir ./checkpoints_new/v2-7b-pretrain
"""
OLD_FINETUNE = f"""{OLD} --version v1 --image_aspect_ratio pad --sft_encoder True
    --data_path ./playground/data/llava-uhd-v2-sft-data.json --image_folder ./playground/data
    --pretrain_mm_mlp_adapter ./checkpoints_new/v2-7b-pretrain/mm_projector.bin
    --group_by_modality_length True --learning_rate 2e-5 --per_device_train_batch_size 8
    --gradient_accumulation_steps 2 --save_steps 100 --save_total_limit 1
    --model_max_length 4096 --output_dir ./checkpoints_new/v2-7b
"""
# The v2 dialect, with the options of LLaVA-NeXT that its scripts carry.
NEXT = f"""{COMMON}
    --deepspeed ./scripts/zero2_old.json --model_mode uhd_v2 --feature_scale_mask 5
    --vision_tower ./pretrained_models/clip-vit-large-patch14-336
    --mm_projector_type adapt_spatial_resampler_v2
    --vdim_ckpt ./pretrained_models/clip-large-vdim.ckpt --model_max_length 4096
    --image_grid_pinpoints "[(336, 672), (672, 336), (672, 672)]" --mm_spatial_pool_stride 2
    --mm_spatial_pool_mode bilinear --mm_spatial_pool_out_channels 1024
    --mm_patch_merge_type spatial_unpad --mm_resampler_type null --mm_newline_position one_token
    --run_name v2
"""
NEXT_PRETRAIN = f"""{NEXT} --single True --mm_tunable_parts mm_mlp_adapter --sft_vdim False
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images --learning_rate 1e-3
    --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --save_steps 24000
    --save_total_limit 1 --dataloader_drop_last True --attn_implementation flash_attention_2
"""
NEXT_FINETUNE = f"""{NEXT} --image_aspect_ratio anyres --sft_vdim True
    --mm_tunable_parts "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    --data_path ./playground/data/llava-uhd-v2-sft-data.json --image_folder ./playground/data
    --pretrain_mm_mlp_adapter ./checkpoints/projectors/mm_projector.bin
    --group_by_modality_length True --learning_rate 2e-5 --per_device_train_batch_size 4
    --gradient_accumulation_steps 4 --save_steps 500 --save_total_limit 2 --torch_compile True
    --torch_compile_backend inductor
"""
QWEN = "--model_name_or_path ./pretrained_models/Qwen2-7B-Instruct --version qwen_1_5"
VICUNA = "--model_name_or_path ./pretrained_models/vicuna-13b-v1.5 --version"
# Options of the published argument classes at their defaults.
DECLARED = """
    --freeze_backbone False --unfreeze_mm_vision_tower False --tune_mm_vision_resampler False
    --mm_vision_tower_lr null --mm_projector_lr null --vision_tower_pretrained "" --delay_load True
    --image_crop_resolution null --image_split_resolution null --video_folder null --video_fps 1
    --frames_upbound 0 --add_time_instruction False --force_sample False --early_mix_text False
    --add_faster_video False --faster_token_stride 10 --model_class_name null
    --use_pos_skipping False --rope_scaling_factor null --verbose_logging False
    --unfreeze_language_model False --mm_mask_drop_mode fixed --mm_mask_drop_skip_percentage 0.
    --mm_mask_drop_ratio 0.25 --mm_mask_drop_ratio_upper null --mm_mask_drop_ratio_lower null
    --mm_perceiver_depth 3 --mm_perceiver_latents 32 --mm_perceiver_ff_mult 4
    --mm_perceiver_pretrained null --mm_qformer_depth 3 --mm_qformer_latents 32
    --mm_qformer_pretrained null --rope_scaling_type null --s2 False --s2_scales 336,672,1008
    --pos_skipping_range 4096 --group_by_varlen False --group_by_modality_length_auto False
    --fted_encoder True --bits 16 --lora_enable False
"""


def load(recipe: str, command: str) -> Recipe:
    return load_recipe(recipe, shlex.split(command))


def check_model(recipe: Recipe, scales: tuple[int, ...], layout: str) -> None:
    model = recipe.model
    assert (model.projector.type, model.projector.num_queries) == ("hiwin", 144)
    assert (model.projector.scales, model.image.layout) == (scales, layout)
    assert model.upsampler_file == "./pretrained_models/clip-large-vdim.ckpt"
    assert model.vision_tower == "./pretrained_models/clip-vit-large-patch14-336"
    assert model.select_layer == -2


# Over a recipe of the same model, and over one of another system: the command says it all.
@pytest.mark.parametrize("system", ["uhd_v2", "uhd_v1"])
def test_old_dialect(system: str) -> None:
    first = load(f"{system}/finetune_vicuna7b", OLD_PRETRAIN + DECLARED)
    check_model(first, (1, 2, 4), "rows")
    assert first.stage.learn == {"projector": None}
    assert (first.data.overview_only, first.data.max_length) == (True, 3072)
    assert first.output_dir == "./checkpoints_new/v2-7b-pretrain"
    assert first.trainer.batch_plan(8) == (32, 1)
    second = load(f"{system}/pretrain_vicuna7b", OLD_FINETUNE + " --freeze_backbone False")
    check_model(second, (1, 2, 4), "rows")
    learning = ("projector", "vision_tower", "upsampler_fixup")
    # (The first stage's recipe, on which this command stands, freezes the language model.)
    assert second.stage.learn == dict.fromkeys(learning)
    assert second.model.projector_file == "./checkpoints_new/v2-7b-pretrain/mm_projector.bin"
    assert (second.model.template, second.data.max_length) == ("v1", 4096)
    assert second.trainer.batch_plan(8) == (8, 2)
    whole = load("uhd_v1/finetune_vicuna7b", OLD_FINETUNE)
    assert whole.stage.learn == dict.fromkeys((*learning, "language_model"))


@pytest.mark.parametrize("system", ["uhd_v2", "uhd_v1"])
@pytest.mark.parametrize(("model", "templates"), [(QWEN, ("", "")), (VICUNA, ("plain", "v1"))])
def test_v2_dialect(system: str, model: str, templates: tuple[str, str]) -> None:
    first = load(
        f"{system}/finetune_vicuna13b", f"{NEXT_PRETRAIN} {model} {templates[0]}{DECLARED}"
    )
    check_model(first, (1, 4), "slices")
    assert first.stage.learn == {"projector": None}
    assert (first.data.overview_only, first.data.max_length) == (True, 4096)
    assert first.model.template == (templates[0] or "qwen_1_5")
    assert first.model.attn_implementation == "flash_attention_2"
    assert first.trainer.arguments["dataloader_drop_last"] is True
    second = load(f"{system}/pretrain_vicuna13b", f"{NEXT_FINETUNE} {model} {templates[1]}")
    check_model(second, (1, 4), "slices")
    parts = ("vision_tower", "projector", "language_model", "upsampler_fixup")
    assert second.stage.learn == dict.fromkeys(parts)
    assert second.model.projector.train_positions, "they learn in both stages of this dialect"
    assert second.model.template == (templates[1] or "qwen_1_5")
    assert second.deepspeed == "zero2" and second.trainer.group_by_modality_length
    wanted = {"save_steps": 500, "save_total_limit": 2, "torch_compile_backend": "inductor"}
    assert {key: second.trainer.arguments[key] for key in wanted} == wanted


def test_rates_of_parts() -> None:
    rates = "--mm_vision_tower_lr 2e-6 --mm_projector_lr 1e-5"
    parts = "--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model"
    expected = {"vision_tower": 2e-6, "projector": 1e-5, "language_model": None}
    for words in (f"{rates} {parts}", f"{parts} {rates}"):
        recipe = load("uhd_v2/pretrain_vicuna13b", words)
        assert recipe.stage.learn == expected
    only = load("uhd_v2/finetune_vicuna13b", f"{rates} --mm_tunable_parts mm_language_model")
    assert only.stage.learn == {"language_model": None, "upsampler_fixup": None}
    tower = load("uhd_v2/pretrain_vicuna7b", "--sft_encoder True --mm_vision_tower_lr 2e-6")
    assert tower.stage.learn == {"projector": None, "vision_tower": 2e-6, "upsampler_fixup": None}
    both = "--tune_mm_mlp_adapter True --sft_encoder True"
    for words in (both, "--sft_encoder True --tune_mm_mlp_adapter True"):
        learn = load("uhd_v2/finetune_vicuna7b", words).stage.learn
        assert learn == dict.fromkeys(("projector", "vision_tower", "upsampler_fixup"))
    frozen = load("uhd_v2/finetune_vicuna7b", "--sft_encoder False")
    assert frozen.stage.learn == dict.fromkeys(("projector", "language_model"))


@pytest.mark.parametrize(
    ("name", "kind", "queries"),
    [
        ("adapt_spatial_resampler", "hiwin", 144),
        ("adapt_spatial_resampler_v2", "hiwin", 144),
        ("adapt_spatial_resampler_v2_64", "hiwin", 64),
        ("adapt_spatial_resampler_v2_256", "hiwin", 256),
        ("adapt_spatial_resampler_v1", "spatial_resampler", 144),
        ("uhd_v1_query64", "spatial_resampler", 64),
    ],
)
def test_projector_names(name: str, kind: str, queries: int) -> None:
    recipe = load("uhd_v2/finetune_qwen2_7b", f"--mm_projector_type {name}")
    assert (recipe.model.projector.type, recipe.model.projector.num_queries) == (kind, queries)


def test_every_name_of_the_upsampler_file() -> None:
    for flag in ("jbu_ckpt", "vdim_ckpt", "jbu_vdim"):
        recipe = load("uhd_v2/finetune_vicuna7b", f"--{flag} my.ckpt")
        assert recipe.model.upsampler_file == "my.ckpt"


def test_a_siglip_tower_brings_its_slices() -> None:
    words = "--vision_tower pretrained_models/siglip-so400m-patch14-384"
    assert load("uhd_v2/finetune_vicuna7b", words).model.image.scale_resolution == 384
    given = load("uhd_v2/finetune_vicuna7b", f"{words} --model.image.scale_resolution 448")
    assert given.model.image.scale_resolution == 448
    debug = load("uhd_v2/finetune_vicuna7b", f"--debug {words}")
    assert debug.model.image.scale_resolution == 64


def test_the_layout_belongs_to_the_dialect() -> None:
    for recipe, flag, layout in (
        ("uhd_v2/finetune_vicuna7b", "feature_mode", "rows"),
        ("uhd_v2/finetune_vicuna13b", "model_mode", "slices"),
    ):
        words = ["--mm_projector_type", "adapt_spatial_resampler_v1", f"--{flag}", "uhd_v1"]
        model = load_recipe(recipe, words).model
        assert (model.projector.type, model.image.layout) == ("spatial_resampler", layout)
