"""Scores of answers that any program wrote, in the published layouts: no model, no images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import well_formed
from llava_uhd.eval.task import TASKS, Item, Mode, Parsed, Scored, Task

logger = logging.getLogger(__name__)


def score_file(
    task: Task, data_root: Path | None, file: Path, mode: Mode = "default"
) -> dict[str, Any]:
    """Scores a file of answers.

    Args:
        task: that was answered.
        data_root: laid out like ``playground/data/eval``, or None for that place.
        file: what the published flow of the task scores.
        mode: "published" follows the oddities of the published scorer too.

    Returns:
        ``task``, ``scored_as`` (the task that scores it, see `Task.scored_by`), ``mode``,
        ``scores``, ``breakdown``, ``missing`` (ids without an answer) and ``items`` (``id``,
        ``score``, what was read, and more).

    Raises:
        UserError: missing data, a damaged file, missing or foreign answers.
    """
    name = task.name
    if not task.local and task.scored_by is not None:
        task = TASKS.get(task.scored_by)
    task = task.in_mode(mode)
    root = task.root(data_root)
    if not task.local:
        raise UserError(f"{task.name} has no score without its server or a judge; {task.source}")
    if not file.is_file():
        raise UserError(f"answers file {file} does not exist")
    items = task.gold_for(root, file)
    with well_formed(str(file)):
        answers = task.read_published(root, file)
    scored, missing = score_all(task, items, answers, str(file))
    return {
        "task": name,
        "scored_as": task.name,
        "mode": mode,
        "scores": task.aggregate(scored),
        "breakdown": task.breakdown(scored),
        "missing": missing,
        "items": [item_row(task, each) for each in scored],
    }


def score_all(
    task: Task, items: Sequence[Item], answers: Mapping[str | int, str], name: str
) -> tuple[list[Scored], list[str | int]]:
    """Every item with its score, and the ids of the items without an answer.

    Args:
        task: says how answers are read and what a missing one counts.
        items: that can be scored.
        answers: by item id.
        name: of the answers, for messages.

    Raises:
        UserError: answers to no question, or questions without an answer where that is an error.
    """
    known = {item.id: item for item in items}
    foreign = [key for key in answers if key not in known]
    if foreign:
        some = ", ".join(map(repr, foreign[:5]))
        raise UserError(
            f"{name}: {len(foreign)} of {len(answers)} answers belong to no question of "
            f"{task.name} ({some}): the file belongs to another task or to other data"
        )
    missing = [item.id for item in items if item.id not in answers]
    if (missing and task.unanswered == "error") or not answers:
        some = ", ".join(map(repr, missing[:5]))
        raise UserError(
            f"{name}: {len(missing)} of {len(items)} questions of {task.name} have no answer "
            f"({some}): finish the answers first"
        )
    if missing:
        what = "count as wrong" if task.unanswered == "wrong" else "do not count"
        logger.warning("%s: %d questions have no answer and %s", name, len(missing), what)
    # Published scorers go through the file of answers, some with care for neighbours.
    in_order: Sequence[Item] = items
    if task.mode == "published" or task.in_answer_order:
        absent = [known[key] for key in missing]
        in_order = [*(known[key] for key in answers), *absent]
    scored = []
    for item in in_order:
        text = answers.get(item.id)
        if text is not None or task.unanswered == "wrong":
            answer = task.missing_text if text is None else text
            parsed = str(answer) if isinstance(answer, Parsed) else task.parse(item, answer)
            metrics = task.score(item, parsed)
            scored.append(Scored(item, answer, parsed, metrics, answered=text is not None))
    return scored, missing


def item_row(task: Task, scored: Scored) -> dict[str, Any]:
    """A scored item as the output of `score_file` lists it."""
    main = scored.metrics.get(task.main_metric)
    if main is None and scored.metrics:
        main = next(iter(scored.metrics.values()))
    return {
        "id": scored.item.question_id,
        "score": main,
        "item": scored.item.id,
        "answer": scored.answer,
        "parsed": scored.parsed,
        "reference": scored.item.reference,
        "metrics": dict(scored.metrics),
        "groups": dict(scored.item.groups),
    }
