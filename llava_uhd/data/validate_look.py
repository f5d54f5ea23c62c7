"""Opens images and videos and counts tokens, in several processes.

A file that ends the process which decodes it is found too, and takes no other with it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from llava_uhd.config.model import VideoConfig
from llava_uhd.data.dataset import BrokenFileError, ConversationDataset
from llava_uhd.data.records import Records
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image
from llava_uhd.images.video import read_video
from llava_uhd.text.encoding import IGNORE_INDEX

CHUNK = 16  # records that a process takes at a time


@dataclass
class Looked:
    """What a record turned out to be.

    Attributes:
        index: among the records.
        opened: images and videos that were decoded.
        sizes: (width, height) of its images in pixels.
        frames: of its videos.
        broken: what is wrong with its files.
        wrong: what is wrong with it otherwise; (kind, message).
        tokens: before the cut; words without a tokenizer.
        visual: of them, those of images and videos.
        learned: of them, those that are learned, after the cut.
        kept: tokens after the cut.
    """

    index: int
    opened: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    tokens: int | None = None
    visual: int = 0
    learned: int = 0
    kept: int = 0


class Looker:
    """Looks at single records.

    Args:
        records: of the run.
        dataset: of them; None: there is no tokenizer, and words are counted.
        decoded: records whose files are decoded; of others only headers are read. None: of all.
    """

    def __init__(
        self, records: Records, dataset: ConversationDataset | None, decoded: frozenset[int] | None
    ) -> None:
        self.records = records
        self.dataset = dataset
        self.decoded = decoded

    def __call__(self, index: int) -> Looked:
        """Looks at a record; whatever is wrong with it is in the result."""
        looked = Looked(index)
        if self.decoded is None or index in self.decoded:
            self._decode(looked)
        if looked.broken:
            return looked
        if self.dataset is None:
            looked.tokens = looked.kept = self.records.words(index)
        else:
            self._count(looked, self.dataset)
        return looked

    def crashed(self, index: int) -> Looked:
        """What there is to say about a record whose files end the process that decodes them."""
        record = self.records[index]
        names = ", ".join(str(file) for file in (*record.images, *record.videos))
        return Looked(index, broken=[f"{names}: the process that decoded it was killed"])

    def _decode(self, looked: Looked) -> None:
        record = self.records[looked.index]
        config = VideoConfig()
        if self.dataset is not None:
            config = self.dataset.processor.video_config
        for place, file in enumerate((*record.images, *record.videos)):
            looked.opened += 1
            try:
                if place < len(record.images):
                    looked.sizes.append(open_image(file).size)
                else:
                    looked.frames.append(len(read_video(file, config).frames))
            except UserError as error:
                looked.broken.append(str(error))
            except Exception as error:  # whatever a damaged file does to a decoder
                looked.broken.append(f"{file}: {type(error).__name__}: {error}")

    def _count(self, looked: Looked, dataset: ConversationDataset) -> None:
        config, where = dataset.config, f"{self.records.where(looked.index)}: "
        try:
            encoding = dataset.encoding(looked.index)
        except BrokenFileError as error:
            looked.broken.append(str(error).removeprefix(where))
            return
        except UserError as error:
            looked.wrong.append(("sample", str(error).removeprefix(where)))
            return
        looked.tokens = looked.kept = len(encoding.input_ids)
        looked.visual = sum(stop - start for start, stop in encoding.runs)
        if config.max_length is not None:
            try:
                encoding.cut(config.max_length, config.overlong)
            except UserError as error:
                looked.wrong.append(("overlong", str(error)))
        looked.kept = len(encoding.input_ids)
        looked.learned = sum(label != IGNORE_INDEX for label in encoding.labels[1:])


class _Worker:
    """A process that looks at the records it is told, one after another.

    Args:
        looker: looks.
        others: workers that are running already.
    """

    def __init__(self, looker: Looker, others: Sequence[_Worker]) -> None:
        ways = multiprocessing.get_all_start_methods()
        # A forked process has the records already; a new one reads them from a pipe.
        forked = "fork" in ways
        context: Any = multiprocessing.get_context("fork" if forked else "spawn")
        self.connection, other_end = context.Pipe()
        inherited = [worker.connection for worker in others] + [self.connection] if forked else []
        self.process = context.Process(
            target=_work, args=(looker, other_end, inherited), daemon=True
        )
        self.process.start()
        other_end.close()
        self.waiting: deque[int] = deque()

    def give(self, chunk: deque[int]) -> None:
        """Gives it records."""
        self.waiting = chunk
        with suppress(OSError):  # a process that is gone is found when its answer is read
            self.connection.send(list(chunk))

    def stop(self) -> None:
        """Ends it."""
        with suppress(OSError):
            self.connection.send(None)
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()
        self.process.join()


def _work(looker: Looker, connection: Connection, inherited: Sequence[Connection]) -> None:
    # Only then does a process learn that the one that asks is gone.
    for each in inherited:
        each.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while (chunk := connection.recv()) is not None:
            for index in chunk:
                connection.send(looker(index))


def look_at(looker: Looker, indices: Sequence[int], workers: int) -> Iterator[Looked]:
    """Looks at records, in any order.

    Args:
        looker: looks.
        indices: of the records.
        workers: processes; 0: this one.
    """
    if workers == 0:
        yield from map(looker, indices)
        return
    chunks = deque(deque(indices[start : start + CHUNK]) for start in range(0, len(indices), CHUNK))
    running: list[_Worker] = []
    try:
        while chunks or running:
            while chunks and len(running) < workers:
                running.append(_Worker(looker, running))
                running[-1].give(chunks.popleft())
            ready = wait([worker.connection for worker in running])
            for worker in [each for each in running if each.connection in ready]:
                yield _answer(looker, worker, running, chunks)
    finally:
        for worker in running:
            worker.process.kill()
            worker.stop()


def _answer(
    looker: Looker, worker: _Worker, running: list[_Worker], chunks: deque[deque[int]]
) -> Looked:
    """What a worker found; the next records for it, or its end."""
    index = worker.waiting.popleft()
    try:
        looked: Looked = worker.connection.recv()
    except (EOFError, OSError):
        # It was killed by what it was looking at; another process takes the others.
        looked = looker.crashed(index)
        if worker.waiting:
            chunks.appendleft(worker.waiting)
        running.remove(worker)
        worker.stop()
        return looked
    if not worker.waiting and chunks:
        worker.give(chunks.popleft())
    elif not worker.waiting:
        running.remove(worker)
        worker.stop()
    return looked
