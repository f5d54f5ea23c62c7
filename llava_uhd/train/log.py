"""The machine-readable log of a run, and its picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.checkpoint.manifest import write_whole

LOG_FILE = "log.jsonl"
# Entries with this key tell that a stage of compression begins.
STAGE = "compression_stage"
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
        done = state.global_step
        kept = [
            entry
            for entry in read_log(self.folder)
            # A stage of compression begins behind the step that it names.
            if entry["step"] < done or (entry["step"] == done and STAGE not in entry)
        ]
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
        _append(self.folder, {"step": state.global_step, **logs})


def _append(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / LOG_FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def append_stage(folder: Path, step: int, number: int, of: int, values: dict[str, int]) -> None:
    """Writes that a stage of compression begins.

    Args:
        folder: output folder.
        step: optimizer steps before it.
        number: of the stage, from 1.
        of: number of stages.
        values: ``compression_layer`` and ``compression_stride``.
    """
    _append(folder, {"step": step, STAGE: number, "compression_stages": of, **values})


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


class StageMark(NamedTuple):
    """A stage of compression in the picture.

    Attributes:
        first: step that it begins behind.
        last: its last step.
        label: layer/stride, or "off".
    """

    first: int
    last: int
    label: str


def stage_marks(entries: list[dict[str, Any]], last: int) -> list[StageMark]:
    """Stages of a log, as far as they were trained in.

    Args:
        entries: of the log.
        last: step of the last loss.
    """
    begun = [entry for entry in entries if STAGE in entry and entry["step"] < last]
    stops = [entry["step"] for entry in begun[1:]] + [last]
    marks = []
    for entry, stop in zip(begun, stops, strict=False):
        layer, stride = entry["compression_layer"], entry["compression_stride"]
        label = "off" if stride == 1 else f"{layer}/{stride}"
        marks.append(StageMark(entry["step"], stop, label))
    return marks


def _draw_stages(axes: Any, marks: list[StageMark]) -> None:
    """A thin line where a stage begins, its name above the middle of it.

    Names of neighbours that are short stand one below the other.
    """
    if not marks:
        return
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)
    width, before, row = marks[-1].last, -math.inf, 0
    for index, mark in enumerate(marks):
        if index:
            axes.axvline(mark.first + 0.5, color="#c46a1b", linewidth=0.8, linestyle=(0, (4, 3)))
        middle = (mark.first + mark.last + 1) / 2
        row = row + 1 if middle - before < 0.1 * width else 0
        before = middle
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
        axes.text(middle, 0.97 - 0.07 * row, mark.label, fontsize=8, color="#c46a1b", **place)


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
        entries = read_log(folder)
        points = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        if points:
            held = [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
            curves[title] = points, held, stage_marks(entries, points[-1][0])
    if not curves:
        return False
    figure = Figure(figsize=(5.2 * len(curves), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, (points, held, marks)) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        steps, losses = [p[0] for p in points], [p[1] for p in points]
        axes.plot(steps, losses, color="#b9c6d8", linewidth=0.8, label="each step")
        axes.plot(steps, smooth(losses), color="#1f4e8c", linewidth=1.8, label="smoothed")
        if held:
            axes.plot(*zip(*held), "o-", color="#2f7d4f", markersize=3.5, label="held out")
        axes.set(title=title, xlabel="optimizer step", ylabel="loss per learned token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        _draw_stages(axes, marks)
        axes.legend(frameon=bool(marks), edgecolor="none", framealpha=0.9)
    figure.savefig(target, dpi=110)
    return True
