"""The figures of a report: what its tables and charts say, from the files of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_uhd.page import COLOURS
from llava_uhd.train.log import read_log, smooth, stage_marks
from llava_uhd.train.meter import TIME
from llava_uhd.train.record import read_record
from llava_uhd.train.report_charts import Mark, Point, Series, area_chart, line_chart
from llava_uhd.train.report_samples import read_samples
from llava_uhd.train.timing import MEANINGS, PARTS

Row = dict[str, Any]

TITLES = {
    "data": "waiting for data",
    "vision_tower": "tower, forward",
    "projector": "projector, forward",
    "language_model": "language model, forward",
    "backward_language_model": "language model, backward",
    "backward_projector": "projector, backward",
    "backward_vision_tower": "tower, backward",
    "optimizer": "optimizer",
    "other": "other",
}
HELD_OUT = "eval_loss"


@dataclass(frozen=True)
class Run:
    """A run as its files tell it.

    Attributes:
        name: in tables and legends.
        folder: of its files.
        entries: of its log with a loss of training.
        log: all of them.
        record: see `llava_uhd.train.record`.
        samples: see `llava_uhd.train.report_samples`.
    """

    name: str
    folder: Path
    entries: list[dict[str, Any]]
    log: list[dict[str, Any]]
    record: dict[str, Any]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, name: str) -> Run:
        """Reads the files; any of them may be missing."""
        log = read_log(folder)
        entries = [entry for entry in log if "loss" in entry]
        return cls(name, folder, entries, log, read_record(folder), read_samples(folder))

    def points(self, key: str) -> list[Point]:
        """(step, value) of a key of the log."""
        return [(e["step"], e[key]) for e in self.log if isinstance(e.get(key), int | float)]

    def middle(self, key: str) -> float | None:
        """Median of a key over the steps, the first entry left out, which warms up."""
        values = [value for _, value in self.points(key)]
        return statistics.median(values[1:] or values) if values else None

    @property
    def marks(self) -> list[Mark]:
        """Borders of the stages of compression."""
        if not self.entries:
            return []
        return [
            Mark(mark.first + 0.5 if number else None, (mark.first + mark.last + 1) / 2, mark.label)
            for number, mark in enumerate(stage_marks(self.log, self.entries[-1]["step"]))
        ]


def flat_recipe(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_recipe(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def summary(runs: Sequence[Run]) -> list[Row]:
    """The table at the top; rows that no run has anything to say to are left out."""

    def middle(key: str, form: str) -> Callable[[Run], str]:
        return lambda run: _number(run.middle(key), form)

    rows: list[tuple[str, str, Callable[[Run], str]]] = [
        ("stage", "", lambda run: str(run.record.get("stage", ""))),
        ("steps", "", _steps),
        ("loss, last entry", "", lambda run: _last(run, "loss")),
        ("loss, smoothed", "", _smoothed),
        ("held-out loss, last", "", lambda run: _last(run, HELD_OUT)),
        ("devices", "", _devices),
        ("time of the logged steps", "", _duration),
        ("seconds of a step", "median", middle("step_seconds", ".4g")),
        ("samples per second", "median, all devices", middle("samples_per_second", ",.2f")),
        ("tokens per second", "median, all devices", middle("tokens_per_second", ",.0f")),
        ("visual tokens per second", "", middle("visual_tokens_per_second", ",.0f")),
        ("learned tokens per second", "", middle("learned_tokens_per_second", ",.0f")),
        ("padding", "positions without a token", middle("padding", ".1%")),
        ("TFLOP/s per device", "median, model FLOPs", middle("tflops_per_second", ".4g")),
        ("MFU", "median", middle("mfu", ".1%")),
        ("waiting for data", "part of a step", _waiting),
        ("peak memory", "of the first device, GiB", lambda run: _last(run, "peak_memory_gib")),
    ]
    table = [
        {"name": name, "note": note, "values": [value(run) for run in runs]}
        for name, note, value in rows
    ]
    return [row for row in table if any(row["values"])]


def _last(run: Run, key: str) -> str:
    points = run.points(key)
    return f"{points[-1][1]:.4g}" if points else ""


def _smoothed(run: Run) -> str:
    losses = [entry["loss"] for entry in run.entries]
    return f"{smooth(losses)[-1]:.4g}" if losses else ""


def _steps(run: Run) -> str:
    if not run.entries:
        return "0"
    last, starts = f"{run.entries[-1]['step']:,}", run.record.get("starts")
    return f"{last} of {starts[-1]['max_steps']:,}" if starts else last


def _devices(run: Run) -> str:
    ranks = (run.record.get("starts") or [{}])[-1].get("ranks", [])
    names = {str(rank.get("name")) for rank in ranks}
    return f"{len(ranks)} x {', '.join(sorted(names))}" if ranks else ""


def _duration(run: Run) -> str:
    runtime = [entry["train_runtime"] for entry in run.log if "train_runtime" in entry]
    steps = [entry["step_seconds"] for entry in run.entries if "step_seconds" in entry]
    seconds = sum(steps) * _spacing(run) if steps else sum(runtime)
    if not seconds:
        return ""
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"


def _spacing(run: Run) -> float:
    """Steps between two entries of the log."""
    return run.entries[-1]["step"] / max(len(run.entries), 1) if run.entries else 1.0


def _waiting(run: Run) -> str:
    waited, whole = run.middle(f"{TIME}data"), run.middle("step_seconds")
    return "" if waited is None or not whole else f"{waited / whole:.1%}"


def times(runs: Sequence[Run]) -> list[Row]:
    """Mean seconds of each part of a step; empty if no run has any."""
    rows = []
    for part in PARTS:
        values = [run.points(f"{TIME}{part}") for run in runs]
        if not any(value for points in values for _, value in points):
            continue
        wholes = [run.points("step_seconds") for run in runs]
        cells = [_share(points, whole) for points, whole in zip(values, wholes)]
        rows.append({"name": TITLES[part], "values": cells, "note": MEANINGS[part]})
    return rows


def _share(points: Sequence[Point], wholes: Sequence[Point]) -> str:
    """Mean seconds and their part of the whole; the first entry warms up and is left out."""
    if not points:
        return ""
    skip = 1 if len(points) > 1 else 0
    seconds = statistics.fmean(value for _, value in points[skip:])
    whole = statistics.fmean(value for _, value in wholes[skip:]) if wholes else 0.0
    return f"{seconds:.4g} s ({seconds / whole:.1%})" if whole else f"{seconds:.4g} s"


# --- charts ---------------------------------------------------------------------------------------


def charts(runs: Sequence[Run]) -> list[Row]:
    """All charts that have something to show: title, SVG and a note."""
    made = [
        ("Loss per learned token", _loss(runs), "pale: each entry of the log; dots: held out"),
        ("Learning rates", _rates(runs), ""),
        ("Gradient norm, before clipping", _lines(runs, "grad_norm"), ""),
        ("Tokens per second", _tokens(runs), "all devices"),
        ("MFU", _lines(runs, "mfu", percent=True), "of the peak below"),
        ("TFLOP/s per device", _lines(runs, "tflops_per_second"), "model FLOPs"),
        ("Samples per second", _lines(runs, "samples_per_second"), "all devices"),
        ("Peak memory, GiB", _lines(runs, "peak_memory_gib"), "of the first device"),
    ]
    for run in runs:
        title = "Seconds of a step" if len(runs) == 1 else f"Seconds of a step: {run.name}"
        made.append((title, _areas(run), "mean over the devices"))
    return [{"title": title, "svg": svg, "note": note} for title, svg, note in made if svg]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _loss(runs: Sequence[Run]) -> str:
    series = []
    for number, run in enumerate(runs):
        points, colour = run.points("loss"), _colour(number)
        values = smooth([value for _, value in points])
        smoothed = [(step, value) for (step, _), value in zip(points, values)]
        series.append(Series("", points, colour, faint=True))
        name = "smoothed" if len(runs) == 1 else run.name
        series.append(Series(name, smoothed, colour))
        held = "held out" if len(runs) == 1 else f"{run.name}, held out"
        series.append(Series(held, run.points(HELD_OUT), _colour(number + len(runs)), dots=True))
    marks = runs[0].marks if len(runs) == 1 else []
    return line_chart("loss", series, marks)


def _lines(runs: Sequence[Run], key: str, percent: bool = False) -> str:
    series = [
        Series(run.name if len(runs) > 1 else "", run.points(key), _colour(number))
        for number, run in enumerate(runs)
    ]
    return line_chart(key, series, percent=percent)


def _rates(runs: Sequence[Run]) -> str:
    series: list[Series] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        parts = dict.fromkeys(
            key for entry in run.entries for key in entry if key.startswith("learning_rate_")
        )
        for key in parts or ("learning_rate",):
            part = key.removeprefix("learning_rate").strip("_").replace("_", " ")
            name = f"{prefix}{part or 'all parts'}"
            series.append(Series(name, run.points(key), _colour(len(series))))
    return line_chart("learning rates", series)


def _tokens(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return _lines(runs, "tokens_per_second")
    names = {
        "all": "tokens_per_second",
        "visual": "visual_tokens_per_second",
        "learned": "learned_tokens_per_second",
    }
    series = [
        Series(name, runs[0].points(key), _colour(number))
        for number, (name, key) in enumerate(names.items())
    ]
    return line_chart("tokens per second", series)


def _areas(run: Run) -> str:
    entries = [entry for entry in run.entries if f"{TIME}data" in entry]
    layers = [
        (TITLES[part], [float(entry.get(f"{TIME}{part}", 0.0)) for entry in entries])
        for part in PARTS
    ]
    shown = [(name, heights) for name, heights in layers if any(heights)]
    return area_chart("seconds of a step", [entry["step"] for entry in entries], shown)
