"""The published reviews: two answers to a question are compared, one line each in a file.

Three kinds, by the context: sentences and boxes (90 questions on COCO), a caption
(LLaVA-Bench-in-the-Wild), or none (questions without images).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from llava_uhd.errors import UserError, make_folder
from llava_uhd.eval.answers import lock_file
from llava_uhd.eval.judge.asking import Judge, Question, Verdict
from llava_uhd.eval.published import read_object, read_rows, well_formed
from llava_uhd.eval.scoring.reviews import UNREAD, read_pair

PUBLISHED_MODEL = "gpt-4-0314"
PARAMETERS = {"temperature": 0.2, "max_tokens": 1024}

_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_WILD = "llava_bench_"


class Rows(NamedTuple):
    """Records, and the file they come from."""

    file: Path
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A question of a review.

    Attributes:
        head: what its line holds before the reply: ids and category, in the published order.
        text: of the message to the judge.
    """

    head: Mapping[str, Any]
    text: str

    def question(self, parameters: Mapping[str, Any], run: int = 0) -> Question:
        """As it is asked."""
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": self.text}]
        fallback = {"reference": float(UNREAD[0]), "model": float(UNREAD[1])}
        key = self.head["question_id"]
        return Question(key, messages, parameters, _read, run, fallback=fallback)


def _read(reply: str) -> dict[str, float] | None:
    pair = read_pair(reply)
    return None if pair is None else {"reference": pair[0], "model": pair[1]}


def read_file(file: Path, *fields: str) -> Rows:
    """JSON lines with the fields.

    Raises:
        UserError: missing or damaged.
    """
    return Rows(file, read_rows(file, *fields))


def comparisons(
    questions: Rows,
    contexts: Rows | None,
    references: Rows,
    answers: Rows,
    rule: Path,
    by_position: bool = False,
) -> list[Comparison]:
    """What is to be asked, in the order of the questions.

    Args:
        questions: with ``question_id``, ``text``, ``category``; ``image`` if there are contexts.
        contexts: by ``image``: ``captions`` and ``instances``, or ``caption``; None where the
            questions are about text.
        references: first answers, with ``question_id`` and ``text``.
        answers: second answers, likewise.
        rule: JSON file: category -> ``role`` and ``prompt``.
        by_position: as published, the answers belong to the questions in their order, whatever
            their ids, and what is too long is cut.

    Raises:
        UserError: answers that do not belong to the questions; a context or a rule is missing.
    """
    rules = read_object(rule)
    by_image: dict[Any, dict[str, Any]] = {}
    if contexts is not None:
        with well_formed(str(contexts.file)):
            by_image = {row["image"]: row for row in contexts.rows}
    pairs = [
        [row for _, row in zip(questions.rows, each.rows)]
        if by_position
        else match(questions, each)
        for each in (references, answers)
    ]
    made = []
    for index, (row, first, second) in enumerate(zip(questions.rows, *pairs)):
        category, context = str(row.get("category", "")), None
        if contexts is not None:
            found = by_image.get(row.get("image"))
            if found is None:
                raise UserError(f"{contexts.file}: no context for the image {row.get('image')!r}")
            category, context = describe(found, category, contexts.file)
        head = {
            "id": index + 1,
            "question_id": row["question_id"],
            "answer1_id": first.get("answer_id", first["question_id"]),
            "answer2_id": second.get("answer_id", second["question_id"]),
            "category": category,
        }
        how = _rule(rules, category, rule, default=contexts is None)
        made.append(
            Comparison(head, message(row["text"], first["text"], second["text"], context, *how))
        )
    return made


def match(questions: Rows, answers: Rows) -> list[dict[str, Any]]:
    """The answers in the order of the questions, by id.

    Raises:
        UserError: an id that occurs twice, is missing or foreign.
    """
    wanted = [str(row["question_id"]) for row in questions.rows]
    found = {str(row["question_id"]): row for row in answers.rows}
    for rows in (questions, answers):
        if len({str(row["question_id"]) for row in rows.rows}) < len(rows.rows):
            raise UserError(
                f"{rows.file}: a question_id occurs twice; --compatible takes answers by position"
            )
    missing = [key for key in wanted if key not in found]
    foreign = sorted(set(found) - set(wanted))
    if missing or foreign:
        some = ", ".join([*missing, *foreign][:5])
        raise UserError(
            f"{answers.file}: {len(missing)} questions of {questions.file} have no answer, "
            f"{len(foreign)} answers belong to none ({some}); --compatible takes them by position"
        )
    return [found[key] for key in wanted]


def describe(row: Mapping[str, Any], category: str, file: Path) -> tuple[str, str]:
    """Category as the rules and reviews name it, and the text that stands for the image.

    That is a line for each caption, an empty one, and for each object a line such as
    ``cup: [0.1, 0.2, 0.3, 0.4]``; or only the caption.

    Raises:
        UserError: a context of no known form.
    """
    try:
        if "captions" in row:
            boxes = (f"{each['category']}: {each['bbox']}" for each in row["instances"])
            return category, "\n".join(row["captions"]) + "\n\n" + "\n".join(boxes)
        caption = row["caption"]
        return _WILD + category, caption if isinstance(caption, str) else "\n".join(caption)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file}: the context of {row.get('image')!r} needs captions and instances, or a "
            f"caption ({error})"
        ) from None


def _rule(rules: Mapping[str, Any], category: str, file: Path, default: bool) -> tuple[str, str]:
    rule = rules.get(category, rules.get("default") if default else None)
    if not isinstance(rule, dict) or not {"role", "prompt"} <= set(rule):
        known = ", ".join(rules)
        raise UserError(
            f"{file}: no role and prompt for the category '{category}' (it has: {known})"
        )
    return str(rule["role"]), str(rule["prompt"])


def message(
    question: str, first: str, second: str, context: str | None, role: str, prompt: str
) -> str:
    """What the judge is told, in the published layout."""
    parts = [] if context is None else [f"[Context]\n{context}"]
    parts += [f"[Question]\n{question}"]
    for number, answer in ((1, first), (2, second)):
        parts += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
    return "\n\n".join([*parts, f"[System]\n{prompt}"]) + "\n\n"


def review_line(head: Mapping[str, Any], verdict: Verdict) -> str:
    """A line of a review file."""
    metrics = verdict.metrics
    pair = list(UNREAD) if metrics is None else [metrics["reference"], metrics["model"]]
    return json.dumps({**head, "content": verdict.reply, "tuple": pair}) + "\n"


def begun(output: Path, made: Sequence[Comparison], by_position: bool) -> int:
    """So many lines of a review are there already, not counting one that a kill cut off.

    Raises:
        UserError: the file is the review of other answers, or damaged.
    """
    if not output.is_file():
        return 0
    *lines, _ = output.read_bytes().split(b"\n")
    if len(lines) > len(made):
        raise UserError(f"{output} has {len(lines)} lines for {len(made)} questions")
    for number, (line, each) in enumerate(zip(lines, made), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{output}, line {number} is no review: --overwrite starts again")
        other = [name for name in each.head if name in row and row[name] != each.head[name]]
        if other and not by_position:
            raise UserError(
                f"{output}, line {number}: {other[0]} is {row[other[0]]!r}, not "
                f"{each.head[other[0]]!r}: the review of other answers; choose another --output"
            )
    return len(lines)


def write_review(
    judge: Judge,
    made: Sequence[Comparison],
    output: Path,
    parameters: Mapping[str, Any],
    console: Console,
    by_position: bool = False,
) -> list[Verdict]:
    """Reviews what a file does not hold yet; lines are written in order as soon as they can be.

    A question without any reply ends the file there, so that the next run goes on with it.

    Returns:
        The verdicts of this run.

    Raises:
        UserError: nothing can be asked, or the file belongs to other answers.
    """
    make_folder(output.parent, "folder of the review")
    verdicts: dict[int, Verdict] = {}
    try:
        file = output.open("a+b")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    with file:
        lock_file(file, f"{output} is being written by another judge: wait for it")
        done = begun(output, made, by_position)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        left = made[done:]
        written = 0
        questions = [each.question(parameters) for each in left]
        for position, verdict in judge.ask(questions, console, "review"):
            verdicts[position] = verdict
            while written in verdicts and verdicts[written].reply is not None:
                file.write(review_line(left[written].head, verdicts[written]).encode())
                file.flush()
                written += 1
    return [verdicts[position] for position in sorted(verdicts)]
