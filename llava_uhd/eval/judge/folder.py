"""The judged tasks of a results folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_uhd.errors import UserError
from llava_uhd.eval.answers import SETTINGS_FILE, Answer
from llava_uhd.eval.judge.asking import Judge, Question, Verdict
from llava_uhd.eval.judge.judged import JUDGED, Given, Plan
from llava_uhd.eval.judge.review import review_line
from llava_uhd.eval.judge.verdicts import write_verdicts
from llava_uhd.eval.results import check_ids
from llava_uhd.eval.runner import Job, saved_job, score_task
from llava_uhd.eval.tasks import find_task

REVIEW_FILE = "review.jsonl"


@dataclass(frozen=True)
class Work:
    """One judged task.

    Attributes:
        job: the run that answered it.
        answers: of the run.
        plan: what will be asked.
        runs: so often.
    """

    job: Job
    answers: Mapping[str | int, Answer]
    plan: Plan
    runs: int

    @property
    def questions(self) -> list[Question]:
        """Of all runs, one run behind the other."""
        return [
            dataclasses.replace(question, run=run)
            for run in range(self.runs)
            for question in self.plan.questions
        ]


def judged_folders(results: Path, names: str | None) -> list[Path]:
    """Folders of the judged tasks of a results folder.

    Args:
        results: that a run wrote.
        names: comma-separated tasks, or None for all judged ones.

    Raises:
        UserError: none is there, or one that is named is not.
    """
    known = JUDGED.names()
    if names is None:
        folders = [results / name for name in known if (results / name / SETTINGS_FILE).is_file()]
        if not folders:
            raise UserError(
                f"{results} holds no answers to a judged task ({', '.join(known)}): name the "
                "folder that a run wrote (CHECKPOINT/eval)"
            )
        return folders
    folders = []
    for word in filter(None, (word.strip() for word in names.split(","))):
        name = find_task(word).name
        JUDGED.get(name)
        if not (results / name / SETTINGS_FILE).is_file():
            raise UserError(f"{results} holds no answers to {name}: run the task first")
        folders.append(results / name)
    return list(dict.fromkeys(folders))


def read_work(
    folder: Path,
    data_root: Path | None,
    runs: int,
    rule: Path | None,
    prompt_file: Path | None,
    parameters: Mapping[str, Any],
) -> Work:
    """Reads the answers to a task and plans what to ask about them.

    Args:
        folder: results of the task.
        data_root: of the data; None takes the place that the run recorded.
        runs: judge so often.
        rule: see `judged.Given`.
        prompt_file: likewise.
        parameters: likewise.

    Raises:
        UserError: answers or data are missing or damaged.
    """
    task = find_task(folder.name)
    job, answers = saved_job(folder, task, data_root, gold=None)
    problem = check_ids(job.wanted, job.items, answers)
    if problem:
        raise UserError(f"{folder}: {problem}; finish the run first")
    given = Given(
        task=task,
        root=job.data,
        items=job.wanted,
        answers={item.id: answers[item.id].text for item in job.wanted},
        model=Path(str(job.provenance.get("checkpoint", "model"))).name,
        rule=rule,
        prompt_file=prompt_file,
        parameters=parameters,
    )
    return Work(job, answers, JUDGED.get(task.name)(given), runs)


def judge_work(judge: Judge, work: Work, console: Console, compatible: bool) -> list[Verdict]:
    """Asks the judge about a task, writes its verdicts and the scores.

    Returns:
        The verdicts of all runs.

    Raises:
        UserError: nothing can be asked; replies so far are in the cache.
    """
    questions, job = work.questions, work.job
    found = dict(judge.ask(questions, console, job.task.name))
    verdicts = [found[position] for position in range(len(questions))]
    size = len(work.plan.questions)
    runs = [verdicts[start : start + size] for start in range(0, len(verdicts), size)]
    facts = {
        "model": judge.model,
        "base_url": judge.endpoint.shown,
        "prompt": work.plan.prompt,
        "parameters": dict(questions[0].parameters),
    }
    texts = {item.id: work.answers[item.id].text for item in job.wanted}
    write_verdicts(job.folder, facts, runs, texts, compatible)
    _write_reviews(job.folder, work.plan, runs)
    score_task(job, work.answers, "")
    return verdicts


def _write_reviews(folder: Path, plan: Plan, runs: Sequence[Sequence[Verdict]]) -> None:
    """Review files in the published layout, of tasks that have one and runs without gaps."""
    for old in folder.glob("review*.jsonl"):
        old.unlink()
    if not plan.review:
        return
    for number, verdicts in enumerate(runs, 1):
        if all(verdict.reply is not None for verdict in verdicts):
            name = REVIEW_FILE if number == 1 else f"review-{number}.jsonl"
            lines = [review_line(each.head, said) for each, said in zip(plan.review, verdicts)]
            (folder / name).write_text("".join(lines), "utf-8")
