"""One sample of a data file: checked, and brought into one form.

``docs/data.md`` has the format in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llava_uhd.errors import UserError
from llava_uhd.text.encoding import check_unicode
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER, Turn

ROLES = ("human", "gpt")
# Other spellings of the roles.
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

# A label that some published video data carry in their questions; the published code removes it.
NOISE = "QA_GT_caption_based_noisy"


class RowError(UserError):
    """A sample that is not as it should be.

    Attributes:
        kind: what about it, for reports: "form", "role", "order", "empty", "count" or "text".
    """

    def __init__(self, message: str, kind: str = "form") -> None:
        super().__init__(message)
        self.kind = kind


class Row(NamedTuple):
    """A checked sample.

    Attributes:
        id: its name, as a text.
        images: paths as written, in the order of the ``<image>`` of its turns.
        videos: the same for ``<video>``.
        turns: alternating, human first.
        words: of the whole conversation, as the published sampler counts them.
    """

    id: str
    images: tuple[str, ...]
    videos: tuple[str, ...]
    turns: list[Turn]
    words: int


def parse_row(row: Any, image_first: bool | str = False) -> Row:
    """Checks one sample, without looking at files.

    Args:
        row: decoded JSON.
        image_first: see `place_marker`.

    Raises:
        RowError: what is wrong and what is expected.
    """
    if not isinstance(row, dict):
        raise RowError(f"must be an object with conversations, got {type(row).__name__}")
    images, videos = _parse_paths(row, "image"), _parse_paths(row, "video")
    turns, words = _parse_turns(row.get("conversations"))
    if images or videos:
        turns = [Turn(turn.role, place_marker(turn.text, image_first, videos)) for turn in turns]
    if videos:
        turns = _videos_marked(turns, images, videos)
    for marker, given, kind in ((IMAGE_MARKER, images, "image"), (VIDEO_MARKER, videos, "video")):
        # Without videos <video> is a word like others.
        count = sum(turn.text.count(marker) for turn in turns)
        if count != len(given) and (given or kind == "image"):
            raise RowError(
                f"has {len(given)} {kind}(s) but {count} {marker} marker(s) in its turns: "
                f"there must be one marker per {kind}",
                "count",
            )
    return Row(str(row.get("id", "")), images, videos, turns, words)


def place_marker(text: str, rule: bool | str, videos: Sequence[str] = ()) -> str:
    r"""Puts the marker of a turn on a line of its own at the front, as published.

    Args:
        text: of the turn of a sample with images or videos.
        rule: of ``data.image_first``. True: where it is the only one. "llava_1_5": in the place of
            all markers of the turn. "onevision": where it is the only one and not at the front
            already; a left-over label of published video data is removed. False: nothing is done.
        videos: of the sample. With one, ``<video>`` is a marker too.

    Example: ``"What is it?\n<image>"`` becomes ``"<image>\nWhat is it?"``.
    """
    if rule is False:
        return text
    markers = [IMAGE_MARKER, VIDEO_MARKER] if videos else [IMAGE_MARKER]
    found = [marker for marker in markers if marker in text]
    if len(found) == 1:
        (marker,) = found
        single = text.count(marker) == 1
        in_place = rule == "onevision" and text.startswith(marker)
        if rule == "llava_1_5" or (single and not in_place):
            text = f"{marker}\n{text.replace(marker, '').strip()}".strip()
    return text.replace(NOISE, "") if rule == "onevision" else text


def _videos_marked(turns: list[Turn], images: Sequence[str], videos: Sequence[str]) -> list[Turn]:
    """The turns with ``<video>`` where published data write ``<image>`` for a video."""
    text = "".join(turn.text for turn in turns)
    if images or VIDEO_MARKER in text or text.count(IMAGE_MARKER) != len(videos):
        return turns
    return [Turn(turn.role, turn.text.replace(IMAGE_MARKER, VIDEO_MARKER)) for turn in turns]


def _parse_paths(row: dict[str, Any], kind: str) -> tuple[str, ...]:
    """Paths of the images or videos of a sample."""
    given = [key for key in (kind, f"{kind}s") if row.get(key) is not None]
    if len(given) == 2:
        raise RowError(f"has both '{kind}' and '{kind}s': keep one")
    if not given:
        return ()
    value = row[given[0]]
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(each, str) and each for each in paths):
        raise RowError(f"'{given[0]}' must be a path or a list of paths, got {value!r:.80}")
    for path in paths:
        _check_text(path)
    return tuple(paths)


def _parse_turns(value: Any) -> tuple[list[Turn], int]:
    if not isinstance(value, list) or not value:
        raise RowError(
            "'conversations' must be a list with at least one human and one gpt turn",
            "empty" if value in (None, []) else "form",
        )
    turns = [_parse_turn(item, position) for position, item in enumerate(value)]
    words = sum(len(turn.text.split()) for turn in turns)
    if turns[0].role == "gpt":
        turns = turns[1:]  # published: an answer without a question is left out
    if turns and turns[-1].role == "human":
        turns = turns[:-1]  # a question without an answer teaches nothing
    for position, turn in enumerate(turns):
        if turn.role != ROLES[position % 2]:
            raise RowError(
                f"two {turn.role} turns follow each other: turns must alternate", "order"
            )
    if len(turns) < 2:
        raise RowError(
            "the conversation is empty: at least one human and one gpt turn are needed", "empty"
        )
    return turns, words


def _parse_turn(item: Any, position: int) -> Turn:
    """A turn of either spelling, ``from`` and ``value`` or ``role`` and ``content``."""
    if not isinstance(item, dict):
        item = {}
    speaker, text = item.get("from", item.get("role")), item.get("value", item.get("content"))
    if not isinstance(text, str):
        raise RowError(
            f"turn {position} must have 'from' and 'value' texts (or 'role' and 'content')"
        )
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(
            f"turn {position} is from {speaker!r}: expected human or gpt (or user or assistant)",
            "role",
        )
    _check_text(text)
    return Turn(role, text)


def _check_text(text: str) -> None:
    try:
        check_unicode(text)
    except UserError as error:
        raise RowError(str(error), "text") from error
