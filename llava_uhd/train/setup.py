"""From a recipe to the library's training arguments on the machine at hand."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llava_uhd.config.recipe import recipes_root
from llava_uhd.config.resolved import Resolved
from llava_uhd.config.training import DEEPSPEED_NAMES, Recipe
from llava_uhd.errors import UserError
from llava_uhd.train.fsdp import announce_sharding, fsdp_values, host_backend, sharding_of
from llava_uhd.train.heldout import evaluation_arguments

logger = logging.getLogger(__name__)


def world_size() -> int:
    """Processes of the launch (``WORLD_SIZE``), 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def deepspeed_config(recipe: Recipe) -> Path | None:
    """DeepSpeed configuration of the run, or None where it is left out.

    Left out in a single process on a CPU, and on a single GPU without DeepSpeed installed: nothing
    is sharded there.

    Raises:
        UserError: several processes but no DeepSpeed, or no such file.
    """
    announce_sharding(recipe, world_size())
    name = recipe.deepspeed
    if name is None:
        return None
    alone = world_size() == 1
    installed = importlib.util.find_spec("deepspeed") is not None
    if alone and (not installed or not torch.cuda.is_available()):
        logger.info("deepspeed %s is left out: one process has nothing to share", name)
        return None
    if not installed:
        raise UserError(
            f"deepspeed: {name} needs the deepspeed package: bash install.sh --extras "
            "train,deepspeed (or --deepspeed null)"
        )
    folder = recipes_root().parent / "deepspeed"
    path = folder / f"{name}.json" if name in DEEPSPEED_NAMES else Path(name)
    if not path.is_file():
        raise UserError(f"deepspeed configuration {path} does not exist")
    if not torch.cuda.is_available():
        _use_gloo()
    # DeepSpeed calls them by their old names, each of which warns at each call.
    old_names = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    return path


def _use_gloo() -> None:
    """Keeps DeepSpeed on a CPU from compiling its shared-memory kernel, which takes minutes."""
    from deepspeed.ops import __compatible_ops__ as compatible

    compatible["deepspeed_shm_comm"] = False


def weight_dtype(recipe: Recipe, deepspeed: Path | None) -> torch.dtype:
    """Dtype in which the weights are loaded.

    DeepSpeed keeps float32 master copies, so it gets bfloat16 weights where the run computes in
    bfloat16; without it the weights themselves are the masters and stay float32. Below adapters
    the weights are frozen and need no masters (`llava_uhd.train.lora.set_dtypes`). Under FSDP only
    what learns becomes float32 again (`llava_uhd.train.fsdp.keep_masters`).
    """
    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    half = recipe.trainer.arguments.get("bf16") and torch.cuda.is_available()
    kept_elsewhere = deepspeed is not None or recipe.lora.enabled
    kept_elsewhere = kept_elsewhere or sharding_of(recipe, world_size()) is not None
    return torch.bfloat16 if half and kept_elsewhere else torch.float32


def training_arguments(
    recipe: Resolved, deepspeed: Path | None, rows: int | None = None
) -> TrainingArguments:
    """The library's arguments; what the machine lacks is switched off with a line in the log.

    Args:
        recipe: of the run.
        deepspeed: configuration.
        rows: packed rows that a device takes in an optimizer step, one after another; None: batches
            are padded, and the recipe says how large they are.

    Raises:
        UserError: the global batch cannot be shared by the devices.
    """
    values: dict[str, Any] = dict(recipe.trainer.arguments)
    batch, accumulation = (1, rows) if rows else recipe.trainer.batch_plan(world_size())
    values |= {
        "output_dir": recipe.output_dir,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "deepspeed": str(deepspeed) if deepspeed else None,
    }
    values |= evaluation_arguments(recipe, values)
    values.setdefault("report_to", "none")
    # It would put the mean of other losses in the place of one that is no number.
    values.setdefault("logging_nan_inf_filter", False)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        values["use_cpu"] = True
        values["dataloader_pin_memory"] = False
    if not torch.cuda.is_available():
        for name in ("bf16", "tf32", "fp16"):
            if values.pop(name, None):
                logger.info("%s is off: no CUDA device", name)
    if values.get("gradient_checkpointing"):
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if not values.get("dataloader_num_workers"):
        values.pop("dataloader_prefetch_factor", None)
    values |= fsdp_values(recipe, values, world_size())
    try:
        with host_backend(values), warnings.catch_warnings():
            # Newer names of some arguments do not exist in the oldest supported release.
            warnings.simplefilter("ignore", FutureWarning)
            return TrainingArguments(**{k: v for k, v in values.items() if v is not None})
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error


def computing(arguments: TrainingArguments, attention: str) -> str:
    """How a run computes, in a line.

    Args:
        arguments: of the run.
        attention: backend of the language model.

    Example: ``"computing in bfloat16, tf32 products; attention sdpa; gradient checkpointing"``.
    """
    numbers = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"
    tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    line = f"computing in {numbers}{', tf32 products' if tf32 else ''}; attention {attention}"
    return f"{line}; {'' if arguments.gradient_checkpointing else 'no '}gradient checkpointing"
