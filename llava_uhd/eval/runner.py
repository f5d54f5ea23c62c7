"""The one loop: every task of every model goes through here."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_uhd.errors import UserError
from llava_uhd.eval.answers import (
    MERGED_FILE,
    SETTINGS_FILE,
    Answer,
    AnswerLog,
    check_settings,
    make_answer,
    read_answers,
    read_lines,
    settings_hash,
    write_json,
    write_lines,
)
from llava_uhd.eval.generate import Answerer, Failure, Limits
from llava_uhd.eval.judge.verdicts import with_verdicts
from llava_uhd.eval.layout import remark, write_published, write_submissions
from llava_uhd.eval.progress import Meter
from llava_uhd.eval.ranks import Ranks
from llava_uhd.eval.results import TaskResult, check_ids, item_rows, score_answers, write_task
from llava_uhd.eval.task import Item, Task

logger = logging.getLogger(__name__)

FAILURES_FILE = "failures.jsonl"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Job:
    """One task for one model.

    Attributes:
        task: the benchmark.
        items: all of them, in the task's order.
        limit: answer and score only so many, the first; None for all.
        folder: everything of this task is written there.
        data: folder of the task's data, for scoring again later.
        settings: whatever can change an answer; see `answers.settings_hash`.
        provenance: facts to record beside the scores.
    """

    task: Task
    items: Sequence[Item]
    limit: int | None
    folder: Path
    data: Path
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def wanted(self) -> Sequence[Item]:
        """Items to answer."""
        return self.items[: self.limit]


def prepare(jobs: Sequence[Job], ranks: Ranks, overwrite: bool) -> None:
    """Checks what lies in the folders of all jobs before any of them begins.

    Args:
        jobs: to run.
        ranks: all of them call this.
        overwrite: throw earlier answers away.

    Raises:
        UserError: answers made with other settings, or damaged files.
    """
    for job in jobs:
        if not overwrite:
            check_settings(job.folder, job.settings)
            read_answers(job.folder, job.settings)
    ranks.wait()
    if ranks.rank == 0:
        for job in jobs:
            if overwrite:
                _clear(job.folder)
            try:
                job.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"output folder {job.folder} cannot be made ({reason})") from error
            for stale in job.folder.glob("failures*.jsonl"):
                stale.unlink()
            settings = dict(job.settings)
            write_json(
                job.folder / SETTINGS_FILE,
                {"hash": settings_hash(settings), "settings": settings},
            )
            write_json(
                job.folder / RUN_FILE,
                {**job.provenance, "data": str(job.data), "limit": job.limit},
            )
    ranks.wait()


def _clear(folder: Path) -> None:
    # Only a folder that an evaluation wrote: a mistyped --output must not cost anything else.
    if (folder / SETTINGS_FILE).is_file():
        shutil.rmtree(folder)


def run_job(
    job: Job, answerer: Answerer, ranks: Ranks, console: Console
) -> tuple[TaskResult | None, list[Failure]]:
    """Answers what is not answered yet, then scores.

    Args:
        job: prepared.
        answerer: of this job's task.
        ranks: all of them call this; the first one merges and scores.
        console: for progress.

    Returns:
        The result (None on other ranks than the first) and the failed items.
    """
    # The shares depend on the items only, never on what is done already: processes start at
    # different moments, and a rerun may have another number of them.
    by_length = sorted(job.wanted, key=lambda item: -answerer.length(item))
    failures: list[Failure] = []
    with AnswerLog(job.folder, ranks.rank, job.settings) as log:
        # Read behind the lock: a process of a killed launcher may have written until now.
        done = read_answers(job.folder, job.settings)
        mine = [item for item in ranks.share(by_length) if item.id not in done]
        if done and ranks.rank == 0:
            left = len([item for item in job.wanted if item.id not in done])
            console.print(f"{job.task.name}: going on, {left} of {len(job.wanted)} items to do")
        with Meter(console, job.task.name, len(mine), quiet=ranks.rank > 0) as meter:
            for outcome in answerer.run(mine):
                log.append(outcome.answers, outcome.seconds)
                failures += outcome.failures
                meter.advance(len(outcome.answers) + len(outcome.failures))
    if failures:
        write_lines(
            job.folder / f"failures.rank{ranks.rank}.jsonl",
            [{"id": each.id, "reason": each.reason} for each in failures],
        )
    ranks.wait()
    if ranks.rank > 0:
        return None, failures
    failures = _merge_failures(job.folder)
    return _conclude(job, failures), failures


def _merge_failures(folder: Path) -> list[Failure]:
    files = sorted(folder.glob("failures.rank*.jsonl"))
    failures = [Failure(row["id"], row["reason"]) for file in files for row in read_lines(file)]
    if failures:
        write_lines(
            folder / FAILURES_FILE, [{"id": each.id, "reason": each.reason} for each in failures]
        )
    for file in files:
        file.unlink()
    return failures


def _conclude(job: Job, failures: Sequence[Failure]) -> TaskResult:
    """Merges the answers of all ranks in the order of the task, checks them and scores."""
    answers = read_answers(job.folder, job.settings)
    rows = [vars(answers[item.id]) for item in job.items if item.id in answers]
    write_lines(job.folder / MERGED_FILE, rows)
    problem = check_ids(job.wanted, job.items, answers)
    if failures:
        problem += f"; first failure: {failures[0].id!r}: {failures[0].reason}"
    return score_task(job, answers, problem)


def score_task(job: Job, answers: Mapping[str | int, Answer], problem: str) -> TaskResult:
    """Scores a task and writes it down; with a problem it gets no score."""
    if problem:
        result = TaskResult(
            task=job.task.name,
            title=job.task.title,
            metric=job.task.main_metric,
            of=len(job.items),
            problem=problem,
            settings=dict(job.settings),
        )
        write_task(job.folder, result)
        return result
    texts = {item.id: answers[item.id].text for item in job.wanted}
    model = Path(str(job.provenance.get("checkpoint", "model"))).name
    write_published(job.folder, job.task, job.wanted, texts, model)
    files = write_submissions(job.folder, job.task, job.data, job.items, texts)
    result, scored = score_answers(
        job.task, job.wanted, answers, total=len(job.items), settings=job.settings
    )
    result = dataclasses.replace(result, remark=remark(job.task, files))
    result, scored = with_verdicts(job.folder, job.task, scored, result)
    write_task(job.folder, result, item_rows(job.task, scored, answers))
    for name, content in job.task.with_settings(job.settings).pictures(scored):
        (job.folder / name).write_bytes(content)
    return result


def score_again(folder: Path, task: Task, data_root: Path | None) -> TaskResult:
    """Scores the merged answers of a task's folder anew, without a model.

    Args:
        folder: with ``answers.jsonl`` and the files beside it.
        task: that the folder belongs to.
        data_root: of the data; None takes the place that the run recorded.

    Raises:
        UserError: damaged files, or data that are not those of the run.
    """
    job, answers = saved_job(folder, task, data_root)
    return score_task(job, answers, check_ids(job.wanted, job.items, answers))


def saved_job(
    folder: Path, task: Task, data_root: Path | None, gold: bool | None = False
) -> tuple[Job, dict[str | int, Answer]]:
    """The run that a task's folder holds, and its merged answers.

    Args:
        folder: with ``answers.jsonl`` and the files beside it.
        task: that the folder belongs to.
        data_root: of the data; None takes the place that the run recorded.
        gold: items without images; None means where the images are not there.

    Raises:
        UserError: damaged files, or data that are not those of the run.
    """
    try:
        settings = dict(json.loads((folder / SETTINGS_FILE).read_text("utf-8"))["settings"])
        recorded = json.loads((folder / RUN_FILE).read_text("utf-8"))
        place, limit = Path(recorded["data"]), recorded["limit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no complete results folder ({error})") from error
    root = task.root(data_root) if data_root is not None else place
    path = folder / MERGED_FILE
    answers: dict[str | int, Answer] = {}
    for row in read_lines(path) if path.is_file() else []:
        if row["id"] in answers:
            raise UserError(f"{path}: {row['id']!r} was answered twice: remove one of the lines")
        answers[row["id"]] = make_answer(row, path)
    if gold is None:
        gold = task.missing(root) is not None
    items = task.load(root, gold=gold)
    return Job(task, items, limit, folder, root, settings, recorded), answers


def make_limits(task: Task, beams: int | None, tokens: int | None, batch_size: int) -> Limits:
    """A task's own limits with the user's changes.

    Raises:
        UserError: a number below 1.
    """
    limits = Limits(
        max_new_tokens=task.max_new_tokens if tokens is None else tokens,
        beams=task.beams if beams is None else beams,
        batch_size=batch_size,
    )
    for name, value in vars(limits).items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return limits
