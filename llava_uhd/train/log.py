"""The machine-readable log of a run, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.checkpoint.manifest import write_whole

LOG_FILE = "log.jsonl"
CURVE_FILE = "loss.png"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Entries of a run's log, oldest first; a half-written last line is left out."""
    path = folder / LOG_FILE
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class JsonLog(TrainerCallback):
    """Appends every log entry with its step; a resumed run drops what it will repeat.

    Args:
        folder: output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cuts the log back to the step that the run goes on from."""
        if not state.is_world_process_zero:
            return
        kept = [entry for entry in read_log(self.folder) if entry["step"] <= state.global_step]
        if state.global_step == 0:
            kept = []
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_whole(self.folder / LOG_FILE, text)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs where a checkpoint is written, because losses since the last entry are not in it.

        A run that goes on from there would average over fewer steps than an unbroken one.
        """
        if control.should_save:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends one entry."""
        if not state.is_world_process_zero or not logs:
            return
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without start-up bias.

    Example: ``smooth([1.0, 1.0])`` is ``[1.0, 1.0]``.
    """
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def draw_loss(folders: dict[str, Path], target: Path) -> bool:
    """Draws the loss curves of runs side by side.

    Args:
        folders: title -> output folder.
        target: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {}
    for title, folder in folders.items():
        points = [(e["step"], e["loss"]) for e in read_log(folder) if "loss" in e]
        if points:
            curves[title] = points
    if not curves:
        return False
    figure = Figure(figsize=(5.2 * len(curves), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, points) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        steps, losses = [p[0] for p in points], [p[1] for p in points]
        axes.plot(steps, losses, color="#b9c6d8", linewidth=0.8, label="each step")
        axes.plot(steps, smooth(losses), color="#1f4e8c", linewidth=1.8, label="smoothed")
        axes.set(title=title, xlabel="optimizer step", ylabel="loss per learned token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(target, dpi=110)
    return True
