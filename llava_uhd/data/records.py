"""Training records, kept compactly.

`llava_uhd.data.reading` reads them from files.
"""

from __future__ import annotations

import copy
import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from llava_uhd.data.drawn import Drawn
from llava_uhd.data.files import ImageRoot
from llava_uhd.data.mixture import Source
from llava_uhd.data.readers import Place, stored_file
from llava_uhd.data.rows import ROLES, Row
from llava_uhd.images.stored import MediaFile
from llava_uhd.text.templates import Turn

# Published sampler: an image counts as this many words.
IMAGE_WORDS = 128
_DECODER = json.JSONDecoder()
# One number holds the source and the place in it.
SOURCE_BITS = 40


class Record(NamedTuple):
    """One sample.

    Attributes:
        id: its name.
        images: in the order of their ``<image>`` markers.
        turns: alternating, human first.
        videos: in the order of their ``<video>`` markers.
    """

    id: str
    images: tuple[MediaFile, ...]
    turns: tuple[Turn, ...]
    videos: tuple[MediaFile, ...] = ()


class Roots(NamedTuple):
    """Folders that the paths of a data file are relative to; None: there is none."""

    images: ImageRoot | None
    videos: ImageRoot | None


class _Store:
    """Rows one behind the other in one byte buffer."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ends = array("q", [0])
        # Positive with images or videos, negative without.
        self.words = array("i")
        self.with_images = bytearray()
        self.origins = array("q")  # source, index in the file
        self.blocks = array("q")  # source, stretch of the file
        self._digest: tuple[int, str] | None = None

    def __len__(self) -> int:
        return len(self.words)

    def digest(self) -> str:
        """SHA-256 of all rows and their places."""
        if self._digest is None or self._digest[0] != len(self):
            digest = hashlib.sha256(self.buffer)
            digest.update(self.ends.tobytes())
            digest.update(self.origins.tobytes())
            self._digest = (len(self), digest.hexdigest())
        return self._digest[1]


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
        num_left_out: records left out because a file is missing or they are wrong.
    """

    def __init__(self, sources: Sequence[Source], roots: Sequence[Roots]) -> None:
        self.sources = tuple(sources)
        self.drawn: list[Drawn] = []
        self.num_left_out = 0
        self.roots_of = tuple(roots)
        self._store = _Store()
        # Rows of the store in their order here; None: all of them.
        self._picks: np.ndarray | None = None

    def append(
        self,
        row: Row,
        source: int,
        index: int,
        places: Sequence[Place | None] = (),
        block: int = 0,
    ) -> None:
        """Adds a checked row.

        Args:
            row: it.
            source: number of its source.
            index: its place in the file.
            places: where its images, then its videos lie in the file; None for one that lies in a
                folder. Empty: all of them do.
            block: stretch of the file in which it lies.
        """
        assert self._picks is None, "a selection takes no more records"
        packed: list[Any] = [row.id, list(row.images), [text for _, text in row.turns]]
        if row.videos or places:
            packed.append(list(row.videos))
        if places:
            packed.append(list(places))
        store = self._store
        store.buffer += json.dumps(packed, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        store.ends.append(len(store.buffer))
        words = max(row.words, 1)
        store.words.append(words if row.images or row.videos else -words)
        store.with_images.append(bool(row.images))
        store.origins.append((source << SOURCE_BITS) + index)
        store.blocks.append((source << SOURCE_BITS) + block)

    def take(self, indices: Sequence[int] | np.ndarray) -> Records:
        """Some of the records in this order, also several times; the buffer is shared."""
        taken = copy.copy(self)
        wanted = np.asarray(indices, np.int64)
        taken._picks = wanted if self._picks is None else self._picks[wanted]
        return taken

    def __len__(self) -> int:
        return len(self._store) if self._picks is None else len(self._picks)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, store = self.row_of(index), self._store
        text = store.buffer[store.ends[row] : store.ends[row + 1]]
        name, images, texts, *more = json.loads(text.decode("utf-8", "surrogatepass"))
        # Turns alternate and begin with human, so the roles need no storage.
        turns = tuple(Turn(ROLES[i % 2], text) for i, text in enumerate(texts))
        videos = more[0] if more else []
        places = more[1] if len(more) > 1 else [None] * (len(images) + len(videos))
        number = store.origins[row] >> SOURCE_BITS
        roots, source = self.roots_of[number], self.sources[number].path
        return Record(
            name,
            found_files(roots.images, images, places[: len(images)], source),
            turns,
            found_files(roots.videos, videos, places[len(images) :], source),
        )

    def roots(self, index: int) -> Roots:
        """Folders of a record's images and videos."""
        return self.roots_of[self.origin(index)[0]]

    def origin(self, index: int) -> tuple[int, int]:
        """Number of a record's source, and its index in the file."""
        return divmod(self._store.origins[self.row_of(index)], 1 << SOURCE_BITS)

    def key(self, index: int) -> str:
        """What a record is about: its first image or video as written, else its id, else its place.

        Neither folders nor the order of the sources have a say.
        """
        row, store = self.row_of(index), self._store
        text = store.buffer[store.ends[row] : store.ends[row + 1]]
        name, images, _, *more = json.loads(text.decode("utf-8", "surrogatepass"))
        files = [*images, *(more[0] if more else [])]
        if files:
            return f"file {files[0]}"
        return f"id {name}" if name else f"place {self.place(index)}"

    def id_of(self, index: int) -> str:
        """Name of a record; the rest of it is not decoded."""
        row, store = self.row_of(index), self._store
        head = store.buffer[store.ends[row] + 1 : store.ends[row + 1]]
        name, _ = _DECODER.raw_decode(head.decode("utf-8", "surrogatepass"))
        return str(name)

    def words(self, index: int) -> int:
        """Words of a record, without images."""
        return abs(self._store.words[self.row_of(index)])

    def size(self, index: int) -> int:
        """About as many bytes as the texts of a record have, and no fewer."""
        row, ends = self.row_of(index), self._store.ends
        return ends[row + 1] - ends[row]

    def place(self, index: int) -> str:
        """A record's source without its folder, and its index there: the same on every machine."""
        source, position = self.origin(index)
        return f"{self.sources[source].path.name} {position}"

    def where(self, index: int) -> str:
        """Says where a record stands, for messages: file, index in the file, id."""
        source, position = self.origin(index)
        return f"{self.sources[source].path}, record {position} (id {self[index].id!r})"

    def digest(self) -> str:
        """SHA-256 of the records as they are read, and of the folders of their files."""
        digest = hashlib.sha256(self._store.digest().encode())
        if self._picks is not None:
            digest.update(self._picks.tobytes())
        for roots in self.roots_of:
            folders = [None if root is None else str(root.path.absolute()) for root in roots]
            digest.update(json.dumps(folders).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def row_of(self, index: int) -> int:
        """Place of a record in the store, which repetitions of it have in common."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return place if self._picks is None else int(self._picks[place])

    def _picked(self, values: Sequence[int]) -> list[int]:
        return list(values) if self._picks is None else [values[row] for row in self._picks]

    @property
    def lengths(self) -> list[int]:
        """Published length of each record: words, plus 128 if it has an image."""
        pairs = zip(self.modality_lengths, self._picked(self._store.with_images), strict=True)
        return [abs(words) + IMAGE_WORDS * image for words, image in pairs]

    @property
    def modality_lengths(self) -> list[int]:
        """Published signed length: words of records with images or videos, minus words of others.

        A record without a word counts 1, so that its sign is not lost.
        """
        return self._picked(self._store.words)

    @property
    def blocks(self) -> list[int]:
        """A number for each record: those of the same stretch of a file have the same."""
        return self._picked(self._store.blocks)


def found_files(
    root: ImageRoot | None, names: Sequence[str], places: Sequence[Any], source: Path
) -> tuple[MediaFile, ...]:
    """The files of a record.

    Args:
        root: folder of those that lie in one.
        names: as the record writes them.
        places: of those that lie in the source, see `Records.append`.
        source: data file.
    """
    folder = root.path if root else Path()
    return tuple(
        folder / name if place is None else stored_file(source, name, place)
        for name, place in zip(names, places, strict=True)
    )
