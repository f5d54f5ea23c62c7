"""What a run does per second: counts, time by parts, operations and MFU, as entries of the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.config.model import CompressionConfig
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.counting import Facts
from llava_uhd.train.flops import TrainingFlops, device_peak
from llava_uhd.train.timing import (
    DATA,
    OPTIMIZER,
    OTHER,
    PARTS,
    PassHooks,
    Timeline,
    clock_of,
    peak_memory,
)

logger = logging.getLogger(__name__)

TIME = "time_"
# Entries that depend on the machine and its load: equal runs differ in them.
CLOCK_KEYS = (
    *("samples_per_second", "tokens_per_second", "visual_tokens_per_second"),
    *("learned_tokens_per_second", "tflops_per_second", "mfu", "step_seconds", "peak_memory_gib"),
    *(f"{TIME}{part}" for part in PARTS),
)
# Summed up between two entries of the log, beside the seconds of the parts.
SUMS = ("samples", "tokens", "visual", "learned", "slots", "flops", "steps")


class Meter(TrainerCallback):
    """Measures a run between two entries of its log.

    Args:
        recipe: of the run.
        model: that learns, without wrappers.
        device: it is on.
    """

    def __init__(
        self, recipe: Recipe, model: LlavaUHDForConditionalGeneration, device: torch.device
    ) -> None:
        self.timeline = Timeline(clock_of(device))
        self.hooks = PassHooks(self.timeline, model)
        self.device = device
        self.peak = device_peak(device)
        self.flops: TrainingFlops | None = None
        try:
            self.flops = TrainingFlops(model.config, recipe.stage.learn, recipe.lora.enabled)
        except UserError as error:
            logger.info("no FLOP/s and no MFU in the log: %s", error)
        self._compression: CompressionConfig = model.config.compression
        self._sums = dict.fromkeys(SUMS, 0.0)
        self._rates: dict[str, float] = {}
        self._engine: Any = None

    # --- what the trainer tells -------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to count; the setup before does not belong to the first step."""
        self._sums = dict.fromkeys(SUMS, 0.0)
        self.timeline.take()
        self.timeline.enter(OTHER)

    def watch_engine(self, engine: Any) -> None:
        """Time of DeepSpeed's own optimizer step, which it takes inside the backward call.

        Args:
            engine: the model as it is wrapped.
        """
        if engine is self._engine or type(engine).__name__ != "DeepSpeedEngine":
            return
        self._engine, step = engine, engine.step

        def timed(*given: Any, **named: Any) -> Any:
            self.timeline.enter(OPTIMIZER)
            return step(*given, **named)

        engine.step = timed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the next batches are fetched."""
        self.timeline.enter(DATA)
        try:
            yield
        finally:
            self.timeline.enter(OTHER)

    @contextmanager
    def passing(
        self, facts: Facts, compression: CompressionConfig | None, last: bool
    ) -> Iterator[None]:
        """While a micro-batch goes through the model and back.

        Args:
            facts: of the micro-batch.
            compression: of its pass; None: the model's own.
            last: whether the optimizer's step follows.
        """
        self._count(facts, self._compression if compression is None else compression)
        self.hooks.active = True
        try:
            yield
        finally:
            self.hooks.active = False
            self.timeline.enter(OPTIMIZER if last else OTHER)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the rates of the step before the schedule moves on."""
        groups = getattr(kwargs.get("optimizer"), "param_groups", [])
        self._rates = {group["part"]: float(group["lr"]) for group in groups if "part" in group}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the optimizer's time."""
        self.timeline.enter(OTHER)
        self.timeline.settle()
        self._sums["steps"] += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the model as it was."""
        self.hooks.remove()

    # --- counting ---------------------------------------------------------------------------------

    def _count(self, facts: Facts, compression: CompressionConfig) -> None:
        for name in ("samples", "tokens", "visual", "learned", "slots"):
            self._sums[name] += getattr(facts, name)
        if self.flops is None:
            return
        try:
            self._sums["flops"] += self.flops(facts, compression).total
        except UserError as error:
            logger.info("no FLOP/s and no MFU in the log: %s", error)
            self.flops = None

    def entry(self, ranks: int) -> dict[str, float]:
        """What the log says of the steps since the last call; all ranks call it together.

        Counts are summed over the ranks, seconds are their means.

        Args:
            ranks: number of processes.
        """
        seconds, sums = self.timeline.take(), self._sums
        self._sums = dict.fromkeys(SUMS, 0.0)
        steps = max(sums["steps"], 1.0)
        if ranks > 1:
            numbers = [sums[name] for name in SUMS] + [seconds[part] for part in PARTS]
            values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(values)
            added = values.tolist()
            sums = dict(zip(SUMS, added[: len(SUMS)], strict=True))
            seconds = {
                part: value / ranks for part, value in zip(PARTS, added[len(SUMS) :], strict=True)
            }
        return {**self._speeds(sums, sum(seconds.values()), ranks), **_per_step(seconds, steps)}

    def _speeds(self, sums: dict[str, float], seconds: float, ranks: int) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        entry = {
            "samples_per_second": round(sums["samples"] / seconds, 2),
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
            "visual_tokens_per_second": round(sums["visual"] / seconds, 1),
            "learned_tokens_per_second": round(sums["learned"] / seconds, 1),
            "padding": round(1 - sums["tokens"] / max(sums["slots"], 1), 4),
        }
        if self.flops is not None:
            each = sums["flops"] / seconds / ranks
            entry["tflops_per_second"] = round(each / 1e12, 6)
            if self.peak.flops:
                entry["mfu"] = round(each / self.peak.flops, 5)
        most = peak_memory(self.device)
        if most is not None:
            entry["peak_memory_gib"] = round(most / 2**30, 3)
        if len(set(self._rates.values())) > 1:
            entry |= {f"learning_rate_{part}": rate for part, rate in self._rates.items()}
        return entry


def _per_step(seconds: dict[str, float], steps: float) -> dict[str, float]:
    """Seconds of an optimizer step, in all and by parts."""
    parts = {f"{TIME}{part}": round(value / steps, 6) for part, value in seconds.items()}
    return {"step_seconds": round(sum(seconds.values()) / steps, 6), **parts}
