"""Results of several models side by side, with tests on the items that they share.

::

    python -m llava_uhd.eval compare DIR1 DIR2 ... [--tasks A,B] [--output FOLDER]

Each is compared with the first. A test is over items, so it is there for metrics of items; of a
score that is no mean of those (MME's sums, POPE's F1) only the difference is shown.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_uhd.errors import UserError, make_folder
from llava_uhd.eval.answers import SETTINGS_FILE, read_lines
from llava_uhd.eval.results import ITEMS_FILE, TaskResult, collect, protocol, table_lines
from llava_uhd.eval.statistics import Paired, paired, unit_of
from llava_uhd.eval.tasks import TASKS, find_task

COMPARE_NAME = "compare"
# Must be the same, or the items are not.
_SAME = {
    "questions": "the questions or pictures differ",
    "task_version": "the task has changed between them: score both again",
}


@dataclass(frozen=True)
class Results:
    """A results folder.

    Attributes:
        name: in tables.
        folder: that a run wrote.
        tasks: by name.
    """

    name: str
    folder: Path
    tasks: Mapping[str, TaskResult]

    def items(self, task: str) -> dict[str | int, dict[str, Any]]:
        """Scored items of a task, by id.

        Raises:
            UserError: there are none, or one is there twice.
        """
        path = self.folder / task / ITEMS_FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist: 'score {self.folder}' writes it")
        rows = read_lines(path)
        found = {row["id"]: row for row in rows}
        if len(found) < len(rows):
            raise UserError(f"{path}: an item is there twice; 'score {self.folder}' writes it anew")
        return found


class Line(NamedTuple):
    """One metric of one task.

    Attributes:
        task: registered name.
        title: of the task.
        metric: its name.
        main: whether it stands for the task.
        values: of each folder, None where it has none.
        tests: of each folder but the first, None where there is none.
        unit: what tests are multiplied by to be in the unit of the score.
        note: what a reader has to know.
    """

    task: str
    title: str
    metric: str
    main: bool
    values: list[float | None]
    tests: list[Paired | None]
    unit: int
    note: str


def read_results(folders: Sequence[Path]) -> list[Results]:
    """Reads results folders; their names are the shortest ends of their paths that differ.

    Raises:
        UserError: fewer than two, the same twice, or one without results.
    """
    places = [folder.resolve() for folder in folders]
    if len(places) < 2 or len(set(places)) < len(places):
        raise UserError("compare: name two or more different results folders")
    found = []
    for folder in folders:
        tasks = {result.task: result for result in collect(folder)}
        if not tasks:
            raise UserError(
                f"{folder} holds no results: name the folder that a run wrote (CHECKPOINT/eval)"
            )
        found.append(tasks)
    return [
        Results(name, folder, tasks) for name, folder, tasks in zip(_names(places), folders, found)
    ]


def _names(places: Sequence[Path]) -> list[str]:
    parts = [place.parts for place in places]
    while min(map(len, parts)) > 1 and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]  # .../a/eval and .../b/eval are a and b
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def compare(found: Sequence[Results], names: Sequence[str] | None = None) -> list[Line]:
    """All metrics of the tasks that the folders share.

    Args:
        found: two or more.
        names: of tasks; None: all that are in every folder.

    Raises:
        UserError: no such task, or answers to other questions.
    """
    shared = [name for name in found[0].tasks if all(name in each.tasks for each in found)]
    for name in names or []:
        absent = [str(each.folder) for each in found if name not in each.tasks]
        if absent:
            raise UserError(f"{absent[0]} has no results of {name}: it cannot be compared")
    if not shared:
        known = "; ".join(f"{each.name}: {', '.join(each.tasks)}" for each in found)
        raise UserError(f"compare: no task is in all of the folders ({known})")
    chosen = names if names is not None else shared
    return [line for name in chosen for line in compare_task(name, found)]


def compare_task(task: str, found: Sequence[Results]) -> list[Line]:
    """All metrics of a task that each of the folders has.

    Raises:
        UserError: answers to other questions.
    """
    results = [each.tasks[task] for each in found]
    title, metric = results[0].title, results[0].metric
    problems = [
        f"{e.name}: {r.problem or r.remark}" for e, r in zip(found, results) if not r.scores
    ]
    if problems:
        nothing: list[Paired | None] = [None] * (len(found) - 1)
        scores = [each.scores.get(metric) for each in results]
        return [Line(task, title, metric, True, scores, nothing, 1, "; ".join(problems))]
    _check_same(task, found)
    items = [each.items(task) for each in found]
    common = [key for key in items[0] if all(key in each for each in items)]
    if not common:
        raise UserError(f"{task}: the folders share no item: nothing can be compared")
    whole = all(len(each) == len(common) for each in items)
    notes = [] if len({protocol(each) for each in results}) == 1 else ["protocols differ"]
    if not whole:
        notes.append(f"{len(common)} items that all have; scores are their means")
    elif len(common) < results[0].of:
        notes.append(f"first {len(common)} of {results[0].of} only")
    kept = [[each[key] for key in common] for each in items]
    scored = [each.scores if whole else {} for each in results]
    lines = _metric_lines(task, results[0], kept, scored)
    return [line._replace(note="; ".join(filter(None, [*notes, line.note]))) for line in lines]


def _metric_lines(
    task: str,
    first: TaskResult,
    kept: Sequence[Sequence[Mapping[str, Any]]],
    scored: Sequence[Mapping[str, float]],
) -> list[Line]:
    """Scores of the tasks, then metrics of items that are no score; the main one first."""
    of_items = dict.fromkeys(name for row in kept[0] for name in row["metrics"])
    names = dict.fromkeys([first.metric, *scored[0], *of_items])
    lines: list[Line] = []
    for name in names:
        rows = [r for r in zip(*kept) if all(name in each["metrics"] for each in r)]
        values: list[float | None] = [each.get(name) for each in scored]
        tests: list[Paired | None] = [None] * (len(kept) - 1)
        unit, note = 1, ""
        columns = [[float(row["metrics"][name]) for row in column] for column in zip(*rows)]
        factors = [unit_of(c, v) if v is not None else 0 for c, v in zip(columns, values)]
        if rows and (all(factors) or all(value is None for value in values)):
            # A score of 0 is 1 and 100 times a mean of 0: the other folder tells which.
            unit = max([1, *factors])
            units = [row[0].get("unit", row[0]["id"]) for row in rows]
            tests = [paired(columns[0], column, units) for column in columns[1:]]
            if all(value is None for value in values):
                values = [sum(column) / len(column) for column in columns]
                note = "mean of items"
        elif all(value is None for value in values):
            continue
        else:
            note = "no mean of items: no test"
        lines.append(Line(task, first.title, name, name == first.metric, values, tests, unit, note))
    return lines


def _check_same(task: str, found: Sequence[Results]) -> None:
    known = [_settings(each.folder / task / SETTINGS_FILE) for each in found]
    for each, settings in zip(found[1:], known[1:]):
        for key, reason in _SAME.items():
            if settings.get(key) != known[0].get(key):
                raise UserError(
                    f"{task}: {found[0].folder} and {each.folder} cannot be compared: {reason} "
                    f"('{key}' {known[0].get(key)} and {settings.get(key)})"
                )


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the folder is no whole result") from None


def left_out(found: Sequence[Results]) -> list[str]:
    """Tasks that are not in every folder, in words."""
    everywhere = set.intersection(*(set(each.tasks) for each in found))
    return [
        f"{name}: only in {', '.join(each.name for each in found if name in each.tasks)}"
        for name in dict.fromkeys(name for each in found for name in each.tasks)
        if name not in everywhere
    ]


def head_and_rows(
    found: Sequence[Results], lines: Sequence[Line]
) -> tuple[list[str], list[list[str]]]:
    """The table for people."""
    head = ["task", "metric", found[0].name]
    for each in found[1:]:
        head += [each.name, "difference", "95 %", "p", "better/worse"]
    head.append("note")
    rows = []
    for line in lines:
        row = [line.title, line.metric + " (main)" * line.main, _number(line.values[0])]
        for value, test in zip(line.values[1:], line.tests):
            row += [_number(value), *_cells(line, value, test)]
        rows.append([*row, line.note])
    return head, rows


def _cells(line: Line, value: float | None, test: Paired | None) -> list[str]:
    first = line.values[0]
    difference = "-" if value is None or first is None else f"{value - first:+.4g}"
    if test is None:
        return [difference, "", "", ""]
    low, high = (line.unit * end for end in test.interval)
    star = "*" if test.p < 0.05 else ""
    p = "<0.0001" if test.p < 1e-4 else f"{test.p:.2g}"
    return [
        difference,
        f"{low:+.3g} to {high:+.3g}",
        f"{p}{star} ({test.test})",
        f"{test.gained}/{test.lost}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def as_markdown(found: Sequence[Results], lines: Sequence[Line]) -> str:
    """``compare.md``."""
    parts = ["# Comparison", ""]
    parts += [f"- {each.name}: {each.folder}" for each in found]
    parts += [f"- left out, {text}" for text in left_out(found)]
    parts += ["", *table_lines(*head_and_rows(found, lines))]
    parts += [
        "",
        "Differences are from the first. p is two-sided: McNemar's exact test where items are 0 or "
        "1, else the paired bootstrap with a fixed seed. A star: p below 0.05, of that comparison "
        "alone; of 20 comparisons of equal models one is expected to have it.",
    ]
    return "\n".join(parts) + "\n"


def as_csv(found: Sequence[Results], lines: Sequence[Line]) -> str:
    """``compare.csv``: a line for each metric and each folder behind the first."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = "task metric main first second first_score second_score difference low high p test"
    writer.writerow([*head.split(), "items", "better", "worse", "note"])
    for line in lines:
        for each, value, test in zip(found[1:], line.values[1:], line.tests):
            first = line.values[0]
            change = None if value is None or first is None else value - first
            row: list[Any] = [line.task, line.metric, int(line.main), found[0].name, each.name]
            row += [first, value, change]
            if test is None:
                row += [None] * 7
            else:
                row += [*(line.unit * end for end in test.interval), test.p, test.test]
                row += [test.items, test.gained, test.lost]
            writer.writerow(["" if cell is None else cell for cell in [*row, line.note]])
    return buffer.getvalue()


def add_compare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``compare``."""
    parser = commands.add_parser("compare", help="results side by side, with significance")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="that runs wrote")
    parser.add_argument("--tasks", help="comma-separated; default: all that every folder has")
    parser.add_argument("--output", type=Path, help="folder for compare.md and compare.csv")


def _table(found: Sequence[Results], lines: Sequence[Line]) -> Table:
    """For a terminal, whose lines are short: a row for each folder."""
    table = Table("task", "metric", "folder", "score", "difference", "95 %", "p")
    for column in table.columns:
        column.overflow = "fold"
    for line in lines:
        cells = [[_number(line.values[0]), "", "", ""]]
        for value, test in zip(line.values[1:], line.tests):
            cells.append([_number(value), *_cells(line, value, test)[:3]])
        for number, (each, row) in enumerate(zip(found, cells)):
            about = [line.task, line.metric] if number == 0 else ["", ""]
            table.add_row(*map(escape, [*about, each.name, *row]))
        table.add_section()
    return table


def compare_command(options: argparse.Namespace) -> int:
    """``compare``; 1 if a task failed in one of the folders."""
    found = read_results(options.folders)
    words = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    names = [name if name in TASKS.names() else find_task(name).name for name in words]
    lines = compare(found, names or None)
    console = Console()
    console.print(_table(found, lines))
    notes = dict.fromkeys(f"{line.task}: {line.metric}: {line.note}" for line in lines if line.note)
    for text in [*notes, *(f"left out, {text}" for text in left_out(found))]:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.output is not None:
        make_folder(options.output, "output folder")
        for ending, text in (("md", as_markdown(found, lines)), ("csv", as_csv(found, lines))):
            file = options.output / f"{COMPARE_NAME}.{ending}"
            file.write_text(text, "utf-8")
            console.print(f"{file}", markup=False, highlight=False, soft_wrap=True)
    return int(any(each.tasks[line.task].problem for line in lines for each in found))
