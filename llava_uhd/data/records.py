"""LLaVA data files: read as a stream, checked up front, kept compactly.

Every mistake is collected with its file and index, so that one run shows them all, before any
training time is spent.
"""

from __future__ import annotations

import json
import logging
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from llava_uhd.data.files import DATA_SOURCES, ImageRoot, ImageStatus
from llava_uhd.errors import UserError
from llava_uhd.text.encoding import check_unicode
from llava_uhd.text.templates import IMAGE_MARKER, Turn

logger = logging.getLogger(__name__)

ROLES = ("human", "gpt")

# Published sampler: an image counts as this many words.
IMAGE_WORDS = 128

# Characters read at a time.
CHUNK = 1 << 20
BLANKS = re.compile(r"\s*")

# So many problems are shown; all are counted.
MAX_SHOWN = 20


class Record(NamedTuple):
    """One sample: its images in the order of their ``<image>`` markers, and its turns."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


class Records(Sequence[Record]):
    """Checked records, packed into one byte buffer.

    A list of objects would be copied page by page into every data worker, because reading a Python
    object writes its reference count; one buffer is shared. Records are decoded when asked for.

    Attributes:
        root: image folder, or None when no record has images.
        files: the data files, for messages.
        num_left_out: records left out because an image file is missing.
    """

    def __init__(self, root: ImageRoot | None, files: Sequence[Path]) -> None:
        self.root = root
        self.files = tuple(files)
        self.num_left_out = 0
        self._buffer = bytearray()
        self._ends = array("q", [0])
        self._words = array("i")
        self._origins = array("q")  # file * 2**40 + index in the file

    def append(
        self, name: str, images: Sequence[str], turns: Sequence[Turn], words: int, origin: int
    ) -> None:
        """Adds a checked record.

        Args:
            name: its id.
            images: paths relative to the root.
            turns: alternating, beginning with human.
            words: whitespace-separated words of the original conversation.
            origin: file number * 2**40 + index in the file.
        """
        row = [name, list(images), [text for _, text in turns]]
        self._buffer += json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        self._ends.append(len(self._buffer))
        self._words.append(max(words, 1) if images else -max(words, 1))
        self._origins.append(origin)

    def __len__(self) -> int:
        return len(self._words)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = self._buffer[self._ends[index] : self._ends[index + 1]]
        name, images, texts = json.loads(row.decode("utf-8", "surrogatepass"))
        # Turns alternate and begin with human, so the roles need no storage.
        turns = tuple(Turn(ROLES[i % 2], text) for i, text in enumerate(texts))
        root = self.root.path if self.root else Path()
        return Record(name, tuple(root / image for image in images), turns)

    def where(self, index: int) -> str:
        """Says where a record stands, for messages: file, index in the file, id."""
        file, position = divmod(self._origins[index], 2**40)
        return f"{self.files[file]}, record {position} (id {self[index].id!r})"

    @property
    def lengths(self) -> list[int]:
        """Published length of each record: words, plus 128 if it has an image."""
        return [words + IMAGE_WORDS if words > 0 else -words for words in self._words]

    @property
    def modality_lengths(self) -> list[int]:
        """Published signed length: words of records with images, minus words of the others.

        A record without a word counts 1, so that its sign is not lost.
        """
        return list(self._words)


class _Problems:
    """Collects messages; shows the first `MAX_SHOWN`."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(message)

    def text(self, what: str) -> str:
        rest = self.count - len(self.shown)
        lines = [what, *self.shown, *([f"... and {rest} more"] if rest else [])]
        return "\n  ".join(lines)


def read_records(
    path: str | os.PathLike[str] | Sequence[str],
    image_folder: str | os.PathLike[str] | None,
    *,
    check_files: bool = True,
    follow_links: bool = False,
    missing: Literal["error", "skip"] = "error",
    max_missing: float = 0.01,
) -> Records:
    """Reads and checks LLaVA JSON (a list) or JSONL files.

    Args:
        path: one file or several.
        image_folder: image paths are relative to it.
        check_files: look for every image file.
        follow_links: allow links inside the folder that lead out of it.
        missing: whether a missing image file is an error, or its record is left out and counted.
        max_missing: with "skip", the largest share of records that may be left out.

    Raises:
        UserError: a missing file, or all problems found (the first 20 shown, all counted).
    """
    files = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(each) for each in path]
    for file in files:
        if not file.is_file():
            raise UserError(_missing_file(file))
    root = ImageRoot(Path(image_folder), follow_links) if image_folder is not None else None
    records = Records(root, files)
    problems, absent = _Problems(), _Problems()
    total = 0
    for number, file in enumerate(files):
        in_file = 0
        for index, row in iterate_rows(file):
            where = f"{file.name}, record {index}" if len(files) > 1 else f"record {index}"
            try:
                name, images, turns, words = parse_row(row)
                status = _check_images(images, root, check_files)
            except UserError as error:
                problems.add(f"{where}: {error}")
            else:
                if status is None:
                    records.append(name, images, turns, words, number * 2**40 + index)
                else:
                    absent.add(f"{where}: {status}")
            in_file += 1
        if in_file == 0:
            raise UserError(f"{file} holds no records: expected a list of samples or JSON lines")
        total += in_file
    _settle(records, files, total, problems, absent, missing, max_missing)
    return records


def _settle(
    records: Records,
    files: Sequence[Path],
    total: int,
    problems: _Problems,
    absent: _Problems,
    missing: str,
    max_missing: float,
) -> None:
    """Raises what was collected, or reports what was left out."""
    names = ", ".join(str(file) for file in files)
    if problems.count:
        raise UserError(problems.text(f"{names}: {problems.count} of {total} records are wrong:"))
    if not absent.count:
        return
    folder = records.root.path if records.root else None
    if missing == "error" or absent.count > max_missing * total:
        bound = "" if missing == "error" else f", more than the allowed share of {max_missing}"
        advice = "; set data.on_broken_image: skip to leave them out" if not bound else ""
        raise UserError(
            absent.text(
                f"{names}: {absent.count} of {total} records name image files that are missing in "
                f"{folder}{bound}{advice}:"
            )
        )
    records.num_left_out = absent.count
    logger.warning("%s", absent.text(f"{names}: {absent.count} records left out, images missing:"))


def _missing_file(file: Path) -> str:
    what = "is a folder, not a data file" if file.is_dir() else "does not exist"
    source = DATA_SOURCES.get(file.name)
    if source:
        return f"data file {file} {what}: it is {source}"
    return (
        f"data file {file} {what}: data.path must name a JSON list (or JSON lines) of samples with "
        '"image" and "conversations"'
    )


def iterate_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields (index, decoded value) of a JSON list or of JSON lines, holding one at a time.

    Raises:
        UserError: not JSON; the message has the index.
    """
    try:
        with file.open(encoding="utf-8-sig") as stream:
            head = stream.read(1)
            while head and head.isspace():
                head = stream.read(1)
            if head == "[":
                yield from _iterate_list(stream, file)
            elif head:
                stream.seek(0)
                yield from _iterate_lines(stream, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a UTF-8 text file: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _iterate_lines(stream: Any, file: Path) -> Iterator[tuple[int, Any]]:
    index = 0
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield index, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number} is not valid JSON: {error.msg}") from error
        index += 1


def _iterate_list(stream: Any, file: Path) -> Iterator[tuple[int, Any]]:
    """Decodes the items of a list whose opening bracket has been read."""
    decoder = json.JSONDecoder()
    buffer, position, index, size = "", 0, 0, CHUNK
    while True:
        start = BLANKS.match(buffer, position).end()  # type: ignore[union-attr]
        if buffer[start : start + 1] == "]":
            if (buffer[start + 1 :] + stream.read()).strip():
                raise UserError(f"{file} goes on after the end of its list: one list per file")
            return
        if index and start < len(buffer):
            if buffer[start] != ",":
                raise UserError(f"{file} is not valid JSON: no comma after record {index - 1}")
            start = BLANKS.match(buffer, start + 1).end()  # type: ignore[union-attr]
        try:
            value, position = decoder.raw_decode(buffer, start)
        except json.JSONDecodeError as error:
            # Either the item is cut at the end of the buffer, or it is wrong: read on to know.
            more = stream.read(size)
            if not more:
                raise UserError(
                    f"{file} is not valid JSON at record {index}: {error.msg} (cut short?)"
                ) from error
            buffer, position = buffer[position:] + more, 0
            size = max(CHUNK, len(buffer))
            continue
        yield index, value
        index, size = index + 1, CHUNK


def parse_row(row: Any) -> tuple[str, tuple[str, ...], list[Turn], int]:
    """Checks one sample, without looking at files.

    Returns:
        id, image paths as written, turns beginning with human, and the words of the whole
        conversation as the published sampler counts them.

    Raises:
        UserError: what is wrong and what is expected.
    """
    if not isinstance(row, dict):
        raise UserError(f"must be an object with conversations, got {type(row).__name__}")
    if row.get("video") is not None:
        raise UserError("has a video: only images can be read")
    images = _parse_images(row)
    turns, words = _parse_turns(row.get("conversations"))
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        raise UserError(
            f"has {len(images)} image(s) but {markers} {IMAGE_MARKER} marker(s) in its turns: "
            "there must be one marker per image"
        )
    return str(row.get("id", "")), images, turns, words


def _parse_images(row: dict[str, Any]) -> tuple[str, ...]:
    given = [key for key in ("image", "images") if row.get(key) is not None]
    if len(given) == 2:
        raise UserError("has both 'image' and 'images': keep one")
    if not given:
        return ()
    value = row[given[0]]
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(each, str) and each for each in images):
        raise UserError(f"'{given[0]}' must be a path or a list of paths, got {value!r:.80}")
    for image in images:
        check_unicode(image)
    return tuple(images)


def _parse_turns(value: Any) -> tuple[list[Turn], int]:
    if not isinstance(value, list) or not value:
        raise UserError("'conversations' must be a list with at least one human and one gpt turn")
    turns = []
    for position, item in enumerate(value):
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise UserError(f"turn {position} must have 'from' and 'value' texts")
        if item.get("from") not in ROLES:
            raise UserError(f"turn {position} is from {item.get('from')!r}: expected human or gpt")
        check_unicode(item["value"])
        turns.append(Turn(item["from"], item["value"]))
    words = sum(len(turn.text.split()) for turn in turns)
    if turns[0].role == "gpt":
        turns = turns[1:]  # published: an answer without a question is left out
    if turns and turns[-1].role == "human":
        turns = turns[:-1]  # a question without an answer teaches nothing
    for position, turn in enumerate(turns):
        if turn.role != ROLES[position % 2]:
            raise UserError(f"two {turn.role} turns follow each other: turns must alternate")
    if len(turns) < 2:
        raise UserError("the conversation is empty: at least one human and one gpt turn are needed")
    return turns, words


def _check_images(images: Sequence[str], root: ImageRoot | None, check_files: bool) -> str | None:
    """Returns the first missing file's message, or None.

    Raises:
        UserError: a path that leaves the image folder, or no folder at all.
    """
    if images and root is None:
        raise UserError("has an image, but data.image_folder is not set")
    for image in images:
        assert root is not None
        status = root.check(image, look=check_files)
        if status is ImageStatus.MISSING:
            return f"{image} is missing"
    return None
