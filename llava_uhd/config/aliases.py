"""The flags of published training commands, translated to recipe keys in one table.

Flags that are fields of transformers' ``TrainingArguments`` need no entry: they go to the trainer
section as they are. Everything else that a published command may carry stands in `ALIASES`: with
the key that means the same, with a translation where the values differ too, or as accepted but
without effect, with the reason.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry


@dataclass(frozen=True)
class Inert:
    """A flag that is accepted and does nothing; ``reason`` is told to the user once."""

    reason: str


@dataclass(frozen=True)
class Context:
    """What a translation may look at.

    Attributes:
        recipe: dotted key -> value of the recipe so far.
        flags: the other published flags of the command, by name.
    """

    recipe: Mapping[str, Any]
    flags: Mapping[str, Any]


Translation = Callable[[Any, Context], dict[str, Any] | Inert]


@dataclass(frozen=True)
class Alias:
    """One published flag: exactly one of the three is set.

    Attributes:
        key: dotted recipe key that takes the value unchanged.
        translate: (value, context) -> dotted keys with values, or `Inert`.
        inert: why the flag has no effect here.
    """

    key: str | None = None
    translate: Translation | None = None
    inert: str | None = None


ALIASES: Registry[Alias] = Registry("published flag")


def apply_alias(name: str, value: Any, context: Context) -> dict[str, Any] | Inert:
    """Translates one published flag.

    Args:
        name: without the dashes.
        value: as read from the command line.
        context: the rest of the command and the recipe.

    Raises:
        UserError: unknown flag, or a value that asks for something that does not exist here.
    """
    alias = ALIASES.get(name)
    if alias.key is not None:
        return {alias.key: value}
    if alias.translate is not None:
        return alias.translate(value, context)
    return Inert(alias.inert or "")


def _keys(table: dict[str, str]) -> None:
    for name, key in table.items():
        ALIASES.add(name, Alias(key=key))


def _inert(table: dict[str, str]) -> None:
    for name, reason in table.items():
        ALIASES.add(name, Alias(inert=reason))


def _translates(name: str) -> Callable[[Translation], Translation]:
    def wrap(function: Translation) -> Translation:
        ALIASES.add(name, Alias(translate=function))
        return function

    return wrap


def _only(name: str, allowed: tuple[Any, ...], reason: str, refusal: str) -> None:
    """An option of which only one choice exists here: that one is inert, others are refused."""

    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        if value in allowed:
            return Inert(reason)
        raise UserError(f"--{name} {value}: {refusal}")

    ALIASES.add(name, Alias(translate=translate))


# Published projector names that carry settings of ours in the name.
PROJECTOR_NAMES: dict[str, dict[str, Any]] = {
    "adapt_spatial_resampler": {"type": "spatial_resampler", "num_queries": 144},
}

# Published DeepSpeed files, by their path in the published repositories.
DEEPSPEED_FILES = {f"scripts/{name}.json": name for name in ("zero2", "zero3", "zero3_offload")}


_keys(
    {
        "version": "model.template",
        "vision_tower": "model.vision_tower",
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

_inert(
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
        "lora_r": "it only matters with --lora_enable True",
        "lora_alpha": "it only matters with --lora_enable True",
        "lora_dropout": "it only matters with --lora_enable True",
        "lora_weight_path": "it only matters with --lora_enable True",
        "lora_bias": "it only matters with --lora_enable True",
        "double_quant": "it only matters with --bits 4 or 8",
        "quant_type": "it only matters with --bits 4 or 8",
    }
)

_only(
    "mm_vision_select_feature",
    ("patch",),
    "patch features are always selected",
    "the class token is never kept; only 'patch' exists",
)
_only(
    "mm_patch_merge_type",
    ("flat",),
    "views are laid out by model.image.strategy",
    "only 'flat' exists; the layout of views is chosen by model.image.strategy",
)
_only(
    "mm_use_im_start_end",
    (False,),
    "no start and end tokens are added",
    "extra image start and end tokens are not supported; leave it False",
)
_only(
    "lora_enable",
    (False,),
    "all weights of the learning parts are trained",
    "LoRA training is not available; leave it out to train all weights",
)
_only(
    "bits",
    (16,),
    "weights are not quantised in training",
    "quantised training is not available; leave it out",
)


@_translates("model_name_or_path")
def _language_model(value: Any, context: Context) -> dict[str, Any] | Inert:
    return {"model.checkpoint": None, "model.language_model": value}


@_translates("mm_projector_type")
def _projector(value: Any, context: Context) -> dict[str, Any] | Inert:
    settings = PROJECTOR_NAMES.get(value, {"type": value})
    return {f"model.projector.{name}": each for name, each in settings.items()}


@_translates("tune_mm_mlp_adapter")
def _projector_only(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("what learns stands in stage.learn")
    return {"stage.learn": {"projector": context.flags.get("mm_projector_lr")}}


@_translates("freeze_mm_mlp_adapter")
def _freeze_projector(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("what learns stands in stage.learn")
    return {"stage.learn.projector": False}


@_translates("freeze_backbone")
def _freeze_language_model(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("what learns stands in stage.learn")
    return {"stage.learn.language_model": False}


@_translates("mm_projector_lr")
def _projector_rate(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is None:
        return Inert("the projector takes trainer.learning_rate")
    return {"stage.learn.projector": value}


@_translates("image_aspect_ratio")
def _aspect_ratio(value: Any, context: Context) -> dict[str, Any] | Inert:
    if context.recipe.get("model.image.strategy", "slices") == "slices":
        return Inert("slices keep every image's own shape, as in the published LLaVA-UHD v1 code")
    return {"model.image.strategy": value}


@_translates("warmup_ratio")
def _warmup(value: Any, context: Context) -> dict[str, Any] | Inert:
    # transformers 5 reads warmup_steps below 1 as a share of all steps.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"--warmup_ratio must be a number of at least 0 and below 1, got {value!r}")
    return {"trainer.warmup_steps": value}


@_translates("group_by_length")
def _group_by_length(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is not True:
        return Inert("batches are drawn at random unless asked otherwise")
    return {"trainer.train_sampling_strategy": "group_by_length"}


@_translates("deepspeed")
def _deepspeed(value: Any, context: Context) -> dict[str, Any] | Inert:
    name = DEEPSPEED_FILES.get(posixpath.normpath(value)) if isinstance(value, str) else None
    return {"deepspeed": name or value}
