"""Shards: tar files in the layout of WebDataset, read at random places without unpacking.

A sample is a run of members that share a name up to its first dot: ``000123.json`` (the record),
``000123.jpg`` or ``000123.0.jpg``, ``000123.1.jpg``, ... (its images in order), ``000123.mp4``. A
small index beside the archive tells where each member lies, and holds the records themselves; it is
made on first use, and made anew when size or time of the archive have changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_uhd.data.files import Bad
from llava_uhd.errors import UserError
from llava_uhd.images.stored import StoredFile, Window

logger = logging.getLogger(__name__)

SHARD = ".tar"
INDEX = ".index"  # behind the whole name of the archive
FORMAT = 1

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg", "ts", "flv", "ogv")

BLOCK = tarfile.BLOCKSIZE
MAX_RECORD = 64 << 20  # bytes of a record
MAX_MEMBER = 8 << 30  # bytes of an image or video: what a plain header can tell
MAX_NAME = 4096
MAX_OPEN = 32  # archives that a process holds open


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        kind: its name behind the first dot, in lower case.
        offset: of its first byte in the archive.
        size: in bytes.
    """

    kind: str
    offset: int
    size: int


class Sample(NamedTuple):
    """Members of one sample.

    Attributes:
        key: what their names have in common.
        row: decoded record; None where `wrong` says why there is none.
        members: all others, in the order of the archive.
        wrong: what is wrong with the record, or an empty text.
    """

    key: str
    row: Any
    members: list[Member]
    wrong: str = ""

    def of_kind(self, endings: tuple[str, ...]) -> list[Member]:
        """Its images or its videos, by the numbers in their names."""
        found = [each for each in self.members if each.kind.rpartition(".")[2] in endings]
        return sorted(found, key=lambda each: _number(each.kind))


def _number(kind: str) -> tuple[int, str]:
    head = kind.rpartition(".")[0]
    digits = "".join(letter for letter in head if letter.isdigit())
    return (int(digits[:18]) if digits else -1, kind)


class TarMember(StoredFile):
    """An image or video in a shard.

    Args:
        shard: path of the archive.
        path: of the image as its record writes it.
        offset: of its first byte.
        size: in bytes.
    """

    def __init__(self, shard: Path, path: str, offset: int, size: int) -> None:
        super().__init__(path)
        self.shard = shard
        self.offset = offset
        self.size = size

    def open(self) -> BinaryIO:
        """Opens it where it lies.

        Raises:
            UserError: it is empty, or the archive is not the one that the index was made from.
        """
        if self.size == 0:
            raise UserError(f"{self} is empty (0 bytes)")
        archive = _opened(str(self.shard))
        header = archive.read(BLOCK, self.offset - BLOCK)
        if not _is_header(header, self.size):
            raise UserError(
                f"{self} is not where the index tells: the archive has changed or is damaged; "
                f"remove {self.shard}{INDEX} and start again"
            )
        return io.BufferedReader(Window(archive.read, self.offset, self.size), 1 << 16)

    def __str__(self) -> str:
        return f"{self.path} in {self.shard}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TarMember) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.shard, self.offset))


def _is_header(block: bytes, size: int) -> bool:
    """Whether a block of an archive is the header of a regular file of this size."""
    try:
        told = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return told.isreg() and told.size == size


class _Archive:
    """An open file that is read at places; closed with its last user."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error

    def read(self, length: int, offset: int) -> bytes:
        """At most ``length`` bytes from ``offset`` on. The place of no other reader moves."""
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


@lru_cache(maxsize=MAX_OPEN)
def _opened(path: str) -> _Archive:
    return _Archive(path)


def iterate_shard(shard: Path, bad: Bad | None = None) -> Iterator[tuple[int, Sample]]:
    """Yields (number, sample) of a shard, without its images.

    Args:
        shard: path of the archive.
        bad: takes what cannot be read, instead of the error, see `iterate_json`.

    Raises:
        UserError: no archive, or a sample without a record.
    """
    try:
        index = ensure_index(shard)
    except UserError as error:
        if bad is None:
            raise
        bad(0, error)
        return
    with index.open("rb") as stream:
        next(stream)
        for number, line in enumerate(stream):
            key, row, members, wrong = json.loads(line)
            if not wrong:
                yield number, Sample(key, row, [Member(*each) for each in members])
                continue
            told = UserError(f"{shard}, record {number} ({key}): {wrong}")
            if bad is None:
                raise told
            bad(number, told)


def count_samples(shard: Path) -> int:
    """Samples of a shard, by its index.

    Raises:
        UserError: no archive.
    """
    return int(_head(ensure_index(shard))["samples"])


def ensure_index(shard: Path) -> Path:
    """The index of a shard, made now if there is none that fits.

    It stands beside the archive, or where that folder is not to be written in a folder of the user.

    Raises:
        UserError: no archive, a compressed or damaged one, or no place for the index.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {error.strerror or error}") from error
    cached = _cache_folder() / f"{_path_digest(shard)}{INDEX}"
    places = [shard.with_name(shard.name + INDEX), cached]
    for place in places:
        head = _head(place)
        if head and (head["size"], head["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return place
    logger.info("making the index of %s", shard)
    lines = [_index_line(sample) for sample in scan_shard(shard)]
    reason: OSError | None = None
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_index(place, status, lines)
        except OSError as error:
            reason = error
        else:
            return place
    raise UserError(
        f"the index of {shard} can be written neither beside it nor in {places[1].parent} "
        f"({reason}): set XDG_CACHE_HOME to a folder that can be written"
    )


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "llava_uhd/shards"


def _path_digest(shard: Path) -> str:
    return hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:32]


def _head(index: Path) -> dict[str, Any]:
    """First line of an index; empty if it is none, or of another format."""
    try:
        with index.open("rb") as stream:
            head = json.loads(stream.readline())
    except (OSError, ValueError):
        return {}
    fits = isinstance(head, dict) and head.get("format") == FORMAT
    return head if fits and {"size", "mtime_ns", "samples"} <= set(head) else {}


def write_index(place: Path, status: os.stat_result, lines: list[bytes]) -> None:
    """Writes an index so that a reader never finds half of one.

    Args:
        place: of the index.
        status: of the archive.
        lines: of its samples.

    Raises:
        OSError: the place cannot be written.
    """
    head = {
        "format": FORMAT,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "samples": len(lines),
        "sha256": hashlib.sha256(b"".join(lines)).hexdigest(),
    }
    beside = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as stream:
            stream.write(json.dumps(head).encode() + b"\n")
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def _index_line(sample: Sample) -> bytes:
    return json.dumps(sample).encode() + b"\n"


def shard_digest(shard: Path) -> str:
    """SHA-256 of the records of a shard and of the places and sizes of its members."""
    return str(_head(ensure_index(shard))["sha256"])


def scan_shard(shard: Path) -> Iterator[Sample]:
    """Walks over an archive and yields its samples.

    Raises:
        UserError: no archive, a compressed, damaged or truncated one.
    """
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            yield from _group(_members(archive, shard, size), shard)
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            if archive.fileobj.read(BLOCK).strip(b"\0"):  # type: ignore[union-attr]
                raise UserError(f"shard {shard} is damaged at byte {archive.offset}")
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"shard {shard} is no plain tar file, or is damaged ({error}): compressed archives "
            "must be unpacked to plain ones first (gunzip), because images are read in place"
        ) from error


def _members(archive: tarfile.TarFile, shard: Path, size: int) -> Iterator[tuple[str, Member]]:
    """Yields (key, member) of all regular files; names are labels, nothing is ever written."""
    while (entry := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # they would pile up
        if entry.isdir():
            continue
        name = entry.name
        if not entry.isreg() or entry.issparse():
            raise UserError(f"shard {shard}: member {name!r:.200} is a link or the like, no file")
        if len(name) > MAX_NAME or entry.size > MAX_MEMBER:
            raise UserError(
                f"shard {shard}: member {name!r:.200} has {entry.size} bytes, more than "
                f"{MAX_MEMBER}, or a name of more than {MAX_NAME} characters"
            )
        if entry.offset_data + entry.size > size:
            raise UserError(f"shard {shard} ends inside of member {name!r:.200}: copy it again")
        folder, slash, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        yield f"{folder}{slash}{stem}", Member(kind.lower(), entry.offset_data, entry.size)


def _group(members: Iterator[tuple[str, Member]], shard: Path) -> Iterator[Sample]:
    """Joins neighbouring members of the same key."""
    archive = _Archive(str(shard))
    current: str | None = None
    held: list[Member] = []
    for key, member in members:
        if key != current and held:
            yield _sample(str(current), held, archive)
            held = []
        current = key
        held.append(member)
    if held:
        yield _sample(str(current), held, archive)


def _sample(key: str, members: list[Member], archive: _Archive) -> Sample:
    records = [each for each in members if each.kind == "json"]
    others = [each for each in members if each.kind != "json"]
    if len(records) != 1:
        return Sample(key, None, others, f"has {len(records)} .json members, one is needed")
    (member,) = records
    if member.size > MAX_RECORD:
        return Sample(key, None, others, f"its .json member has {member.size} bytes")
    try:
        row = json.loads(archive.read(member.size, member.offset).decode())
    except (ValueError, RecursionError) as error:
        return Sample(key, None, others, f"its .json member is not valid JSON: {error}")
    return Sample(key, row, others)
