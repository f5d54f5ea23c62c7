"""Tables of questions and of predictions, as VLMEvalKit and MMBench write them.

An image stands in a table as base64 text. Tables of large images have many gigabytes, so only the
place of an image is kept, and it is decoded when it is opened.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from llava_uhd.data.files import BOM, iterate_json
from llava_uhd.errors import UserError
from llava_uhd.images.stored import StoredFile

IMAGE_COLUMN = "image"
SHORTEST_IMAGE = 65  # characters; what is shorter names the row whose image is meant
_QUOTED = re.compile(rb'"([^"]*(?:""[^"]*)*)"(?!")')
_LISTED = re.compile(rb"""['"]([A-Za-z0-9+/=]+)['"]""")

Row = dict[str, Any]


class TableImage(StoredFile):
    """An image that stands in a table as base64 text.

    Args:
        table: path of the file.
        offset: of the first byte of the text.
        size: of the text, in bytes.
    """

    def __init__(self, table: Path, offset: int, size: int) -> None:
        super().__init__(f"{table.name}@{offset}")
        self.table = table
        self.offset = offset
        self.size = size

    def open(self) -> BinaryIO:
        """Decodes it.

        Raises:
            UserError: the table cannot be read, or there is no base64 text.
        """
        try:
            with self.table.open("rb") as stream:
                stream.seek(self.offset)
                return io.BytesIO(base64.b64decode(stream.read(self.size), validate=True))
        except (OSError, binascii.Error) as error:
            raise UserError(f"{self} cannot be read ({error})") from error

    def __str__(self) -> str:
        return f"the image at byte {self.offset} of {self.table}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableImage) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.table, self.offset))


def read_table(file: Path, *columns: str) -> list[Row]:
    """Rows of a table.

    Args:
        file: named ``.tsv``, ``.csv``, ``.xlsx``, ``.json`` (list of objects) or ``.jsonl``.
        columns: that must be there.

    Returns:
        Column -> value of each row: texts (JSON and XLSX: also numbers), None for an empty cell,
        and for the column "image" a tuple of `TableImage`, or the short text that stands there.

    Raises:
        UserError: missing or damaged file, unknown kind, or a missing column.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    kind = file.suffix.lower()
    if kind in (".tsv", ".csv"):
        rows = list(_read_separated(file, b"\t" if kind == ".tsv" else b","))
    elif kind in (".json", ".jsonl"):
        rows = [_as_row(value, index, file) for index, value in iterate_json(file)]
    elif kind == ".xlsx":
        rows = _read_sheet(file)
    else:
        raise UserError(f"{file}: a table must be named .tsv, .csv, .xlsx, .json or .jsonl")
    absent = [name for name in columns if not rows or name not in rows[0]]
    if absent:
        raise UserError(f"{file} has no column '{absent[0]}'" if rows else f"{file} has no rows")
    return rows


def _as_row(value: Any, index: int, file: Path) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{file}, record {index}: must be an object, got {type(value).__name__}")
    return value


def whole_number(value: Any) -> Any:
    """A number in the type that ids have: ``"3"``, ``3.0`` and ``3`` are all 3; texts stay."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}(\.0)?", value):
        return int(value.removesuffix(".0"))
    return value


def images_of(row: Mapping[str, Any], by_index: Mapping[Any, Mapping[str, Any]]) -> tuple:
    """Images of a row; a short text there is the index of the row that has them.

    Args:
        row: of `read_table`.
        by_index: all rows by `whole_number` of their index.

    Raises:
        UserError: no image, and no row with one is named.
    """
    value = row.get(IMAGE_COLUMN)
    if isinstance(value, str):
        value = by_index.get(whole_number(value), {}).get(IMAGE_COLUMN)
    if not isinstance(value, tuple):
        raise UserError(f"row {row.get('index')!r} has no image, nor the index of a row with one")
    return value


def _read_separated(file: Path, separator: bytes) -> Iterator[Row]:
    with file.open("rb") as stream:
        if stream.read(len(BOM)) != BOM:
            stream.seek(0)
        names: list[str] | None = None
        for number, cells in enumerate(_records(stream, separator, file)):
            if names is None:
                names = [cell.decode("utf-8", "replace") for cell, _ in cells]
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{file}, row {number}: has {len(cells)} cells, the first line {len(names)}"
                )
            try:
                pairs = zip(names, cells, strict=True)
                yield {name: _value(name, *cell, file) for name, cell in pairs}
            except UnicodeDecodeError as error:
                raise UserError(f"{file}, row {number}: is not UTF-8 text ({error})") from None


def _value(name: str, cell: bytes, offset: int, file: Path) -> Any:
    if name == IMAGE_COLUMN and len(cell) >= SHORTEST_IMAGE:
        if cell.startswith(b"["):
            found = _LISTED.finditer(cell)
            return tuple(TableImage(file, offset + m.start(1), len(m[1])) for m in found)
        return (TableImage(file, offset, len(cell)),)
    return cell.decode("utf-8") or None


def _records(stream: BinaryIO, separator: bytes, file: Path) -> Iterator[list[tuple[bytes, int]]]:
    """Cells of each record with the offset of their first byte; quotes may hold line breaks."""
    while True:
        start, line = stream.tell(), stream.readline()
        if not line:
            return
        if not line.strip(b"\r\n"):
            continue
        while (cells := _cells(line, start, separator)) is None:
            more = stream.readline()
            if not more:
                raise UserError(f"{file}: the quotes of the record at byte {start} do not end")
            line += more
        yield cells


def _cells(line: bytes, start: int, separator: bytes) -> list[tuple[bytes, int]] | None:
    """Cells of a record, or None if its quotes are still open."""
    end = len(line) - (2 if line.endswith(b"\r\n") else line.endswith(b"\n"))
    cells, place = [], 0
    while True:
        if line.startswith(b'"', place):
            quoted = _QUOTED.match(line, place)
            if quoted is None:
                return None
            text, begin, place = quoted[1].replace(b'""', b'"'), quoted.start(1), quoted.end()
        else:
            text, begin = b"", place
        stop = line.find(separator, place, end)
        stop = end if stop < 0 else stop
        cells.append((text + line[place:stop], start + begin))
        if stop >= end:
            return cells
        place = stop + len(separator)


_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def _read_sheet(file: Path) -> list[Row]:
    """Rows of the first sheet of a workbook; its first row names the columns."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = sorted(n for n in archive.namelist() if n.startswith("xl/worksheets/sheet"))
            shared: Sequence[str] = ()
            if "xl/sharedStrings.xml" in archive.namelist():
                root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
                shared = [_text(each) for each in root.iter(f"{_SHEET}si")]
            root = ElementTree.fromstring(archive.read(names[0]))
        lines = [
            {_column(cell.get("r", "")): _cell(cell, shared) for cell in row.iter(f"{_SHEET}c")}
            for row in root.iter(f"{_SHEET}row")
        ]
    except (OSError, KeyError, IndexError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no readable workbook ({error})") from error
    except ElementTree.ParseError as error:
        raise UserError(f"{file} is no readable workbook ({error})") from error
    if not lines:
        return []
    columns = lines[0]
    return [{str(name): line.get(place) for place, name in columns.items()} for line in lines[1:]]


def _column(reference: str) -> str:
    return reference.rstrip("0123456789")


def _cell(cell: ElementTree.Element, shared: Sequence[str]) -> Any:
    kind, value = cell.get("t", "n"), cell.find(f"{_SHEET}v")
    if kind == "inlineStr":
        return _text(cell) or None
    if value is None or value.text is None:
        return None
    if kind == "s":
        return shared[int(value.text)] or None
    return whole_number(float(value.text)) if kind == "n" else value.text


def _text(element: ElementTree.Element) -> str:
    return "".join(part.text or "" for part in element.iter(f"{_SHEET}t"))
