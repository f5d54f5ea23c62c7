"""One way to read data files of every kind: JSON, JSON lines, shards, parquet tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_uhd.data.files import Bad, iterate_json
from llava_uhd.data.parquet import (
    PARQUET,
    Cell,
    ParquetCell,
    TableRow,
    count_table,
    iterate_table,
    table_digest,
)
from llava_uhd.data.shard_files import (
    IMAGES,
    SHARD,
    VIDEOS,
    Sample,
    TarMember,
    count_samples,
    iterate_shard,
    shard_digest,
)
from llava_uhd.errors import UserError
from llava_uhd.images.stored import StoredFile

# Records of a JSON file that count as neighbours, where the order keeps neighbours together.
JSON_BLOCK = 4096

# Where a file lies inside its source: offset and size in a shard, or a `Cell` of a table.
Place = tuple[int, ...]


class Contained(NamedTuple):
    """A record whose images and videos lie in the same file.

    Attributes:
        row: the record.
        images: places of its images in order, None for one that lies in a folder.
        videos: the same for its videos.
        block: stretch of the file in which it lies; reading from one is cheaper than from many.
    """

    row: Any
    images: list[Place | None]
    videos: list[Place | None]
    block: int


def iterate_rows(file: Path, bad: Bad | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (index, record) of a data file, holding one at a time.

    Args:
        file: JSON list, JSON lines, shard or parquet table.
        bad: called with index and error of what cannot be read, instead of raising it.

    Yields:
        Decoded JSON, or `Contained`.

    Raises:
        UserError: it cannot be read.
    """
    if file.suffix.lower() == SHARD:
        for index, sample in iterate_shard(file, bad):
            yield index, _from_shard(sample)
    elif file.suffix.lower() == PARQUET:
        for index, row in iterate_table(file, bad):
            yield index, _from_table(row)
    else:
        yield from iterate_json(file, bad)


def count_rows(file: Path) -> int:
    """Records of a data file.

    Raises:
        UserError: it cannot be read.
    """
    if file.suffix.lower() == SHARD:
        return count_samples(file)
    if file.suffix.lower() == PARQUET:
        return count_table(file)
    return sum(1 for _ in iterate_rows(file))


def is_container(file: Path) -> bool:
    """Whether a data file holds images itself."""
    return file.suffix.lower() in (SHARD, PARQUET)


def stored_file(source: Path, path: str, place: Sequence[int]) -> StoredFile:
    """An image or video of a source.

    Args:
        source: data file that holds it.
        path: as its record writes it.
        place: where it lies.
    """
    if source.suffix.lower() == PARQUET:
        return ParquetCell(source, path, Cell(*place))
    offset, size = place
    return TarMember(source, path, offset, size)


def file_digest(path: Path) -> str:
    """SHA-256 that tells whether a data file has changed, in hexadecimal.

    Of the bytes of a JSON file. Of a shard: of its records, and of places and sizes of its images;
    of a parquet table: of its end, which tells them. So large files need not be read through.

    Raises:
        UserError: it cannot be read.
    """
    if path.suffix.lower() == SHARD:
        return shard_digest(path)
    digest = hashlib.sha256()
    try:
        if path.suffix.lower() == PARQUET:
            return table_digest(path)
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def _from_shard(sample: Sample) -> Contained:
    """A record of a shard; one that names no images gets the names of its members."""
    found = {"image": sample.of_kind(IMAGES), "video": sample.of_kind(VIDEOS)}
    row = sample.row
    if isinstance(row, dict):
        for kind, members in found.items():
            named = any(row.get(name) is not None for name in (kind, f"{kind}s"))
            if members and not named:
                row = {**row, f"{kind}s": [f"{sample.key}.{each.kind}" for each in members]}
    images, videos = (
        [(each.offset, each.size) for each in found[kind]] for kind in ("image", "video")
    )
    return Contained(row, list(images), list(videos), 0)


def _from_table(found: TableRow) -> Contained:
    images, videos = (
        [
            None if cell is None else tuple(cell)
            for name in (kind, f"{kind}s")
            for cell in found.cells.get(name, [])
        ]
        for kind in ("image", "video")
    )
    return Contained(found.row, list(images), list(videos), found.group)
