"""``report.html`` of an evaluation: one page with everything in it, which needs no network.

::

    python -m llava_uhd.eval report RESULTS_DIR

Scores with intervals and protocol, the published numbers beside them, a radar, bars of each
category, and items with their pictures, to be filtered by task, by category and by right or wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.errors import UserError
from llava_uhd.eval.answers import read_lines
from llava_uhd.eval.report_charts import MOST_BARS, Bar, Shape, bar_chart, full_length, radar
from llava_uhd.eval.report_items import SHOWN, Album, items_of
from llava_uhd.eval.results import (
    RESULTS_NAME,
    TaskResult,
    between,
    collect,
    protocol,
    write_results,
)
from llava_uhd.page import render

REPORT_FILE = "report.html"
FAILURES = 20  # items that failed, of a task
COMPARED = 4  # published models in the radar


def write_report(output: Path, title: str) -> Path:
    """Writes the page of a results folder.

    Args:
        output: folder with a folder per task.
        title: of the model.

    Returns:
        The file.

    Raises:
        UserError: damaged results, or a file that cannot be written.
    """
    results, album = collect(output), Album()
    items = {result.task: items_of(output / result.task, result, album) for result in results}
    axes, shapes = radar_of(results)
    page = render(
        "evaluation.html",
        title=title,
        lead=f"{len(results)} task{'' if len(results) == 1 else 's'} in {output}",
        tasks=[{**_task(output, result), "items": items[result.task]} for result in results],
        problems=[r for r in results if r.problem],
        trials=[r.title for r in results if not r.problem and r.items < r.of],
        systems=_systems(results),
        radar=radar("benchmarks beside published models", axes, shapes),
        rows=[row for result in results for row in items[result.task]["rows"]],
        shown=SHOWN,
        left_out=album.left_out,
    )
    target = output / REPORT_FILE
    try:
        write_whole(target, page)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def radar_of(results: Sequence[TaskResult]) -> tuple[list[str], list[Shape]]:
    """Benchmarks with published numbers, and the values of our model and of the closest others.

    Closest are the models that were measured as ours was on most of the benchmarks, then those
    with most numbers. Trials over some of the items are left out.
    """
    published = {
        result.title: {
            each.system: each for name, each in result.published if name == result.metric
        }
        for result in results
    }
    axes = [result for result in results if published[result.title]]
    counts: dict[str, tuple[int, int]] = {}
    for result in axes:
        for name, each in published[result.title].items():
            alike, many = counts.get(name, (0, 0))
            counts[name] = (alike + (not each.remark), many + 1)
    best = sorted(counts, key=lambda name: counts[name], reverse=True)[:COMPARED]
    axes = [result for result in axes if set(best) & set(published[result.title])]
    shapes = [Shape("this model", [result.scores[result.metric] for result in axes])]
    for name in best:
        known = [published[result.title].get(name) for result in axes]
        shapes.append(Shape(name, [None if each is None else each.published for each in known]))
    return [result.title for result in axes], shapes


def _systems(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Rows of the table of published numbers: each number with the difference to ours."""
    return [
        {
            "task": result.title,
            "metric": metric,
            "ours": f"{result.scores[metric]:.4g}",
            "published": f"{each.published:g}",
            "difference": f"{each.difference:+.4g}",
            "system": each.system,
            "source": each.source,
            "remark": each.remark,
        }
        for result in results
        for metric, each in result.published
    ]


def _task(output: Path, result: TaskResult) -> dict[str, Any]:
    """A task as the page writes it."""
    folder = output / result.task
    failures = folder / "failures.jsonl"
    return {
        "name": result.task,
        "title": result.title,
        "problem": result.problem,
        "note": result.note,
        "protocol": protocol(result),
        "scores": [
            {
                "metric": row.metric,
                "main": row.metric == result.metric,
                "value": "-" if row.value is None else f"{row.value:.4g}",
                "error": "" if row.error is None else f"{row.error:.2g}",
                "intervals": {
                    kind: between(ends)
                    for kind, ends in result.intervals.get(row.metric, {}).items()
                },
                "items": row.items,
            }
            for row in result.rows
        ],
        "charts": _charts(result),
        "failures": read_lines(failures)[:FAILURES] if failures.is_file() else [],
        "settings": _json(result.settings),
        "run": _json(_read(folder / "run.json")),
    }


def _charts(result: TaskResult) -> list[dict[str, str]]:
    """Bars of the categories of each group; by the main metric, or the first that there is."""
    charts = []
    for group, values in result.breakdown.items():
        names = dict.fromkeys(name for scores in values.values() for name in scores)
        known = [name for name in names if name != "items"]
        metric = result.metric if result.metric in names else next(iter(known), None)
        if metric is None:
            continue
        bars = [
            Bar(value, scores[metric], int(scores["items"]) if "items" in scores else None)
            for value, scores in values.items()
            if metric in scores
        ]
        full = full_length([bar.value for bar in bars])
        more = len(bars) - MOST_BARS
        note = f"{more} more in {RESULTS_NAME}.md" if more > 0 else f"full length: {full:g}"
        charts.append(
            {
                "title": f"{metric} by {group}",
                "svg": bar_chart(f"{result.title} by {group}", bars, full),
                "note": f"{note}; in brackets: items",
            }
        )
    return [chart for chart in charts if chart["svg"]]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):  # a scored folder without it is still worth a page
        return {}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def add_report_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``report``."""
    parser = commands.add_parser("report", help="writes the tables and report.html again")
    parser.add_argument("results", type=Path, help="folder that a run wrote")


def report_command(options: argparse.Namespace) -> int:
    """``report``; 1 if a task has no score.

    Raises:
        UserError: a folder without results.
    """
    output = options.results
    results = collect(output)
    if not results:
        raise UserError(
            f"{output} holds no results: name the folder that a run wrote (CHECKPOINT/eval)"
        )
    title = _read(output / f"{RESULTS_NAME}.json").get("model")
    title = title or _read(output / results[0].task / "run.json").get("checkpoint", output)
    write_results(output, str(title))
    target = write_report(output, str(title))
    Console().print(f"{target}", markup=False, highlight=False, soft_wrap=True)
    return int(any(result.problem for result in results))
