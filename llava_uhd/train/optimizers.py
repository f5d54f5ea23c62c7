"""The optimizer and the schedule of its rates that ``trainer.optim`` and its neighbours name.

Both are the library's. Here is what it finds out only in the middle of a run, or not at all: an
optimizer that the machine cannot run, options that a schedule does not know, phases that are
longer than the run.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from llava_uhd.checkpoint.weights import read_json
from llava_uhd.errors import UserError

logger = logging.getLogger(__name__)

# What `get_scheduler` fills in by itself.
_FILLED_IN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
# Schedules to which it hands none of ``lr_scheduler_kwargs``.
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
# Schedules that follow the loss on held-out samples: a trial would need one.
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")
# Options that may be a share of all steps, as ``warmup_steps`` may.
_PHASES = ("num_stable_steps", "num_decay_steps")
WSD = "warmup_stable_decay"
DECAY_SHARE = 0.1  # of it where the recipe names none
# Above it bitsandbytes keeps eight bits of a value.
_TRIAL_SIDE = 64

Kind = type[torch.optim.Optimizer]


def _name(arguments: TrainingArguments) -> str:
    return str(getattr(arguments.optim, "value", arguments.optim))


def _chosen(arguments: TrainingArguments, model: nn.Module | None = None) -> tuple[Kind, Any]:
    """Class and options of ``trainer.optim``.

    Raises:
        UserError: a missing library, or an optimizer that brings its own groups of parameters.
    """
    name = _name(arguments)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trainer.optim {name}: {reason}") from error
    own_groups = {"params", "model", "optimizer_dict"} & set(options)
    if own_groups or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(
            f"trainer.optim {name} groups parameters in its own way, which knows no rates of parts:"
            " use adamw_torch, adamw_bnb_8bit, paged_adamw_8bit or another that takes groups"
        )
    return kind, options


def check_optimizer(arguments: TrainingArguments, deepspeed: Path | None) -> None:
    """Refuses an optimizer that could not take a step of this run.

    Args:
        arguments: of the run.
        deepspeed: its configuration, None without.

    Raises:
        UserError: a library is missing, the optimizer does not run on the machine, or not together
            with what shares its state out.
    """
    kind, options = _chosen(arguments)
    if not _is_bitsandbytes(kind):
        return
    name = _name(arguments)
    if arguments.fsdp:
        raise UserError(
            f"trainer.optim {name} cannot round what FSDP shares out: use adamw_torch, whose state "
            "is shared out too, or --deepspeed zero2 in its place"
        )
    if deepspeed is not None:
        _check_deepspeed(name, bool(options.get("is_paged")), deepspeed)
    if arguments.device.type == "cuda":
        return
    if options.get("is_paged"):
        logger.info("%s: nothing is paged on a CPU, where all memory is the host's", name)
    try:
        _try_step(kind, options)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"trainer.optim {name} does not run on this machine's {arguments.device.type} "
            f"({reason}): use adamw_torch, or a newer bitsandbytes (pip install -U bitsandbytes)"
        ) from error


def _check_deepspeed(name: str, paged: bool, deepspeed: Path) -> None:
    """Refuses what DeepSpeed would do in another way by itself.

    Raises:
        UserError: the host's memory is used twice.
    """
    zero = read_json(deepspeed).get("zero_optimization") or {}
    away = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if paged or away:
        what = "is paged" if paged else "meets a state that is offloaded already"
        raise UserError(
            f"trainer.optim {name} with deepspeed {deepspeed.stem} {what}: use adamw_torch with "
            "zero3_offload, or adamw_bnb_8bit with zero2 or zero3"
        )
    logger.info("%s: with DeepSpeed the state of embeddings is rounded, too", name)


def rounds_state(arguments: TrainingArguments) -> bool:
    """Whether the optimizer's state is rounded in blocks, which cannot be shared out anew."""
    kind, options = _chosen(arguments)
    return _is_bitsandbytes(kind) and options.get("optim_bits") == 8


def _is_bitsandbytes(kind: Kind) -> bool:
    return kind.__module__.startswith("bitsandbytes")


def _try_step(kind: Kind, options: dict[str, Any]) -> None:
    """One step with a matrix."""
    parameter = nn.Parameter(torch.zeros(_TRIAL_SIDE, _TRIAL_SIDE))
    parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind([parameter], **options).step()


def make_optimizer(
    arguments: TrainingArguments, groups: Sequence[dict[str, Any]], model: nn.Module
) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        arguments: of the run.
        groups: of `llava_uhd.train.stages.parameter_groups`.
        model: whose parameters they are.

    Raises:
        UserError: see `check_optimizer`.
    """
    kind, options = _chosen(arguments, model)
    optimizer = kind(groups, **options)  # type: ignore[arg-type]
    if _is_bitsandbytes(kind) and options.get("optim_bits") == 8:
        _keep_embeddings(optimizer, model)
    return optimizer


def _keep_embeddings(optimizer: Any, model: nn.Module) -> None:
    """Keeps 32-bit state for embedding tables, whose rows are learned unevenly (arXiv 2110.02861).

    bitsandbytes notes such exceptions in one table for all optimizers of a process; this one gets
    a table of its own, which leaves with it.
    """
    table = object.__new__(type(optimizer.mng))
    table.initialize()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            table.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer.mng = table


# --- schedules ------------------------------------------------------------------------------------


def _schedule_name(arguments: TrainingArguments) -> SchedulerType:
    return SchedulerType(arguments.lr_scheduler_type)


def _given(arguments: TrainingArguments) -> dict[str, Any]:
    given = arguments.lr_scheduler_kwargs or {}
    if not isinstance(given, dict):
        raise UserError(
            f"trainer.lr_scheduler_kwargs must be options of the schedule, got {given!r}: for "
            "example {num_decay_steps: 0.1}"
        )
    return dict(given)


def check_schedule(arguments: TrainingArguments) -> None:
    """Refuses options that the schedule does not know, or values that it does not take.

    Raises:
        UserError: naming the option and what there is.
    """
    name = _schedule_name(arguments)
    given = _given(arguments)
    places = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    known = [key for key in places if key not in _FILLED_IN]
    if name.value in _WITHOUT_OPTIONS:
        known = []
    for key in given:
        if key not in known:
            there = ", ".join(known) or "none"
            raise UserError(
                f"trainer.lr_scheduler_kwargs: {name.value} has no option '{key}' (it has: {there})"
            )
    for key in _PHASES:
        value = given.get(key)
        if value is not None and not (_is_number(value) and value >= 0):
            raise UserError(
                f"trainer.lr_scheduler_kwargs.{key} must be a number of steps, or below 1 a share "
                f"of all steps, got {value!r}"
            )
    if name.value in _FOLLOWING:
        return
    try:
        # Without the lengths of phases: how many steps there are is not known yet.
        others = {key: value for key, value in given.items() if key not in _PHASES}
        if name.value == WSD:
            others["num_decay_steps"] = 40
        _try_schedule(name, others)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"trainer.lr_scheduler_kwargs of {name.value}: {reason}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _try_schedule(name: SchedulerType, options: dict[str, Any]) -> None:
    """A hundred steps of a schedule over nothing."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, 10, 100, options)
    for _ in range(100):
        optimizer.step()
        schedule.step()


def schedule_options(arguments: TrainingArguments, steps: int) -> dict[str, Any]:
    """``lr_scheduler_kwargs`` of a run of so many steps: shares are steps now.

    Example: ``warmup_stable_decay`` with ``{"num_decay_steps": 0.1}`` over 250 steps:
    ``{"num_decay_steps": 25}``. Without a value a tenth of the run decays.

    Raises:
        UserError: warm-up and the phases are longer than the run.
    """
    name = _schedule_name(arguments)
    options = _given(arguments)
    if name.value != WSD:
        return options
    share = options.setdefault("num_decay_steps", DECAY_SHARE)
    for key in _PHASES:
        value = options.get(key)
        if value is not None:
            options[key] = math.ceil(value * steps) if value < 1 else int(value)
    warmup = arguments.get_warmup_steps(steps)
    if share < 1:  # of a few steps, shares that were rounded up need not fit
        options["num_decay_steps"] = min(options["num_decay_steps"], max(steps - warmup, 0))
    decay = options["num_decay_steps"]
    stable = options.get("num_stable_steps")
    if warmup + (stable or 0) + decay > steps:
        level = "" if stable is None else f" + {stable} level (num_stable_steps)"
        raise UserError(
            f"trainer.lr_scheduler_kwargs: {warmup} steps of warm-up (warmup_steps){level} + "
            f"{decay} of decay (num_decay_steps) are more than the run's {steps}: shorten them, or "
            "give them as shares (num_decay_steps: 0.1)"
        )
    return options


def make_schedule(
    arguments: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int
) -> LRScheduler:
    """The schedule of a run.

    Args:
        arguments: of the run.
        optimizer: of it.
        steps: optimizer steps of it.

    Raises:
        UserError: see `schedule_options`.
    """
    name = _schedule_name(arguments)
    options, warmup = schedule_options(arguments, steps), arguments.get_warmup_steps(steps)
    total: int | None = steps
    if warmup >= steps > 0 and name.value != "constant":
        logger.warning(
            "trainer.warmup_steps: %d steps of warm-up in a run of %d: the rate never reaches "
            "trainer.learning_rate",
            *(warmup, steps),
        )
    if name.value == WSD:
        decay, stable = options["num_decay_steps"], options.get("num_stable_steps")
        level = steps - warmup - decay if stable is None else stable
        text = "rates: %d steps of warm-up, %d level, %d of decay"
        logger.info(text, warmup, level, decay)
        total = steps if stable is None else None  # the library warns of two that agree
    return get_scheduler(name, optimizer, warmup, total, options)
