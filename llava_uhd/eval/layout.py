"""A run's answers in the published layout, and the files to upload, beside its results."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from llava_uhd.errors import UserError
from llava_uhd.eval.published import json_lines
from llava_uhd.eval.task import Answers, Item, Task

logger = logging.getLogger(__name__)

PUBLISHED_FILE = "published/answers.jsonl"
SUBMISSIONS = "submission"


def write_published(
    folder: Path, task: Task, items: Sequence[Item], answers: Answers, model: str
) -> Path:
    """Writes the answers as the published programs do, for whatever reads their files.

    Args:
        folder: results of the task.
        task: that was answered.
        items: in the order of the question file; those without an answer are left out.
        answers: by item id.
        model: name of the model.

    Returns:
        The file.
    """
    file = folder / PUBLISHED_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    answered = [item for item in items if item.id in answers]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(
        json_lines([task.published_row(item, answers[item.id], model) for item in answered])
    )
    partial.replace(file)
    return file


def write_submissions(
    folder: Path, task: Task, root: Path, items: Sequence[Item], answers: Answers
) -> list[Path]:
    """Writes the files to upload and checks each against its format.

    Args:
        folder: results of the task.
        task: that was answered.
        root: folder of the task's data.
        items: all of the task.
        answers: by item id. Where some are missing (a trial run) no file is written.

    Returns:
        The files. What a server would refuse is said in a warning.
    """
    place = folder / SUBMISSIONS
    shutil.rmtree(place, ignore_errors=True)
    files: list[Path] = []
    if any(item.id not in answers for item in items):
        return files
    for name, content in task.submission(root, items, answers):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        files.append(place / name)
    for file in files:
        try:
            task.check_submission(root, file)
        except UserError as error:
            logger.warning("%s: would be refused: %s", task.name, error)
    return files


def remark(task: Task, files: Sequence[Path]) -> str:
    """What has to be done with the answers of a task that cannot be scored here, or nothing."""
    if task.local:
        return ""
    if files:
        return "no score here: upload " + ", ".join(f"{SUBMISSIONS}/{file.name}" for file in files)
    return f"no score here: a judge reads {PUBLISHED_FILE}"
