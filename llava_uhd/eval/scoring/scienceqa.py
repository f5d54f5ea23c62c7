"""ScienceQA: which letter an answer gives, as the published scorer reads it."""

from __future__ import annotations

import re
import string

LETTERS = "ABCDE"
FAILED = "FAILED"
# As published: the period is not escaped, so that any character may stand there, and one must.
_STATED = re.compile(r"The answer is ([A-Z]).")


def read_answer(text: str) -> str:
    """The letter that an answer gives, or "FAILED".

    The answer is a letter of A to E, or begins with one, a period and a space, or holds "The answer
    is X." exactly once, with any character behind the letter. Nothing is stripped.

    Example: "B", "B. cup" and "The answer is B!" are B; "b", "B.", "(B)" and "B " fail.
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _STATED.findall(text)
    return found[0] if len(found) == 1 else FAILED


def read_leniently(text: str) -> str:
    """A more forgiving reading, reported apart: white space, brackets, a period or colon behind.

    Example: "(B)", " b" and "B." are B.
    """
    letter = read_answer(text)
    if letter != FAILED:
        return letter
    found = re.match(r"\s*\(?([A-Ea-e])\s*(?:[).:,]|$)", text)
    return found[1].upper() if found else FAILED


def choice_index(letter: str, num_choices: int) -> int:
    """Place of a letter among the choices, -1 if there is none.

    Example: ``choice_index("C", 2)`` is -1.
    """
    place = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
    return place if place < min(num_choices, len(LETTERS)) else -1
