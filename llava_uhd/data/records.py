"""Training records: drawn from data files, checked up front, kept compactly.

Every mistake is collected with its file and index, so that one run shows them all, before any
training time is spent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from llava_uhd.data.files import ImageRoot, ImageStatus
from llava_uhd.data.mixture import Drawn, Source, find_sources
from llava_uhd.data.rows import ROLES, Row, parse_row
from llava_uhd.errors import UserError
from llava_uhd.text.templates import Turn

logger = logging.getLogger(__name__)

# Published sampler: an image counts as this many words.
IMAGE_WORDS = 128

# So many problems, and so many files, are shown; all are counted.
MAX_SHOWN = 20
MAX_FILES_SHOWN = 3


class Record(NamedTuple):
    """One sample.

    Attributes:
        id: its name.
        images: in the order of their ``<image>`` markers.
        turns: alternating, human first.
        videos: in the order of their ``<video>`` markers.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    videos: tuple[Path, ...] = ()


class Roots(NamedTuple):
    """Folders that the paths of a data file are relative to; None: there is none."""

    images: ImageRoot | None
    videos: ImageRoot | None


class Records(Sequence[Record]):
    """Checked records, packed into one byte buffer.

    A list of objects would be copied page by page into every data worker, because reading a Python
    object writes its reference count; one buffer is shared. Records are decoded when asked for.

    Args:
        sources: the files that the records come from.
        roots: folders of images and videos of each source.

    Attributes:
        sources: the same.
        roots_of: folders of images and videos of each source.
        drawn: what was drawn from each source; filled when it has been read.
        num_left_out: records left out because an image or video is missing.
    """

    def __init__(self, sources: Sequence[Source], roots: Sequence[Roots]) -> None:
        self.sources = tuple(sources)
        self.drawn: list[Drawn] = []
        self.num_left_out = 0
        self.roots_of = tuple(roots)
        self._buffer = bytearray()
        self._ends = array("q", [0])
        # Positive with images or videos, negative without.
        self._words = array("i")
        self._with_images = bytearray()
        self._origins = array("q")  # source * 2**40 + index in the file

    def append(self, row: Row, source: int, index: int) -> None:
        """Adds a checked row.

        Args:
            row: it.
            source: number of its source.
            index: its place in the file.
        """
        packed: list[Any] = [row.id, list(row.images), [text for _, text in row.turns]]
        if row.videos:
            packed.append(list(row.videos))
        self._buffer += json.dumps(packed, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        self._ends.append(len(self._buffer))
        words = max(row.words, 1)
        self._words.append(words if row.images or row.videos else -words)
        self._with_images.append(bool(row.images))
        self._origins.append(source * 2**40 + index)

    def __len__(self) -> int:
        return len(self._words)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = self._checked(index)
        row = self._buffer[self._ends[index] : self._ends[index + 1]]
        name, images, texts, *videos = json.loads(row.decode("utf-8", "surrogatepass"))
        # Turns alternate and begin with human, so the roles need no storage.
        turns = tuple(Turn(ROLES[i % 2], text) for i, text in enumerate(texts))
        roots = self.roots(index)
        return Record(
            name,
            _under(roots.images, images),
            turns,
            _under(roots.videos, videos[0] if videos else []),
        )

    def roots(self, index: int) -> Roots:
        """Folders of a record's images and videos."""
        return self.roots_of[self._origins[self._checked(index)] >> 40]

    def where(self, index: int) -> str:
        """Says where a record stands, for messages: file, index in the file, id."""
        source, position = divmod(self._origins[self._checked(index)], 2**40)
        return f"{self.sources[source].path}, record {position} (id {self[index].id!r})"

    def digest(self) -> str:
        """SHA-256 of the records as they are read, and of the folders of their files."""
        digest = hashlib.sha256(self._buffer)
        digest.update(self._ends.tobytes())
        digest.update(self._origins.tobytes())
        for roots in self.roots_of:
            folders = [None if root is None else str(root.path.absolute()) for root in roots]
            digest.update(json.dumps(folders).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _checked(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return place

    @property
    def lengths(self) -> list[int]:
        """Published length of each record: words, plus 128 if it has an image."""
        pairs = zip(self._words, self._with_images, strict=True)
        return [abs(words) + IMAGE_WORDS * image for words, image in pairs]

    @property
    def modality_lengths(self) -> list[int]:
        """Published signed length: words of records with images or videos, minus words of others.

        A record without a word counts 1, so that its sign is not lost.
        """
        return list(self._words)


def _under(root: ImageRoot | None, names: Sequence[str]) -> tuple[Path, ...]:
    folder = root.path if root else Path()
    return tuple(folder / name for name in names)


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
    video_folder: str | os.PathLike[str] | None = None,
    *,
    image_first: bool | str = False,
    check_files: bool = True,
    follow_links: bool = False,
    missing: Literal["error", "skip"] = "error",
    max_missing: float = 0.01,
) -> Records:
    """Reads and checks LLaVA JSON (a list) or JSONL files, or what a YAML mixture draws from them.

    Args:
        path: one file or several.
        image_folder: image paths are relative to it.
        video_folder: video paths are relative to it; None: `image_folder`.
        image_first: see `llava_uhd.data.rows.place_marker`.
        check_files: look for every image and video.
        follow_links: allow links inside the folders that lead out of them.
        missing: whether a missing image or video is an error, or its record is left out and
            counted.
        max_missing: with "skip", the largest share of records that may be left out.

    Raises:
        UserError: a missing file, or all problems found (the first 20 shown, all counted).
    """
    paths = [os.fspath(path)] if isinstance(path, str | os.PathLike) else list(path)
    sources = find_sources(paths)
    folders = (image_folder, video_folder)
    records = Records(sources, _open_roots(sources, folders, follow_links))
    problems, absent = _Problems(), _Problems()
    for number in range(len(sources)):
        _read_source(records, number, image_first, check_files, problems, absent)
    _settle(records, problems, absent, missing, max_missing)
    return records


def _open_roots(
    sources: Sequence[Source],
    folders: tuple[str | os.PathLike[str] | None, str | os.PathLike[str] | None],
    follow_links: bool,
) -> list[Roots]:
    """The folders of each source; sources that share one share what was looked up in it."""
    opened: dict[tuple[str, str], ImageRoot] = {}

    def open_root(
        folder: str | os.PathLike[str] | None, kind: Literal["image", "video"]
    ) -> ImageRoot | None:
        if folder is None:
            return None
        key = (os.fspath(folder), kind)
        if key not in opened:
            opened[key] = ImageRoot(Path(folder), follow_links, kind)
        return opened[key]

    roots = []
    for source in sources:
        images = source.image_folder or folders[0]
        videos = source.video_folder or folders[1]
        roots.append(Roots(open_root(images, "image"), open_root(videos or images, "video")))
    return roots


def _read_source(
    records: Records,
    number: int,
    image_first: bool | str,
    check_files: bool,
    problems: _Problems,
    absent: _Problems,
) -> None:
    """Appends what a source draws, and what is to be said about it.

    Raises:
        UserError: the file is no JSON, is empty, or has too few records.
    """
    source, roots = records.sources[number], records.roots_of[number]
    # Only a strategy that draws has to know how many there are.
    total = None if source.strategy == "all" else source.count_rows()
    digest = hashlib.sha256()
    drawn = left_out = 0
    for index, row in source.rows(total) if total != 0 else ():
        drawn += 1
        name = row.get("id", "") if isinstance(row, dict) else ""
        digest.update(f"{index} {name}\n".encode("utf-8", "surrogatepass"))
        where = f"{source.path}, record {index}" if len(records.sources) > 1 else f"record {index}"
        try:
            parsed = parse_row(row, image_first)
            status = _check_files(parsed, roots, check_files)
        except UserError as error:
            problems.add(f"{where}: {error}")
        else:
            if status is None:
                records.append(parsed, number, index)
            else:
                absent.add(f"{where}: {status}")
                left_out += 1
    if drawn == 0:
        raise UserError(
            f"{source.place} holds no records: expected a list of samples or JSON lines"
        )
    total = drawn if total is None else total
    records.drawn.append(Drawn(source, total, drawn, left_out, digest.hexdigest()))


def _settle(
    records: Records, problems: _Problems, absent: _Problems, missing: str, max_missing: float
) -> None:
    """Raises what was collected, or reports what was left out."""
    files = list(dict.fromkeys(str(source.path) for source in records.sources))
    names = ", ".join(files[:MAX_FILES_SHOWN])
    if len(files) > MAX_FILES_SHOWN:
        names += f" and {len(files) - MAX_FILES_SHOWN} more files"
    total = sum(each.drawn for each in records.drawn)
    if problems.count:
        raise UserError(problems.text(f"{names}: {problems.count} of {total} records are wrong:"))
    if not absent.count:
        return
    if missing == "error" or absent.count > max_missing * total:
        bound = "" if missing == "error" else f", more than the allowed share of {max_missing}"
        advice = "; set data.on_broken_image: skip to leave them out" if not bound else ""
        raise UserError(
            absent.text(
                f"{names}: {absent.count} of {total} records name image or video files that are "
                f"missing{bound}{advice}:"
            )
        )
    records.num_left_out = absent.count
    logger.warning(
        "%s", absent.text(f"{names}: {absent.count} records left out, images or videos missing:")
    )


def _check_files(row: Row, roots: Roots, look: bool) -> str | None:
    """Returns the first missing file's message, or None.

    Raises:
        UserError: a path that leaves its folder, or no folder at all.
    """
    for names, root, kind in (
        (row.images, roots.images, "image"),
        (row.videos, roots.videos, "video"),
    ):
        if names and root is None:
            other = " or data.image_folder" if kind == "video" else ""
            raise UserError(f"has {kind}s, but data.{kind}_folder{other} is not set")
        for name in names:
            assert root is not None
            if root.check(name, look) is ImageStatus.MISSING:
                return f"{name} is missing in {root.path}"
    return None
