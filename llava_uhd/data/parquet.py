"""Parquet tables as the hub has them: records in columns, images as bytes in a column.

Texts are read when a run starts, images when they are asked for, a row group at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_uhd.data.files import Bad
from llava_uhd.errors import UserError
from llava_uhd.images.stored import StoredFile

PARQUET = ".parquet"
MEDIA = ("image", "images", "video", "videos")
BATCH = 1024  # rows that are read at a time when a run starts
MAX_OPEN = 16  # tables that a process holds open
# Row groups whose images a process holds; the order "shards" draws from so many at a time.
MAX_GROUPS = 4


class Cell(NamedTuple):
    """Where an image lies.

    Attributes:
        group: row group.
        row: in it.
        column: number of the column in `MEDIA`.
        item: in the list of a column "images" or "videos", else 0.
    """

    group: int
    row: int
    column: int
    item: int


class TableRow(NamedTuple):
    """A row without its bytes.

    Attributes:
        row: the record; images and videos by their names.
        cells: of its images and videos, by column, None for one that lies in a folder.
        group: its row group.
    """

    row: dict[str, Any]
    cells: dict[str, list[Cell | None]]
    group: int


class ParquetCell(StoredFile):
    """An image or video in a column of a table.

    Args:
        table: path of the file.
        path: of the image as the table writes it.
        cell: where it lies.
    """

    def __init__(self, table: Path, path: str, cell: Cell) -> None:
        super().__init__(path)
        self.table = table
        self.cell = cell

    def open(self) -> BinaryIO:
        """Reads it; its row group is read with it and held for its neighbours.

        Raises:
            UserError: the table cannot be read, or holds nothing there.
        """
        column = MEDIA[self.cell.column]
        values = _group(str(self.table), self.cell.group, column, os.getpid())
        value = values[self.cell.row].as_py()
        if isinstance(value, list):
            value = value[self.cell.item] if self.cell.item < len(value) else None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise UserError(f"{self} is empty (0 bytes)")
        return io.BytesIO(data)

    def __str__(self) -> str:
        return f"{self.path} in {self.table}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParquetCell) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.table, self.cell))


def open_table(path: Path) -> Any:
    """Opens a table; only its last bytes are read.

    Raises:
        UserError: no table, or the reader is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow ({error}): bash install.sh --extras train,data"
        ) from error
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no parquet table, or is damaged: {error}") from error


@lru_cache(maxsize=MAX_OPEN)
def _opened(path: str, process: int) -> Any:
    """An open table. Processes do not share one: a reader with threads does not outlive a fork."""
    return open_table(Path(path))


@lru_cache(maxsize=MAX_GROUPS)
def _group(path: str, group: int, column: str, process: int) -> Any:
    """A column of a row group."""
    import pyarrow as pa

    try:
        file = _opened(path, process)
        return file.read_row_group(group, columns=[column], use_threads=False).column(column)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: row group {group} cannot be read: {error}") from error


def count_table(path: Path) -> int:
    """Rows of a table."""
    return int(open_table(path).metadata.num_rows)


def iterate_table(path: Path, bad: Bad | None = None) -> Iterator[tuple[int, TableRow]]:
    """Yields (number, row) of a table, without the bytes of images and videos.

    Args:
        path: of the table.
        bad: takes what cannot be read, instead of the error, see `iterate_json`.

    Raises:
        UserError: no table, no column of conversations, or a damaged one.
    """
    count = 0
    try:
        for row in _rows(path):
            yield count, row
            count += 1
    except UserError as error:
        if bad is None:
            raise
        bad(count, error)


def _rows(path: Path) -> Iterator[TableRow]:
    file = open_table(path)
    import pyarrow as pa

    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    columns = file.schema_arrow.names
    if "conversations" not in columns:
        raise UserError(
            f"{path} has no column 'conversations' (columns: {', '.join(columns)}): it must have "
            "one, and may have id, image or images, video or videos"
        )
    for name in columns:
        if name in MEDIA and _is_bytes(file.schema_arrow.field(name)):
            raise UserError(
                f"{path}: column '{name}' holds bare bytes: it must hold pairs of bytes and path, "
                "as datasets.Image() writes them, or paths"
            )
    wanted = [leaf for leaf in leaves if leaf.split(".")[0] in (*MEDIA, "id", "conversations")]
    wanted = [leaf for leaf in wanted if leaf.split(".")[-1] != "bytes"]
    try:
        for group in range(file.num_row_groups):
            embedded = {name for name in MEDIA if _holds_bytes(file, group, name)}
            place = 0
            batches = file.iter_batches(
                BATCH, row_groups=[group], columns=wanted, use_threads=False
            )
            for batch in batches:
                for values in batch.to_pylist():
                    yield _table_row(values, embedded, group, place)
                    place += 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _is_bytes(field: Any) -> bool:
    return str(field.type) in ("binary", "large_binary")


def _holds_bytes(file: Any, group: int, name: str) -> bool:
    """Whether a column of a row group holds bytes, not only paths."""
    metadata = file.metadata.row_group(group)
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        parts = column.path_in_schema.split(".")
        if parts[0] == name and parts[-1] == "bytes":
            told = column.statistics
            return told is None or not told.has_null_count or told.null_count < column.num_values
    return False


def _table_row(values: dict[str, Any], embedded: set[str], group: int, place: int) -> TableRow:
    """A row as a data file would have it."""
    row: dict[str, Any] = {}
    cells: dict[str, list[Cell | None]] = {}
    for name, value in values.items():
        if name not in MEDIA:
            row[name] = value
            continue
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not items:
            continue
        own = [Cell(group, place, MEDIA.index(name), item) for item in range(len(items))]
        row[name] = [_path(item, cell) for item, cell in zip(items, own, strict=True)]
        cells[name] = list(own) if name in embedded else [None] * len(own)
    talk = row.get("conversations")
    if isinstance(talk, str):
        with suppress(ValueError):  # told as a conversation of the wrong form
            row["conversations"] = json.loads(talk)
    if row.get("id") is None:
        row.pop("id", None)
    return TableRow(row, cells, group)


def _path(item: Any, cell: Cell) -> Any:
    """The name of an image; one that has none gets one from its place."""
    path = item.get("path") if isinstance(item, dict) else item
    return path or f"{MEDIA[cell.column]}-{cell.group}-{cell.row}-{cell.item}"


def table_digest(path: Path) -> str:
    """SHA-256 of the end of a table, which tells sizes, places and ranges of all its columns."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 8, 0))
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(max(size - 8 - length, 0))
        digest = hashlib.sha256(stream.read())
    digest.update(str(size).encode())
    return digest.hexdigest()
