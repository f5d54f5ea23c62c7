"""What a judge said about the answers of a run, kept beside them: re-scoring finds it there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.answers import write_json
from llava_uhd.eval.judge.asking import Verdict
from llava_uhd.eval.metrics import mean, mean_of_each
from llava_uhd.eval.published import read_object
from llava_uhd.eval.results import TaskResult, task_result
from llava_uhd.eval.task import Scored, Task

JUDGE_FILE = "judge.json"


def answers_digest(answers: Mapping[str | int, str]) -> str:
    """16 hexadecimal digits of all answers that were judged, whatever their order."""
    rows = sorted(json.dumps([key, text]) for key, text in answers.items())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def write_verdicts(
    folder: Path,
    facts: Mapping[str, Any],
    runs: Sequence[Sequence[Verdict]],
    answers: Mapping[str | int, str],
    compatible: bool,
) -> None:
    """Writes ``judge.json`` into the folder of a task.

    Args:
        folder: results of the task.
        facts: the judge's model, prompt, parameters, and whatever else is worth keeping.
        runs: verdicts of each run.
        answers: that were judged.
        compatible: a reply that could not be read counts as the published program counts it.
    """
    written = [
        [
            {
                "id": each.question.id,
                "reply": each.reply,
                "metrics": each.metrics,
                "problem": each.problem,
                "counted": _counted(each, compatible),
            }
            for each in verdicts
        ]
        for verdicts in runs
    ]
    known = {**facts, "compatible": compatible, "answers": answers_digest(answers)}
    write_json(folder / JUDGE_FILE, {"judge": known, "runs": written})


def _counted(verdict: Verdict, compatible: bool) -> Mapping[str, float] | None:
    if verdict.metrics is None and verdict.reply is not None and compatible:
        return verdict.question.fallback
    return verdict.metrics


def with_verdicts(
    folder: Path, task: Task, scored: Sequence[Scored], result: TaskResult
) -> tuple[TaskResult, list[Scored]]:
    """Scores with what a judge said, if ``folder`` holds it for these answers.

    Args:
        folder: results of the task.
        task: that was answered.
        scored: without the judge.
        result: likewise.

    Raises:
        UserError: a damaged file.
    """
    path = folder / JUDGE_FILE
    if not path.is_file():
        return result, list(scored)
    value = read_object(path)
    try:
        judge, runs = value["judge"], value["runs"]
        tables = [{row["id"]: row["counted"] for row in rows} for rows in runs]
        unread = [row["id"] for rows in runs for row in rows if row["metrics"] is None]
        name, prompt, digest = judge["model"], judge["prompt"], judge["answers"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and judge again") from error
    if digest != answers_digest({each.item.id: each.answer for each in scored}):
        remark = f"{JUDGE_FILE} is about other answers: judge again"
        return dataclasses.replace(result, remark=remark), list(scored)
    task = task.with_settings(result.settings)
    each_run = [_judged(scored, table) for table in tables]
    results = [task_result(task, rows, result.of, result.settings) for rows in each_run]
    words = [f"judged by {name}", *_about_runs(results, result.metric)]
    if prompt == "own":
        words.append("with a prompt of our own: not comparable with published scores")
    if unread:
        some = ", ".join(map(repr, unread[:5])) + ", ..." * (len(unread) > 5)
        how = "counted as published" if judge.get("compatible") else "left out"
        words.append(f"without a verdict: {len(unread)} ({some}), {how}")
    first = results[0]
    joined = dataclasses.replace(
        first,
        scores=mean_of_each([each.scores for each in results]),
        breakdown=_mean_tables([each.breakdown for each in results]),
        # Items of one run say nothing about the mean of several.
        error=first.error if len(results) == 1 else None,
        intervals=first.intervals if len(results) == 1 else {},
        remark="; ".join(words),
        settings={**result.settings, "judge": judge},
    )
    return joined, each_run[0]


def _judged(scored: Sequence[Scored], table: Mapping[Any, Any]) -> list[Scored]:
    return [
        dataclasses.replace(each, metrics={**each.metrics, **(table.get(each.item.id) or {})})
        for each in scored
    ]


def _about_runs(results: Sequence[TaskResult], metric: str) -> list[str]:
    """Each run's main score, and how far they spread."""
    scores = [each.scores[metric] for each in results if metric in each.scores]
    if len(results) < 2 or not scores:
        return []
    spread = (mean((score - mean(scores)) ** 2 for score in scores)) ** 0.5
    listed = ", ".join(f"{score:.1f}" for score in scores)
    return [f"mean of {len(scores)} runs ({listed}; deviation {spread:.1f})"]


def _mean_tables(
    tables: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]],
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        group: {
            value: mean_of_each([table[group][value] for table in tables])
            for value in tables[0][group]
        }
        for group in tables[0]
    }
