"""Summaries of review files, in the words of the published program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import read_rows
from llava_uhd.eval.scoring.reviews import UNREAD, summarise

LINE = "================================="
_PREFIXES = ("gpt4_text_", "reviews_", "review_")


@dataclass(frozen=True)
class Summary:
    """What a review file says.

    Attributes:
        name: of the file, shortened.
        lines: per category and for all of them: relative score, reference, model.
        unread: ids of the questions whose reply could not be read.
        count: of all questions.
    """

    name: str
    lines: list[str]
    unread: list[Any]
    count: int

    @property
    def text(self) -> str:
        """What is printed."""
        return "\n".join([self.name, *self.lines, LINE])


def short_name(file: Path) -> str:
    """Example: ``gpt4_text_toy.jsonl`` gives ``toy``."""
    return file.name.replace("gpt4_text_", "").replace(".jsonl", "")


def find_reviews(
    files: Sequence[Path],
    folder: Path | None,
    select: Sequence[str] = (),
    version: str | None = None,
) -> list[Path]:
    """Review files to summarise, in the published order.

    Args:
        files: named ones; if there are some, the folder is not looked at.
        folder: takes files called gpt4_text..., reviews_... or review_..., and any JSONL file if
            its name says "review".
        select: every one of these must be part of the shortened name.
        version: of the judge, "0613" or "0314"; names without the former count as the latter.

    Raises:
        UserError: none is there.
    """
    found = list(files)
    if not found and folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder")
        found = [
            file
            for file in folder.iterdir()
            if file.suffix == ".jsonl"
            and (file.name.startswith(_PREFIXES) or "review" in folder.name)
        ]
    kept = []
    for file in sorted(found):
        name = short_name(file)
        known = "0613" if "0613" in name else "0314"
        if all(part in name for part in select) and version in (None, known):
            kept.append(file)
    if not kept:
        raise UserError("judge summarize: no review file; name some, or a folder with -d")
    return kept


def summarise_file(file: Path, ignore: Sequence[str] = (), compatible: bool = False) -> Summary:
    """Reads a review file.

    Args:
        file: of `review`, or an older one with ``score`` in the place of ``tuple``.
        ignore: question ids to leave out.
        compatible: average the -1 of replies that could not be read, as published.

    Raises:
        UserError: missing, damaged or empty.
    """
    pairs: dict[str, list[list[float]]] = {}
    unread, count = [], 0
    for row in read_rows(file, "question_id"):
        if str(row["question_id"]) in ignore:
            continue
        count += 1
        pair = _pair(row, file)
        if pair == list(UNREAD):
            unread.append(row["question_id"])
            if not compatible:
                continue
        for name in dict.fromkeys([row.get("category", "all"), "all"]):
            pairs.setdefault(str(name), []).append(pair)
    if not pairs:
        raise UserError(f"{file} has no scores to summarise")
    return Summary(short_name(file), list(_lines(pairs)), unread, count)


def _pair(row: dict[str, Any], file: Path) -> list[float]:
    pair = row.get("tuple", row.get("score"))
    if not isinstance(pair, list) or len(pair) != 2 or not all(_number(each) for each in pair):
        raise UserError(f"{file}: question {row['question_id']!r} has no tuple of two numbers")
    return pair


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(pairs: dict[str, list[list[float]]]) -> Iterator[str]:
    for name, rows in sorted(pairs.items()):
        relative, reference, model = summarise(rows)
        yield f"{name} {round(relative, 1)} {round(reference, 1)} {round(model, 1)}"
