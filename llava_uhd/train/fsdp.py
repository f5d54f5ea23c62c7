"""PyTorch's FSDP2 in the place of DeepSpeed: what the library is told, and which layers it wraps.

Each decoder layer, each layer of the tower, the embedding table and the head are units of their
own, whole only while they compute. All the rest (projector, upsampler, norms, positions) is one
unit that is whole from the forward pass of the model to the end of its backward pass, so that code
may read a parameter without calling the module it belongs to.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.memory import SharingPlan

logger = logging.getLogger(__name__)

OFFLOAD = "full_shard_offload"
WHOLE_BETWEEN = "shard_grad_op"
# Optimizers whose steps are torch operations: they also work on shares of a parameter.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def sharding_of(recipe: Any, processes: int) -> str | None:
    """Kind of sharding of a run; None where FSDP is not asked for, or has nothing to share.

    Args:
        recipe: of any kind; one without such a key has none.
        processes: of the run.
    """
    name: str | None = getattr(recipe, "fsdp", None)
    return name if processes > 1 else None


def announce_sharding(recipe: Any, processes: int) -> None:
    """Says in one line what is shared out, or that nothing is."""
    name = getattr(recipe, "fsdp", None)
    if name is None:
        return
    if processes == 1:
        logger.info("fsdp %s is left out: one process has nothing to share", name)
        return
    logger.info(
        "fsdp %s: FSDP2 shares the state of training out over %d processes, without DeepSpeed",
        name,
        processes,
    )
    if name == OFFLOAD and not torch.cuda.is_available():
        logger.info("no CUDA device: the shares lie in the memory of the host anyway")


def fsdp_values(recipe: Any, values: dict[str, Any], processes: int) -> dict[str, Any]:
    """Fields of ``TrainingArguments`` for a run that is shared out; none for any other.

    Args:
        recipe: of the run.
        values: its other fields, by name.
        processes: of the run.

    Raises:
        UserError: something that FSDP2 cannot do.
    """
    name = sharding_of(recipe, processes)
    if name is None:
        return {}
    _check(recipe, values)
    settings = {
        "version": 2,
        "reshard_after_forward": name != WHOLE_BETWEEN,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_offload": name == OFFLOAD and torch.cuda.is_available(),
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    # Otherwise accumulated gradients would lie whole on every device until the last micro-batch.
    each = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    given = values.get("accelerator_config") or {}
    return {"fsdp": True, "fsdp_config": settings, "accelerator_config": {**each, **dict(given)}}


def _check(recipe: Any, values: dict[str, Any]) -> None:
    name = recipe.fsdp
    if recipe.lora.quantization is not None:
        raise UserError(
            f"fsdp {name} shards the weights, quantised ones cannot be: --deepspeed zero2, "
            "or --lora.quantization null"
        )
    optimizer = str(getattr(values.get("optim"), "value", values.get("optim") or OPTIMIZERS[0]))
    if optimizer not in OPTIMIZERS:
        raise UserError(
            f"trainer.optim {optimizer} cannot work on the shares of fsdp {name}: use one of "
            f"{', '.join(OPTIMIZERS)}, or --deepspeed zero2"
        )
    if values.get("fp16"):
        raise UserError(
            f"trainer.fp16 is not supported with fsdp {name}: --trainer.fp16 false "
            "--trainer.bf16 true, or --deepspeed zero2"
        )
    if values.get("load_best_model_at_end"):
        raise UserError(
            f"trainer.load_best_model_at_end is not supported with fsdp {name}: leave it out, the "
            "best checkpoint is named in trainer_state.json"
        )


def fsdp_plan(arguments: TrainingArguments, processes: int) -> SharingPlan:
    """How FSDP shares the state of a run out, for estimates of memory.

    Args:
        arguments: with ``fsdp``.
        processes: of the run.
    """
    settings: dict[str, Any] = arguments.fsdp_config
    away = bool(settings.get("cpu_offload"))
    gathered = 0 if settings.get("reshard_after_forward", True) else 2 if arguments.bf16 else 4
    return SharingPlan(processes, 3, offload=away, gathered=gathered, all_away=away)


@contextmanager
def host_backend(values: dict[str, Any]) -> Iterator[None]:
    """While the processes find each other: shares in the memory of the host need a backend there.

    Args:
        values: from `fsdp_values`.
    """
    if not values.get("fsdp_config", {}).get("cpu_offload"):
        yield
        return
    names = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def keep_masters(model: nn.Module, arguments: TrainingArguments) -> None:
    """Makes what learns float32: under FSDP the weights themselves are the master copies.

    Args:
        model: with its learning parts chosen.
        arguments: of the run.
    """
    if not arguments.fsdp or not arguments.bf16:
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def layer_classes(model: LlavaUHDForConditionalGeneration) -> list[str]:
    """Names of the classes of decoder layers and tower layers, as they stand in the model.

    Of each part the layers are the list of modules that holds most of its parameters.

    Raises:
        UserError: the language model has no such list.
    """
    names: list[str] = []
    for part in (model.vision_tower, model.get_decoder()):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        sizes = [sum(each.numel() for each in module.parameters()) for module in lists]
        if lists and max(sizes) > 0:
            layers = lists[sizes.index(max(sizes))]
            names += [type(layer).__name__ for layer in layers]
        elif part is not model.vision_tower:
            raise UserError(
                f"fsdp: {type(part).__name__} has no list of layers to share out: --fsdp null"
            )
    return list(dict.fromkeys(names))


def share_on_cpu(trainer: Trainer) -> None:
    """Lets accelerate share out on a CPU, too.

    It knows FSDP on other devices only and would train every process on the whole model, although
    torch's FSDP2 runs on a CPU as it does elsewhere.

    Args:
        trainer: with its accelerator.
    """
    if not trainer.args.fsdp or trainer.is_fsdp_enabled:
        return
    from accelerate.utils import (  # type: ignore[import-untyped]
        DistributedType,
        FullyShardedDataParallelPlugin,
    )

    state = trainer.accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        raise UserError(
            f"fsdp: this version of accelerate does not share out on {trainer.args.device.type}: "
            "--fsdp null"
        )
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def plan_units(trainer: Trainer) -> None:
    """Tells the library which layers it wraps, and in which dtypes they compute.

    Args:
        trainer: before it trains.
    """
    if not trainer.is_fsdp_enabled:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = layer_classes(trainer.model)
    if trainer.args.bf16:
        # Gradients are summed up in float32, and the loss stays float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
