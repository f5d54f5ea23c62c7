"""Everything that writes down what a run does, added to its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from llava_uhd.data.packed import PackedSamples
from llava_uhd.train.meter import CLOCK_KEYS
from llava_uhd.train.record import RunRecord
from llava_uhd.train.record_tensorboard import tensorboard
from llava_uhd.train.report import ReportCallback
from llava_uhd.train.report_samples import write_samples
from llava_uhd.train.start import is_first_rank
from llava_uhd.train.trainer import StageTrainer

# On the screen; the log has the rest.
SHOWN_CLOCKS = ("samples_per_second", "tokens_per_second", "mfu")


def shown(logs: dict[str, Any] | None) -> dict[str, Any]:
    """Those entries of the log that fit a line of the screen."""
    return {k: v for k, v in (logs or {}).items() if k not in CLOCK_KEYS or k in SHOWN_CLOCKS}


class ShortProgress(ProgressCallback):
    """The library's progress bar with short lines."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a line above the bar."""
        super().on_log(args, state, control, logs=shown(logs), **kwargs)


class ShortPrinter(PrinterCallback):
    """The library's lines without a progress bar, shorter."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints a line."""
        super().on_log(args, state, control, logs=shown(logs), **kwargs)


def add_records(trainer: StageTrainer, folder: Path) -> None:
    """Adds record, TensorBoard files and report, and writes the samples that the report shows.

    Args:
        trainer: of the run.
        folder: output folder.
    """
    if is_first_rank():
        data = trainer.train_dataset
        write_samples(data.samples if isinstance(data, PackedSamples) else data, folder)
    for plain, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
        if trainer.pop_callback(plain) is not None:
            trainer.add_callback(short())
    # The library's own would write into a folder of another name.
    trainer.remove_callback(TensorBoardCallback)
    trainer.add_callback(RunRecord(folder, trainer.recipe, trainer.meter))
    for callback in tensorboard(folder):
        trainer.add_callback(callback)
    trainer.add_callback(ReportCallback(folder))
