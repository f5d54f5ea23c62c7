"""Packs data into shards: every record with its images, in order, as they are.

The files are copied byte for byte. A shard appears under its name only when it is complete, and a
run that was broken off goes on behind the last complete one; the result is the same to the last
byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from PIL import Image

from llava_uhd.data.mixture import Source, find_sources
from llava_uhd.data.readers import Contained, file_digest
from llava_uhd.data.reading import MISSING, Rules, check_value, name_of, open_roots
from llava_uhd.data.records import Roots, found_files
from llava_uhd.data.shard_files import (
    BLOCK,
    IMAGES,
    INDEX,
    MAX_MEMBER,
    SHARD,
    VIDEOS,
    count_samples,
    ensure_index,
)
from llava_uhd.errors import UserError, make_folder
from llava_uhd.images.stored import MediaFile, open_media

STATE_FILE = "shards.json"
NAME = "shard-{:06d}" + SHARD
# Endings of pictures whose names have none.
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Packing:
    """What is packed.

    Attributes:
        paths: data files and mixtures.
        out: folder of the shards.
        image_folder: image paths are relative to it.
        video_folder: the same for videos; None: `image_folder`.
        size: of a shard in bytes, roughly; a sample is never divided.
        missing: whether a record with a missing file, or a wrong one, is an error or left out.
    """

    paths: Sequence[str]
    out: Path
    image_folder: str | None = None
    video_folder: str | None = None
    size: int = 10**9
    missing: Literal["error", "skip"] = "error"


class Packed(NamedTuple):
    """What was made.

    Attributes:
        samples: in all shards.
        shards: files.
        bytes: of all of them.
        left_out: records.
    """

    samples: int
    shards: int
    bytes: int
    left_out: int


class _Item(NamedTuple):
    """A record and its files."""

    row: Any
    images: tuple[MediaFile, ...]
    videos: tuple[MediaFile, ...]
    where: str


class _Counter:
    """Counts what is left out on the way."""

    def __init__(self) -> None:
        self.seen = 0
        self.left_out = 0


def pack_shards(options: Packing, progress: Progress | None = None) -> Packed:
    """Packs data into shards, or goes on with it.

    Args:
        options: what, where and how.
        progress: called with the name of the shard, the records seen, and all of them.

    Raises:
        UserError: wrong or missing data, a folder with shards of other data, a full disk.
    """
    sources = find_sources(options.paths)
    roots = open_roots(sources, (options.image_folder, options.video_folder), False)
    for source in sources:
        if source.weight is not None or source.epochs != 1:
            raise UserError(
                f"{source.place}: weight and epochs are for training: leave them out here, and "
                "write a mixture over the shards"
            )
    make_folder(options.out, "folder of shards")
    done = _begin(options, sources)
    total = sum(source.count_rows() for source in sources) if progress is not None else 0
    counter = _Counter()
    items = _items(sources, roots, options, counter)
    for _ in range(sum(done)):
        next(items, None)
    try:
        for name, count in _write_all(items, options, len(done), sum(done)):
            done.append(count)
            if progress is not None:
                progress(name, counter.seen, total)
    except OSError as error:
        raise UserError(
            f"{options.out} cannot be written ({error.strerror or error}): make room and start "
            "again, what is complete is kept"
        ) from error
    if not done:
        raise UserError(f"{', '.join(options.paths)}: nothing to pack")
    files = [options.out / NAME.format(number) for number in range(len(done))]
    size = sum(file.stat().st_size for file in files)
    packed = Packed(sum(done), len(done), size, counter.left_out)
    _write_state(options, sources, packed)
    return packed


def _fingerprint(options: Packing, sources: Sequence[Source]) -> str:
    """What the bytes of the shards follow from."""
    content = [[file_digest(each.path), each.strategy, each.seed] for each in sources]
    settings = [content, options.size, options.missing]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _write_state(options: Packing, sources: Sequence[Source], packed: Packed | None) -> None:
    values: dict[str, Any] = {"format": 1, "made_from": _fingerprint(options, sources)}
    values["sources"] = [str(source.path) for source in sources]
    if packed is not None:
        values |= packed._asdict()
    values["finished"] = packed is not None
    beside = options.out / f"{STATE_FILE}.part"
    beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    beside.replace(options.out / STATE_FILE)


def _begin(options: Packing, sources: Sequence[Source]) -> list[int]:
    """Samples of the complete shards of an earlier run, which this one goes on with."""
    state = options.out / STATE_FILE
    there = sorted(options.out.glob(f"*{SHARD}"))
    if not state.is_file():
        if there:
            raise UserError(f"{options.out} holds shards of another origin: name a new folder")
        _write_state(options, sources, None)
        return []
    try:
        before = json.loads(state.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{state} is damaged ({error}): remove the folder") from error
    if before.get("made_from") != _fingerprint(options, sources):
        raise UserError(
            f"{options.out} holds shards of other data, or of other options: name a new folder, or "
            "remove this one"
        )
    done: list[int] = []
    while (file := options.out / NAME.format(len(done))).is_file():
        done.append(count_samples(file))
    return done


def _items(
    sources: Sequence[Source], roots: Sequence[Roots], options: Packing, counter: _Counter
) -> Iterator[_Item]:
    """Records to pack, in order."""
    for source, own in zip(sources, roots, strict=True):
        total = None if source.strategy == "all" else source.count_rows()
        for index, value in source.rows(total):
            counter.seen += 1
            where = f"{source.path}, record {index} (id {name_of(value)!r})"
            checked, findings = check_value(value, own, Rules())
            if checked is None:
                what = findings[0][1]
                if options.missing == "error":
                    about = "missing file" if findings[0][0] == MISSING else "wrong record"
                    raise UserError(f"{where}: {what}; --missing skip leaves it out ({about})")
                counter.left_out += 1
                continue
            row = value.row if isinstance(value, Contained) else value
            places = checked.places or [None] * (len(checked.row.images) + len(checked.row.videos))
            number = len(checked.row.images)
            yield _Item(
                row,
                found_files(own.images, checked.row.images, places[:number], source.path),
                found_files(own.videos, checked.row.videos, places[number:], source.path),
                where,
            )


def _write_all(
    items: Iterator[_Item], options: Packing, first: int, key: int
) -> Iterator[tuple[str, int]]:
    """Writes shard after shard; yields name and samples of each when it is complete."""
    number = first
    item = next(items, None)
    while item is not None:
        target = options.out / NAME.format(number)
        beside = target.with_name(f"{target.name}.part")
        count = 0
        with beside.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                while item is not None:
                    members = _members(item, key + count)
                    try:
                        size = sum(BLOCK + -(-length // BLOCK) * BLOCK for _, _, length in members)
                        if count and archive.offset + size > options.size:
                            break
                        for name, data, length in members:
                            _add(archive, name, data, length)
                    finally:
                        for _, data, _ in members:
                            data.close()
                    count += 1
                    item = next(items, None)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(target)
        # An index of an earlier file of this name would be made anew anyway.
        target.with_name(target.name + INDEX).unlink(missing_ok=True)
        ensure_index(target)
        key += count
        number += 1
        yield target.name, count


def _members(item: _Item, key: int) -> list[tuple[str, BinaryIO, int]]:
    """(name, bytes, their number) of the members of a sample."""
    text = json.dumps(item.row, ensure_ascii=False).encode()
    found: list[tuple[str, BinaryIO, int]] = [(f"{key:09d}.json", io.BytesIO(text), len(text))]
    for files, endings in ((item.images, IMAGES), (item.videos, VIDEOS)):
        for number, file in enumerate(files):
            if isinstance(file, Path) and file.is_dir():
                raise UserError(
                    f"{item.where}: {file} is a folder of frames, which shards cannot hold: make "
                    "it a video file"
                )
            data = open_media(file)
            length = data.seek(0, os.SEEK_END)
            data.seek(0)
            if length > MAX_MEMBER:
                raise UserError(f"{item.where}: {file} has {length} bytes, more than {MAX_MEMBER}")
            place = f"{number}." if len(files) > 1 else ""
            found.append((f"{key:09d}.{place}{_ending(file, data, endings)}", data, length))
    return found


def _ending(file: MediaFile, data: BinaryIO, endings: tuple[str, ...]) -> str:
    """What a member's name ends with, so that readers know it for an image or a video."""
    own = file.name.rpartition(".")[2].lower()
    if own in endings:
        return own
    if endings is VIDEOS:
        return "mp4"
    try:
        with Image.open(data) as image:
            kind = image.format or ""
    except (OSError, ValueError, SyntaxError):
        kind = ""  # a broken image stays one: training says so
    data.seek(0)
    found = ENDINGS.get(kind, kind.lower())
    return found if found in endings else "jpg"


def _add(archive: tarfile.TarFile, name: str, data: BinaryIO, length: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = length
    archive.addfile(info, data)
