"""Where data comes from: data files read as a stream, and paths that must stay in their folder."""

from __future__ import annotations

import enum
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from llava_uhd.errors import UserError

_DOWNLOAD = "hf download --repo-type dataset"

# Published data files: what they are and how to get them.
DATA_SOURCES = {
    "blip_laion_cc_sbu_558k.json": (
        "the 558K captions of the first stage, on the hub as liuhaotian/LLaVA-Pretrain; fetch it "
        f"and unpack its images.zip: {_DOWNLOAD} liuhaotian/LLaVA-Pretrain "
        "--local-dir playground/data/LLaVA-Pretrain"
    ),
    "llava_v1_5_mix665k.json": (
        "the 665K instructions of the second stage, on the hub as liuhaotian/LLaVA-Instruct-150K; "
        f"fetch it: {_DOWNLOAD} liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json "
        "--local-dir playground/data (its images come from COCO, GQA, OCR-VQA, TextVQA and Visual "
        "Genome, see playground/README.md)"
    ),
}

# Characters read at a time.
CHUNK = 1 << 20
BLANKS = re.compile(r"\s*")
BOM = b"\xef\xbb\xbf"  # some editors begin a UTF-8 file with it

# Takes what cannot be read: an index and the mistake there.
Bad = Callable[[int, UserError], None]


class ImageStatus(enum.Enum):
    """What `ImageRoot.check` found."""

    PRESENT = "present"
    MISSING = "missing"
    UNCHECKED = "unchecked"


class ImageRoot:
    """A folder of images or videos that no path may leave, neither by its text nor by a link.

    Args:
        path: of the folder.
        follow_links: allow links inside the folder that lead out of it.
        kind: what lies there. A video may also be a folder of frames.

    Raises:
        UserError: the folder does not exist.
    """

    def __init__(
        self, path: Path, follow_links: bool = False, kind: Literal["image", "video"] = "image"
    ) -> None:
        if not path.is_dir():
            raise UserError(
                f"{kind} folder {path} does not exist: data.{kind}_folder must name the folder "
                f"that the {kind} paths of the data file are relative to"
            )
        self.path = path
        self.follow_links = follow_links
        self.kind = kind
        self._prefix = os.path.join(path, "")
        self._real = os.path.realpath(path)
        # Images share few folders: each is resolved once.
        self._folders: dict[str, bool] = {}

    def check(self, name: str, look: bool = True) -> ImageStatus:
        """Checks one relative path.

        Args:
            name: as written in the data file.
            look: also look at the file system.

        Raises:
            UserError: the path leaves the folder.
        """
        # Both kinds of separators and drive letters: a data file may come from another system.
        plain = name.replace("\\", "/")
        if "\0" in name or plain.startswith("/") or plain[1:2] == ":" or ".." in plain.split("/"):
            raise UserError(
                f"{self.kind} path {name!r} is refused: it must stay inside {self.path}"
            )
        if not look:
            return ImageStatus.UNCHECKED
        return self._look(name)

    def _look(self, name: str) -> ImageStatus:
        file = f"{self._prefix}{name}"
        try:
            mode = os.lstat(file).st_mode
        except OSError:
            return ImageStatus.MISSING
        self._refuse_leaving_links(name, file, stat.S_ISLNK(mode))
        if stat.S_ISREG(mode):
            return ImageStatus.PRESENT
        if self.kind == "video" and os.path.isdir(file):
            self._check_frames(name, file)
            return ImageStatus.PRESENT
        linked = stat.S_ISLNK(mode) and os.path.isfile(file)
        return ImageStatus.PRESENT if linked else ImageStatus.MISSING

    def _check_frames(self, name: str, folder: str) -> None:
        """Looks at the files of a folder of frames."""
        if self.follow_links:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                self._refuse_leaving_links(f"{name}/{entry.name}", entry.path, entry.is_symlink())

    def _refuse_leaving_links(self, name: str, file: str, is_link: bool) -> None:
        if self.follow_links:
            return
        folder = os.path.dirname(file)
        if folder not in self._folders:
            self._folders[folder] = self._inside(folder)
        if not self._folders[folder] or (is_link and not self._inside(file)):
            raise UserError(
                f"{self.kind} path {name!r} is refused: a link leads out of {self.path} "
                "(set data.follow_links: true if the link is yours)"
            )

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(self._real.rstrip(os.sep) + os.sep)


def check_data_file(file: Path) -> None:
    """Raises UserError if a data file is not there; a published one is told how to get."""
    if file.is_file():
        return
    what = "is a folder, not a data file" if file.is_dir() else "does not exist"
    source = DATA_SOURCES.get(file.name)
    if source:
        raise UserError(f"data file {file} {what}: it is {source}")
    raise UserError(
        f"data file {file} {what}: data.path must name a JSON list (or JSON lines) of samples with "
        '"image" and "conversations", or a YAML mixture of such files'
    )


def iterate_json(file: Path, bad: Bad | None = None) -> Iterator[tuple[int, Any]]:
    """Yields (index, decoded value) of a JSON list or of JSON lines, holding one at a time.

    Args:
        file: to read.
        bad: called with index and error of what cannot be read, instead of raising it. Reading
            goes on behind a bad line, and ends at a mistake in a list.

    Raises:
        UserError: not JSON; the message has the index.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(len(BOM) if stream.read(len(BOM)) == BOM else 0)
            start, head = stream.tell(), stream.read(1)
            while head and head.isspace():
                start, head = stream.tell(), stream.read(1)
            stream.seek(start)
            if head == b"[":
                yield from _iterate_list(stream, file, bad)
            elif head:
                yield from _iterate_lines(stream, file, bad)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _iterate_lines(stream: IO[bytes], file: Path, bad: Bad | None) -> Iterator[tuple[int, Any]]:
    index = 0
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            told = UserError(f"{file}, line {number} is not {_expected(error)}: {_reason(error)}")
            if bad is None:
                raise told from error
            bad(index, told)
        else:
            yield index, value
        index += 1


def _expected(error: ValueError | RecursionError) -> str:
    return "a UTF-8 text" if isinstance(error, UnicodeDecodeError) else "valid JSON"


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "its lists or objects are nested too deeply"
    return str(getattr(error, "msg", error))


def _iterate_list(stream: IO[bytes], file: Path, bad: Bad | None) -> Iterator[tuple[int, Any]]:
    count = 0
    try:
        for value in _list_items(io.TextIOWrapper(stream, encoding="utf-8"), file):
            yield count, value
            count += 1
    except UnicodeDecodeError as error:
        told = UserError(f"{file} is not a UTF-8 text file near record {count}: {error}")
        if bad is None:
            raise told from error
        bad(count, told)
    except UserError as error:
        if bad is None:
            raise
        bad(count, error)


def _list_items(stream: IO[str], file: Path) -> Iterator[Any]:
    """Decodes the items of a list."""
    decoder = json.JSONDecoder()
    stream.read(1)
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
        except (ValueError, RecursionError) as error:
            # Either the item is cut at the end of the buffer, or it is wrong: read on to know.
            more = stream.read(size)
            if not more:
                raise UserError(
                    f"{file} is not valid JSON at record {index}: {_reason(error)} (cut short?)"
                ) from error
            buffer, position = buffer[position:] + more, 0
            size = max(CHUNK, len(buffer))
            continue
        yield value
        index, size = index + 1, CHUNK
