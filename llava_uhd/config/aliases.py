"""The flags of published training commands, translated to recipe keys in one table.

Flags that are fields of transformers' ``TrainingArguments`` need no entry: they go to the trainer
section as they are. Everything else that a published command may carry stands in `ALIASES`: with
the key that means the same, with a translation where the values differ too, or as accepted but
without effect, with the reason. Here stand the flags of LLaVA 1.5 and LLaVA-UHD v1; those that
LLaVA-UHD v2 adds stand in `llava_uhd.config.aliases_uhd_v2`, those on tiles and videos in
`llava_uhd.config.aliases_onevision`, those of LoRA in `llava_uhd.config.aliases_lora`, those of
LLaVolta in `llava_uhd.config.aliases_llavolta`.
"""

from __future__ import annotations

import posixpath
from typing import Any

from llava_uhd.config import aliases_llavolta, aliases_lora  # noqa: F401  (register their flags)
from llava_uhd.config.aliases_onevision import (
    is_whole_model,
    newline_with_language_model,
    over_checkpoint,
    views_of_tower,
)
from llava_uhd.config.aliases_uhd_v2 import has_upsampler
from llava_uhd.config.flags import (
    ALIASES,
    Context,
    Inert,
    apply_alias,
    inert,
    only,
    read_first,
    takes_keys,
    translates,
)
from llava_uhd.errors import UserError

__all__ = ["ALIASES", "Context", "Inert", "apply_alias", "read_first"]

# Published DeepSpeed files, by their path in the published repositories. The variants of zero2
# differ in bucket sizes and in settings that the trainer makes itself.
DEEPSPEED_FILES = {f"scripts/{name}.json": name for name in ("zero2", "zero3", "zero3_offload")}
DEEPSPEED_FILES |= {f"scripts/{name}.json": "zero2" for name in ("zero2_old", "zero2_fused_adamw")}
# Words of the library's older option --fsdp that say nothing that is not so anyway.
FSDP_PLAIN_WORDS = ("auto_wrap",)


takes_keys(
    {
        "version": "model.template",
        "mm_vision_select_layer": "model.select_layer",
        "pretrain_mm_mlp_adapter": "model.projector_file",
        "data_path": "data.path",
        "image_folder": "data.image_folder",
        "single": "data.overview_only",
        "model_max_length": "data.max_length",
        "group_by_modality_length": "trainer.group_by_modality_length",
        # Renamed by transformers 5.
        "evaluation_strategy": "trainer.eval_strategy",
        "no_cuda": "trainer.use_cpu",
    }
)

inert(
    {
        "lazy_preprocess": "samples are always prepared when they are needed",
        "is_multimodal": "records with and without images may always be mixed",
        "mm_use_im_patch_token": "the published code adds this token and never uses it",
        "mpt_attn_impl": "it belongs to MPT language models",
        "cache_dir": "set the environment variable HF_HOME to move the hub's cache",
        "local_rank": "the launcher gives it in the environment variable LOCAL_RANK",
        "save_safetensors": "weights are always written as safetensors",
        "overwrite_output_dir": "a run resumes from its output folder; delete it to start anew",
        "logging_dir": "logs are written to the output folder",
        "fsdp_transformer_layer_cls_to_wrap": "the layers are found in the model",
    }
)

only(
    "mm_vision_select_feature",
    ("patch",),
    "patch features are always selected",
    "the class token is never kept; only 'patch' exists",
)
only(
    "mm_use_im_start_end",
    (False,),
    "no start and end tokens are added",
    "extra image start and end tokens are not supported; leave it False",
)


@translates("model_name_or_path")
def _language_model(value: Any, context: Context) -> dict[str, Any] | Inert:
    if is_whole_model(value):
        return {"model.checkpoint": value, "model.language_model": None}
    return {"model.checkpoint": None, "model.language_model": value}


@translates("vision_tower")
def _tower(value: Any, context: Context) -> dict[str, Any] | Inert:
    if over_checkpoint(context):
        return Inert(
            "the checkpoint brings its vision tower, which may have learned; "
            "--model.vision_tower puts another one in its place"
        )
    return {"model.vision_tower": value, **views_of_tower(value, context)}


@translates("tune_mm_mlp_adapter")
def _projector_only(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("what learns stands in stage.learn")
    learn = {"projector": context.flags.get("mm_projector_lr")}
    if context.flags.get("sft_encoder") is True:
        learn["vision_tower"] = context.flags.get("mm_vision_tower_lr")
        learn |= {"upsampler_fixup": None} if has_upsampler(context) else {}
    return {"stage.learn": learn}


@translates("freeze_mm_mlp_adapter")
def _freeze_projector(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("what learns stands in stage.learn")
    return {"stage.learn.projector": False}


@translates("freeze_backbone")
def _freeze_language_model(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("what learns stands in stage.learn")
    newline = newline_with_language_model(False, context)
    return {"stage.learn.language_model": False, **newline}


@translates("mm_projector_lr")
def _projector_rate(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is None:
        return Inert("the projector takes trainer.learning_rate")
    if "mm_mlp_adapter" not in str(context.flags.get("mm_tunable_parts", "mm_mlp_adapter")):
        return Inert("--mm_tunable_parts leaves the projector out")
    return {"stage.learn.projector": value}


@translates("warmup_ratio")
def _warmup(value: Any, context: Context) -> dict[str, Any] | Inert:
    # transformers 5 reads warmup_steps below 1 as a share of all steps.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"--warmup_ratio must be a number of at least 0 and below 1, got {value!r}")
    return {"trainer.warmup_steps": value}


@translates("group_by_length")
def _group_by_length(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("batches are drawn at random unless asked otherwise")
    return {"trainer.train_sampling_strategy": "group_by_length"}


@translates("deepspeed")
def _deepspeed(value: Any, context: Context) -> dict[str, Any] | Inert:
    name = DEEPSPEED_FILES.get(posixpath.normpath(value)) if isinstance(value, str) else None
    return {"deepspeed": name or value}


@translates("fsdp")
def _fsdp(value: Any, context: Context) -> dict[str, Any] | Inert:
    """``--fsdp full_shard``, ``--fsdp "full_shard auto_wrap offload"``, or ``--fsdp`` alone."""
    if not value or value is True:
        return {"fsdp": "full_shard" if value else None}
    texts = value if isinstance(value, list) else [value]
    words = [word for text in texts for word in str(text).split() if word not in FSDP_PLAIN_WORDS]
    if words == ["full_shard", "offload"]:
        words = ["full_shard_offload"]
    return {"fsdp": " ".join(words)}
