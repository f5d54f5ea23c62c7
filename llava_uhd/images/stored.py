"""Pictures and videos that lie inside another file: in an archive, or in a column of a table."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

# Called with a length and an offset into a file.
ReadAt = Callable[[int, int], bytes]


class StoredFile(ABC):
    """A file inside another one. It is read where it lies, and never written out.

    Args:
        path: as data write it; a name and nothing else.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Last part of its path, as of a `Path`."""
        return PurePosixPath(self.path).name

    @abstractmethod
    def open(self) -> BinaryIO:
        """Its bytes as a stream in which one can jump.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def __str__(self) -> str: ...


MediaFile = Path | StoredFile


def open_media(file: MediaFile) -> BinaryIO:
    """Opens a file of either kind for reading.

    Raises:
        OSError: it cannot be read.
        UserError: the same, inside another file.
    """
    return file.open() if isinstance(file, StoredFile) else file.open("rb")


class Window(io.RawIOBase):
    """A stretch of another file, read in place.

    Args:
        read: called with a length and an offset into the whole file, gives at most so many bytes.
        offset: of the first byte.
        size: in bytes.
    """

    def __init__(self, read: ReadAt, offset: int, size: int) -> None:
        super().__init__()
        self._read_at = read
        self._offset = offset
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"a place before the beginning: {start + offset}")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        """As of any file."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """As of any file; nothing behind the window is read."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(self._size - self._place, 0))
        data = self._read_at(length, self._offset + self._place) if length else b""
        view[: len(data)] = data
        self._place += len(data)
        return len(data)
