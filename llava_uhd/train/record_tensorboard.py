"""TensorBoard's files of a run, whatever else it reports to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.train.start import say

BOARD_FOLDER = "tensorboard"


def tensorboard(folder: Path) -> list[TrainerCallback]:
    """The callback that writes them into the output folder; none where the package is missing.

    Args:
        folder: output folder.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError:
        say("no files for TensorBoard: the package is not installed (pip install tensorboard)")
        return []
    return [Board(folder / BOARD_FOLDER)]


class Board(TrainerCallback):
    """Writes every number of the log, under the library's names.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens a file; a run that goes on hides what an earlier start logged behind its step."""
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter

        step = state.global_step
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one entry."""
        if self._writer is None:
            return
        from transformers.integrations.integration_utils import rewrite_logs

        for name, value in rewrite_logs(logs or {}).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, state.global_step)
        self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
