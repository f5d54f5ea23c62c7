"""The files of the published evaluation flow: lines of questions and answers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_uhd.data.files import iterate_json
from llava_uhd.errors import UserError

logger = logging.getLogger(__name__)

# Digits of the published ids of answers: letters and digits that cannot be mistaken for another.
_DIGITS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


def answer_id(*parts: object) -> str:
    """22 letters and digits; published ones are random, these follow from ``parts``."""
    number = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest(), "big")
    digits = []
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)


def answer_row(question_id: str | int, prompt: str, text: str, model: str) -> dict[str, Any]:
    """A line of the published answers layout, keys in the published order.

    Args:
        question_id: of the question file, its type kept.
        prompt: text of the question without the image token and without a template.
        text: the answer.
        model: name of the model.
    """
    return {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": answer_id(model, question_id, prompt),
        "model_id": model,
        "metadata": {},
    }


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines as the published programs write them: ASCII, a newline behind each."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@contextmanager
def well_formed(what: str) -> Iterator[None]:
    """Tells in one line what is wrong with files whose values are of other kinds than published.

    Args:
        what: is read inside, for the message.

    Raises:
        UserError: in place of the errors that such values cause.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{what}: not in the published form ({type(error).__name__}: {error}): copy or "
            "download it again"
        ) from error


def read_rows(file: Path, *fields: str, skip_broken: bool = False) -> list[dict[str, Any]]:
    """Objects of a JSON list or of JSON lines, each with the fields asked for.

    Args:
        file: to read.
        fields: that every object must have.
        skip_broken: leave out lines that are not JSON, as the published converters do; they are
            counted in a warning.

    Raises:
        UserError: missing or damaged file, or an object without a field.
    """
    return list(iterate_rows(file, *fields, skip_broken=skip_broken))


def iterate_rows(file: Path, *fields: str, skip_broken: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of `read_rows`, one at a time."""
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    broken: list[UserError] = []
    note = (lambda _, error: broken.append(error)) if skip_broken else None
    for index, row in iterate_json(file, note):
        if not isinstance(row, dict):
            raise UserError(f"{file}, record {index}: must be an object, got {_kind(row)}")
        for field in fields:
            if field not in row:
                raise UserError(f"{file}, record {index}: has no field '{field}'")
        yield row
    if broken:
        logger.warning("%s: %d broken lines were left out (%s)", file, len(broken), broken[0])


def read_object(file: Path) -> dict[str, Any]:
    """A file that is one JSON object.

    Raises:
        UserError: missing or damaged file, or not an object.
    """
    value = read_value(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} must be a JSON object, got {_kind(value)}")
    return value


def read_value(file: Path) -> Any:
    """A file that is one JSON value.

    Raises:
        UserError: missing or damaged file.
    """
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error})") from error


def read_answers(file: Path, skip_broken: bool = False) -> dict[str | int, str]:
    """An answers file by question id.

    Args:
        file: JSONL with ``question_id`` and ``text``.
        skip_broken: see `read_rows`.

    Raises:
        UserError: damaged, or a question answered twice.
    """
    answers: dict[str | int, str] = {}
    for row in iterate_rows(file, "question_id", "text", skip_broken=skip_broken):
        add_answer(answers, row["question_id"], row["text"], file)
    return answers


def add_answer(answers: dict[str | int, str], key: Any, text: Any, file: Path) -> None:
    """Adds one answer of a file, checked.

    Raises:
        UserError: an id or answer of the wrong type, or an id that is there already.
    """
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise UserError(f"{file}: question id {key!r} must be a text or a whole number")
    if not isinstance(text, str):
        raise UserError(f"{file}: the answer to {key!r} must be a text, got {_kind(text)}")
    if key in answers:
        raise UserError(f"{file}: {key!r} is answered twice: remove one of the answers")
    answers[key] = text


def _kind(value: Any) -> str:
    return type(value).__name__


def check_all_answered(
    task: str, ids: Sequence[str | int], answers: Mapping[str | int, str]
) -> None:
    """Refuses an upload with holes.

    Args:
        task: name, for the message.
        ids: of all its items.
        answers: by item id.

    Raises:
        UserError: a question has no answer.
    """
    missing = [each for each in ids if each not in answers]
    if missing:
        raise UserError(
            f"{task}: {len(missing)} questions have no answer, first {missing[0]!r}: the server "
            "wants all of them"
        )
