"""Which option an answer chooses: VLMEvalKit's exact matching, and MMMU's official parser.

Every function is deterministic: where a published scorer asks a judge or rolls dice, nothing is
chosen here, and the item is wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

NOTHING = "Z"
"""Stands for an answer that chooses no option."""

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST = 4  # a letter that stands further in front is taken for a word


def letter_by_option(
    answer: str, options: Mapping[str, str], *, earlier_kit: bool = False
) -> str | None:
    """The letter that an answer names, or `NOTHING` for a refusal, or None if that is not clear.

    Args:
        answer: as generated.
        options: letter -> text.
        earlier_kit: as the copy that LLaVA-UHD v2 used: the letter may stand anywhere, and a
            sentence "the answer is X" is not looked for.

    Example: ``letter_by_option("(B) a cup", {"A": "tea", "B": "a cup"})`` is ``"B"``;
    ``letter_by_option("A or B", ...)`` is None; "the correct answer is B, not A" gives ``"B"``.
    """
    if "Failed to obtain answer via API" in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return NOTHING
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and (earlier_kit or words.index(named[0]) >= len(words) - _LAST):
        return named[0]
    if not named and NOTHING in words:
        return NOTHING
    # As published there is no end of a word behind the letter: "the answer is blue" states B.
    stated = None if earlier_kit else _STATED.search(answer)
    return stated[1].upper() if stated and stated[1].upper() in options else None


def letter_by_text(
    answer: str, options: Mapping[str, str], *, earlier_kit: bool = False
) -> str | None:
    """The one option whose text stands in the answer, or None.

    Case is ignored. An answer longer than twice all options together names none, except in the
    earlier copy.

    Example: ``letter_by_text("It is a cup.", {"A": "tea", "B": "a cup"})`` is ``"B"``.
    """
    if not earlier_kit and len(answer.lower()) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def choose(answer: str, options: Mapping[str, str], *, earlier_kit: bool = False) -> str | None:
    """The chosen letter, by its letter or else by its text; `NOTHING` or None as above."""
    letter = letter_by_option(answer, options, earlier_kit=earlier_kit)
    return letter or letter_by_text(answer, options, earlier_kit=earlier_kit)


def read_options(row: Mapping[str, object]) -> dict[str, str]:
    """Options of a row of a table: the columns A, B, ... that are filled."""
    return {
        letter: str(row[letter])
        for letter in string.ascii_uppercase
        if row.get(letter) is not None and row[letter] != ""
    }


_SPLIT_BY = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def yes_or_no(answer: str) -> str:
    """Which of "Yes" and "No" is in the answer; "Unknown" if both or neither.

    Words are what white space leaves after VLMEvalKit's treatment of punctuation.

    Example: ``yes_or_no("Yes, it is")`` is "Yes", ``yes_or_no("yes,no")`` is "Unknown".
    """
    text = answer.lower()
    plain = text
    for mark in _SPLIT_BY:
        at_space = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        plain = plain.replace(mark, "" if at_space else " ")
    # The published call passes a flag, 32, where the number of replacements belongs.
    words = _PERIOD.sub("", plain, count=32).split()
    if ("yes" in words) != ("no" in words):
        return "Yes" if "yes" in words else "No"
    return "Unknown"


def mmmu_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """MMMU's own parser of multiple choice, or None where that one guesses at random.

    Looks for ``(X)``, then ``X`` before a space, then ``X.``, then, in answers of more than five
    words, for the text of an option; of several the one that stands last.

    Example: ``mmmu_letter("A is wrong, (B) is right", {"A": "tea", "B": "cup"})`` is ``"B"``.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in answer]
        if found:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) <= 5:
        return None
    lower = answer.lower()
    found = [letter for letter, text in options.items() if text.lower() in lower]
    return max(found, key=lambda letter: lower.rfind(options[letter].lower()), default=None)


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_open_match(answer: str, references: Sequence[str]) -> float:
    """MMMU's own score of an open question: 1 if a reference stands in a telling part, else 0.

    Telling are the ends of the lines behind words such as "is" or "answer" (the whole answer if
    there are none), and the numbers in them, rounded to two decimals.

    Example: ``mmmu_open_match("So the total is 1,200.", ["1200"])`` is 1.
    """
    parts = _key_parts(answer)
    numbers = [number for part in parts for form in _NUMBERS for number in form.findall(part)]
    found = [value for part in [*parts, *numbers] for value in _comparable(part)]
    wanted = [value for reference in references for value in _comparable(reference)]
    texts = [value for value in wanted if isinstance(value, str)]
    return float(
        any(
            any(text in value for text in texts) if isinstance(value, str) else value in wanted
            for value in found
        )
    )


def _key_parts(answer: str) -> list[str]:
    answer = answer.strip().strip(".").lower()
    # As published: the text is in lower case already, so that only line breaks can match.
    lines = answer.split("\n")
    parts = []
    for index, line in enumerate(lines):
        keys = [*_KEYS, "="] if index == len(lines) - 1 else _KEYS
        ends = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [answer]


def _comparable(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        # A single letter must stand at a space, or it would be in everything.
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
