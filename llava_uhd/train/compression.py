"""The schedule of visual context compression in a run: which stage each micro-batch belongs to.

Everything follows from the number of finished optimizer steps and the place of a micro-batch in its
step; nothing is counted along, so that a resumed run is in the right stage by itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.config.compression import CompressionConfig, Schedule, Stage, resolve_schedule
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.tokens import view_token_shapes
from llava_uhd.language.compressed import check_method, is_active
from llava_uhd.language.layers import check_decoder
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.train.log import append_stage
from llava_uhd.train.start import console, is_first_rank, say

INPUT = "compression"


@dataclass(frozen=True)
class RunLength:
    """How long a run is, as one of its processes sees it.

    Attributes:
        steps: optimizer steps.
        epoch: micro-batches of an epoch; at its end a step may have fewer than `accumulated`.
        accumulated: micro-batches of an optimizer step.
    """

    steps: int
    epoch: int
    accumulated: int

    @classmethod
    def planned(cls, arguments: TrainingArguments, samples: int) -> RunLength:
        """What the trainer will do with so many samples.

        Example: 10 samples on 1 device, 2 per device, 3 accumulated: 5 micro-batches, 2 steps.
        """
        size, last = arguments.train_batch_size, arguments.dataloader_drop_last
        batches = samples // size if last else -(-samples // size)
        ranks = max(arguments.world_size, 1)
        epoch = batches // ranks if last else -(-batches // ranks)
        length = cls(arguments.max_steps, epoch, arguments.gradient_accumulation_steps)
        if arguments.max_steps > 0:
            return length
        steps = math.ceil(arguments.num_train_epochs * length.steps_per_epoch)
        return dataclasses.replace(length, steps=steps)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return max(-(-self.epoch // self.accumulated), 1)

    @property
    def forwards(self) -> int:
        """Micro-batches of the run."""
        return self.forwards_before(self.steps)

    def forwards_before(self, step: int) -> int:
        """Micro-batches of the first ``step`` optimizer steps.

        Example: 5 micro-batches an epoch, 3 accumulated: 0, 3, 5, 8, 10.
        """
        epochs, inside = divmod(step, self.steps_per_epoch)
        return epochs * self.epoch + inside * self.accumulated

    def step_of(self, forward: int) -> int:
        """Optimizer step, from 0, that a micro-batch belongs to."""
        epochs, inside = divmod(forward, max(self.epoch, 1))
        return epochs * self.steps_per_epoch + inside // self.accumulated


@dataclass(frozen=True)
class Span:
    """What a run has of a stage.

    Attributes:
        stage: layer and stride.
        first: unit (step or micro-batch), from 0, that it begins with.
        stop: unit behind its last; not above `first` where the stage is never trained in.
    """

    stage: Stage
    first: int
    stop: int


def spans(schedule: Schedule, length: RunLength) -> list[Span]:
    """All stages of a schedule as a run goes through them, in the schedule's unit."""
    total = length.forwards if schedule.by_forwards else length.steps
    starts = list(schedule.starts(length.steps))
    starts += [total] * (len(schedule.stages) - len(starts) + 1)
    return [
        Span(stage, min(first, total), min(stop, total))
        for stage, first, stop in zip(schedule.stages, starts, starts[1:], strict=False)
    ]


def check_length(compression: CompressionConfig, length: RunLength) -> None:
    """Refuses a run that would outlast its counts, before anything is loaded.

    A run that ends together with them is none: each of its micro-batches has a stage. (Of the
    published program it takes the last one away, whose error comes when that pass is computed.)

    Raises:
        UserError: there are micro-batches without a stage.
    """
    if compression.schedule is None:
        return
    end = resolve_schedule(compression.schedule, 0).dies_after()
    if end is not None and length.forwards > end:
        raise UserError(
            f"compression.schedule '{compression.schedule}' has no stage after micro-batch {end}, "
            f"but the run has {length.forwards}: add a stage (off), raise its last count, or give "
            'shares instead ("2/8:0.5 off:0.5")'
        )


class ScheduledCompression(TrainerCallback):
    """The schedule of a run, asked before each of its steps.

    Args:
        compression: section of the recipe, with a schedule.
        num_layers: of the decoder.
        folder: output folder, whose log tells when a stage begins.
    """

    def __init__(self, compression: CompressionConfig, num_layers: int, folder: Path) -> None:
        self.compression = compression
        self.schedule = resolve_schedule(compression.schedule or "", num_layers)
        self.folder = folder
        self.length = RunLength(1, 1, 1)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Learns how long the run is, and what the model does after it.

        Raises:
            UserError: see `check_length`.
        """
        steps, epoch = state.max_steps, len(train_dataloader)
        self.length = RunLength(steps, epoch, args.gradient_accumulation_steps)
        check_length(self.compression, self.length)
        # Counts may end before their last stage.
        last = self.stage_of(steps - 1, self._size(steps - 1) - 1)
        model.config.compression = self.compression.of_stage(self.schedule.stages[last])
        self._tell_resumed(state.global_step)

    def _tell_resumed(self, step: int) -> None:
        """Says in which stage a run goes on, unless that begins here and is told anyway."""
        if not 0 < step < self.length.steps or not is_first_rank():
            return
        number = self.stage_of(step)
        if number != self.stage_of(step - 1, self._size(step - 1) - 1):
            return
        stage, of = self.schedule.stages[number], len(self.schedule.stages)
        say(
            f"goes on with step {step + 1}, in compression stage {number + 1} of {of}: "
            f"{stage.described}"
        )

    def stage_of(self, step: int, micro: int = 0) -> int:
        """Number of the stage, from 0, of a micro-batch.

        Args:
            step: optimizer steps before it.
            micro: micro-batches before it in its step.
        """
        unit = step
        if self.schedule.by_forwards:
            unit = self.length.forwards_before(step) + micro
        return self.schedule.stage_at(unit, self.length.steps)

    def _size(self, step: int) -> int:
        """Micro-batches of an optimizer step."""
        return self.length.forwards_before(step + 1) - self.length.forwards_before(step)

    def of_step(self, step: int, count: int) -> list[CompressionConfig]:
        """What the model does in each of the ``count`` micro-batches of a step.

        Where a stage begins, it says so and writes it into the log.
        """
        before = None if step == 0 else self.stage_of(step - 1, self._size(step - 1) - 1)
        result = []
        for micro in range(count):
            number = self.stage_of(step, micro)
            if number != before:
                self._tell(step, micro, number)
            before = number
            result.append(self.compression.of_stage(self.schedule.stages[number]))
        return result

    def _tell(self, step: int, micro: int, number: int) -> None:
        if not is_first_rank():
            return
        stage, of = self.schedule.stages[number], len(self.schedule.stages)
        place = f"step {step + 1}" + (f", micro-batch {micro + 1}" if micro else "")
        say(f"from {place}: compression stage {number + 1} of {of}: {stage.described}")
        append_stage(self.folder, step, number + 1, of, logged(stage))

    def logged(self, step: int) -> dict[str, int]:
        """What an entry of the log says after ``step`` steps: the last micro-batch's stage."""
        last = max(step - 1, 0)
        number = self.stage_of(last, self._size(last) - 1)
        return logged(self.schedule.stages[number])


def logged(stage: Stage) -> dict[str, int]:
    """A stage as numbers of the log; stride 1 stands for "off", whatever the layer."""
    return {"compression_layer": stage.layer, "compression_stride": stage.stride}


def announce_compression(
    compression: CompressionConfig, model: LlavaUHDForConditionalGeneration, length: RunLength
) -> None:
    """Prints how a run compresses, and tells what of its settings has no effect.

    Args:
        compression: section of the recipe.
        model: that it trains.
        length: of the run.

    Raises:
        UserError: see `check_stages`.
    """
    stage = Stage(compression.layer, compression.stride)
    layers = model.config.text_config.num_hidden_layers
    if stage.stride == 1 and compression.schedule is None:
        if compression.method != "none" or stage.layer >= 0:
            say("nothing is compressed: compression.stride is 1, from 2 on it merges tokens")
        return
    stages = [stage]
    if compression.schedule is None:
        say(f"compression: {stage.described} ({compression.method})")
    else:
        schedule = resolve_schedule(compression.schedule, layers)
        stages = list(schedule.stages)
        say(f"compression schedule {compression.schedule} ({compression.method}):")
        if is_first_rank():
            console.print(stage_table(schedule, length))
    check_stages(compression, stages, model)
    for warning in warnings(stages, compression.remainder, model.config):
        say(warning)


def check_stages(
    compression: CompressionConfig, stages: list[Stage], model: LlavaUHDForConditionalGeneration
) -> None:
    """Finds before training what a later stage could not do.

    Raises:
        UserError: a language model between whose layers nothing can be compressed, or a layer or
            stride that the method cannot work with.
    """
    for stage in stages:
        state = compression.of_stage(stage)
        if not is_active(state, model.config.text_config.num_hidden_layers):
            continue
        if stage.layer >= 0:
            check_decoder(model.get_decoder())
        check_method(state)


def stage_table(schedule: Schedule, length: RunLength) -> Table:
    """Stages with their first and last step (and micro-batch), counted from 1."""
    table = Table()
    units = ("micro-batches", "steps") if schedule.by_forwards else ("steps",)
    for heading in ("stage", "compression", *units):
        table.add_column(heading, justify="right" if heading in units else "left")
    for number, span in enumerate(spans(schedule, length), start=1):
        first, last = span.first, span.stop - 1
        ranges = [(first, last)]
        if schedule.by_forwards:
            ranges.append((length.step_of(first), length.step_of(last)))
        cells = ["never"] * len(units)
        if first <= last:
            cells = [f"{a + 1}" if a == b else f"{a + 1} - {b + 1}" for a, b in ranges]
        table.add_row(str(number), span.stage.described, *cells)
    return table


def warnings(stages: list[Stage], remainder: str, config: LlavaUHDConfig) -> list[str]:
    """One line for each kind of setting that does nothing, or leaves nothing, in a model."""
    layers = config.text_config.num_hidden_layers
    found = []
    deep = [s.label for s in stages if s.stride > 1 and s.layer >= layers]
    if deep:
        found.append(
            f"compression {', '.join(deep)} does nothing: the language model has {layers} layers, "
            f"so a layer below {layers} is needed"
        )
    side = config.image.scale_resolution // config.image.patch_size
    rows, columns = view_token_shapes(config.projector, [(side, side)])[0]
    widest = max(stage.stride for stage in stages)
    if rows * columns < widest:
        left = "a single one remains" if remainder == "keep" else "none of them remains"
        found.append(
            f"compression with stride {widest}: a square view has only {rows * columns} tokens in "
            f"this model, of which {left}"
        )
    return found
