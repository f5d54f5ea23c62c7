"""Scores of one or more tasks as a table, in Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava_uhd.checkpoint.compression import short_name
from llava_uhd.errors import UserError
from llava_uhd.eval.answers import Answer, write_json, write_lines
from llava_uhd.eval.metrics import mean, standard_error
from llava_uhd.eval.published_scores import Beside, beside
from llava_uhd.eval.statistics import ends, intervals
from llava_uhd.eval.task import Item, Scored, Task

SCORES_FILE = "scores.json"
ITEMS_FILE = "items.jsonl"
RESULTS_NAME = "results"


class Row(NamedTuple):
    """One score in a table: metric, value, standard error, number of items, 95 % interval."""

    metric: str
    value: float | None
    error: float | None
    items: int
    ends: Sequence[float] | None = None


@dataclass(frozen=True)
class TaskResult:
    """Everything a table says about a task.

    Attributes:
        task: registered name.
        title: of the task.
        metric: the main one.
        scores: metric -> value; empty when the task could not be scored.
        error: standard error of the main metric over the items, if it is their mean.
        items: number of scored items.
        counts: metric -> number of items it applies to, where that is not all of them.
        of: number of items of the whole task.
        problem: why there is no score, or an empty text.
        remark: what has to be done with answers that cannot be scored here, or an empty text.
        settings: protocol of the run.
        breakdown: group -> value -> scores.
        intervals: metric -> kind -> ends of the 95 % interval, see `statistics.intervals`.
    """

    task: str
    title: str
    metric: str
    scores: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    items: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    of: int = 0
    problem: str = ""
    remark: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    breakdown: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether there is a score of all items."""
        return bool(self.scores) and self.items >= self.of

    @property
    def published(self) -> list[tuple[str, Beside]]:
        """Metric and published number, of each that there is; none for a part of the items."""
        return [
            (name, each)
            for name, value in self.scores.items()
            if self.whole
            for each in beside(self.task, name, value, self.settings, self.of)
        ]

    @property
    def note(self) -> str:
        """What a reader of the number has to know."""
        part = f"first {self.items} of {self.of} only: not comparable" * (self.items < self.of)
        return "; ".join(
            filter(None, (short_name(self.settings), self.problem or part, self.remark))
        )

    @property
    def rows(self) -> list[Row]:
        """One per score; one without a value if there is none."""
        return [
            Row(
                name,
                value,
                self.error if name == self.metric else None,
                self.counts.get(name, self.items),
                ends(self.intervals.get(name, {})),
            )
            for name, value in self.scores.items()
        ] or [Row(self.metric, None, None, self.items)]


def check_ids(wanted: Sequence[Item], known: Sequence[Item], answered: Mapping[Any, Any]) -> str:
    """Compares answered with wanted ids.

    Args:
        wanted: items to score now.
        known: all items of the task.
        answered: by id.

    Returns:
        An empty text, or what is missing or foreign.
    """
    missing = [item.id for item in wanted if item.id not in answered]
    foreign = sorted(map(repr, set(answered) - {item.id for item in known}))
    problems = []
    if missing:
        some = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        problems.append(f"{len(missing)} of {len(wanted)} items have no answer ({some})")
    if foreign:
        problems.append(f"{len(foreign)} answers belong to no item ({', '.join(foreign[:5])})")
    return "; ".join(problems)


def score_answers(
    task: Task,
    items: Sequence[Item],
    answers: Mapping[str | int, Answer],
    total: int,
    settings: Mapping[str, Any],
) -> tuple[TaskResult, list[Scored]]:
    """Scores complete answers.

    Args:
        task: scores them.
        items: each has an answer.
        answers: by id.
        total: number of items of the whole task.
        settings: shown beside the scores.
    """
    task, scored = task.with_settings(settings), []
    for item in items:
        text = answers[item.id].text
        parsed = task.parse(item, text)
        scored.append(Scored(item, text, parsed, task.score(item, parsed)))
    return task_result(task, scored, total, settings), scored


def task_result(
    task: Task, scored: Sequence[Scored], total: int, settings: Mapping[str, Any]
) -> TaskResult:
    """The scores of a task from those of its items.

    Args:
        task: aggregates them.
        scored: all items.
        total: number of items of the whole task.
        settings: shown beside the scores.
    """
    scores = task.aggregate(scored)
    main = [each.metrics[task.main_metric] for each in scored if task.main_metric in each.metrics]
    # Only where the score is a plain mean does its error follow from the items.
    score = scores.get(task.main_metric, math.nan)
    unit = next((unit for unit in (1, 100) if main and math.isclose(unit * mean(main), score)), 0)
    return TaskResult(
        task=task.name,
        title=task.title,
        metric=task.main_metric,
        scores=scores,
        error=unit * standard_error(main) if unit else None,
        items=len(scored),
        counts={name: count for name, count in _counts(scored).items() if name in scores},
        of=total,
        settings=dict(settings),
        breakdown=task.breakdown(scored),
        intervals=intervals(
            scored,
            [each.metrics for each in scored],
            [task.unit(each.item) for each in scored],
            scores,
            task.main_metric,
            task.aggregate,
        ),
    )


def _counts(scored: Sequence[Scored]) -> dict[str, int]:
    return dict(Counter(name for each in scored for name in each.metrics))


def item_rows(
    task: Task, scored: Sequence[Scored], answers: Mapping[str | int, Answer]
) -> list[dict]:
    """One row per item, for viewers: what was asked, said, read, expected, and its scores."""
    return [
        {
            "id": each.item.id,
            "unit": task.unit(each.item),
            "images": [str(image) for image in each.item.images if isinstance(image, str | Path)],
            "question": each.item.question,
            "prompt": answers[each.item.id].prompt,
            "answer": each.answer,
            "parsed": each.parsed,
            "reference": each.item.reference,
            "metrics": dict(each.metrics),
            "groups": dict(each.item.groups),
            "prompt_tokens": answers[each.item.id].prompt_tokens,
            "new_tokens": answers[each.item.id].new_tokens,
        }
        for each in scored
    ]


def write_task(folder: Path, result: TaskResult, rows: Sequence[dict] = ()) -> None:
    """Writes the scores of one task, and its items if it was scored."""
    write_json(folder / SCORES_FILE, asdict(result))
    if rows:
        write_lines(folder / ITEMS_FILE, rows)
    else:
        (folder / ITEMS_FILE).unlink(missing_ok=True)


def collect(output: Path) -> list[TaskResult]:
    """Results of all tasks under a results folder, by name.

    Raises:
        UserError: a damaged file.
    """
    results = []
    for path in sorted(output.glob(f"*/{SCORES_FILE}")):
        try:
            result = TaskResult(**json.loads(path.read_text("utf-8")))
            for field in (result.scores, result.counts, result.settings, result.breakdown):
                if not isinstance(field, dict):
                    raise TypeError("an object is expected where another value stands")
            results.append(result)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it and score again") from error
    return results


def write_results(output: Path, title: str) -> list[TaskResult]:
    """Writes ``results.md``, ``.csv`` and ``.json`` over all tasks of a results folder."""
    results = collect(output)
    write_json(
        output / f"{RESULTS_NAME}.json",
        {
            "model": title,
            "tasks": {
                result.task: {
                    **asdict(result),
                    "published": [{"metric": m, **asdict(each)} for m, each in result.published],
                }
                for result in results
            },
        },
    )
    (output / f"{RESULTS_NAME}.md").write_text(markdown(results, title), "utf-8")
    (output / f"{RESULTS_NAME}.csv").write_text(as_csv(results), "utf-8")
    return results


def protocol(result: TaskResult) -> str:
    """The protocol of a row in words."""
    known = result.settings
    return f"{known.get('protocol', 'ours')}, beams {known.get('beams', '?')}"


def markdown(results: Sequence[TaskResult], title: str) -> str:
    """Table of all tasks, then the breakdowns."""
    lines = [f"# {_cell(title)}", ""]
    lines += table_lines(
        ["task", "metric", "score", "± s.e.", "95 %", "items", "protocol", "note"],
        [
            [
                result.title,
                row.metric + " (main)" * (row.metric == result.metric and len(result.scores) > 1),
                "-" if row.value is None else f"{row.value:.4g}",
                "" if row.error is None else f"{row.error:.2g}",
                between(row.ends),
                row.items,
                protocol(result),
                result.note,
            ]
            for result in results
            for row in result.rows
        ],
    )
    lines += _published_lines(results)
    for result in results:
        for group, values in result.breakdown.items():
            names = dict.fromkeys(name for scores in values.values() for name in scores)
            lines += ["", f"## {_cell(result.title)} by {_cell(group)}", ""]
            rows = [
                [value, *(f"{scores[name]:.4g}" if name in scores else "" for name in names)]
                for value, scores in values.items()
            ]
            lines += table_lines([group, *names], rows)
    return "\n".join(lines) + "\n"


def between(ends: Sequence[float] | None) -> str:
    """An interval in words; empty without one."""
    return "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _published_lines(results: Sequence[TaskResult]) -> list[str]:
    rows = [
        [
            result.title,
            metric,
            f"{result.scores[metric]:.4g}",
            f"{each.published:g}",
            f"{each.difference:+.4g}",
            each.system,
            each.source,
            each.remark,
        ]
        for result in results
        for metric, each in result.published
    ]
    if not rows:
        return []
    head = ["task", "metric", "ours", "published", "difference", "system", "source", "comparable?"]
    return ["", "## Beside published numbers", "", *table_lines(head, rows)]


def table_lines(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_csv(results: Sequence[TaskResult]) -> str:
    """One line per task and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    systems = dict.fromkeys(each.system for r in results for _, each in r.published)
    head = "task metric main score error low high items of protocol note".split()
    writer.writerow([*head, *(f"published {name}" for name in systems)])
    for result in results:
        for row in result.rows:
            low, high = row.ends or (None, None)
            known = (row.value, row.error, low, high)
            numbers = ["" if number is None else repr(number) for number in known]
            about = [row.items, result.of, protocol(result), result.note]
            main = int(row.metric == result.metric)
            beside_it = {
                e.system: e.published for name, e in result.published if name == row.metric
            }
            columns = [beside_it.get(name, "") for name in systems]
            writer.writerow([result.task, row.metric, main, *numbers, *about, *columns])
    return buffer.getvalue()
