"""What of a benchmark's data is here: every expected file, how many questions, which images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llava_uhd.errors import UserError
from llava_uhd.eval.provenance import file_digest
from llava_uhd.eval.task import Item, Task


@dataclass(frozen=True)
class FileState:
    """An expected file or folder.

    Attributes:
        path: of it.
        present: whether it is there.
        size: in bytes, of a file; number of entries, of a folder.
        digest: of a file, see `provenance.file_digest`; 16 digits.
    """

    path: str
    present: bool
    size: int = 0
    digest: str = ""


@dataclass(frozen=True)
class DataReport:
    """What was found of a task.

    Attributes:
        task: its name.
        title: of it.
        files: that it expects.
        questions: number of questions, None where they cannot be read.
        expected: number of questions of the published set, None where that is not known.
        media: number of different image and video files that the questions name.
        absent: those of them that are missing.
        problem: the first thing that is damaged, or an empty text.
        source: where the data come from.
    """

    task: str
    title: str
    files: list[FileState]
    questions: int | None
    expected: int | None
    media: int = 0
    absent: list[str] = field(default_factory=list)
    problem: str = ""
    source: str = ""

    @property
    def missing(self) -> list[str]:
        """Expected files that are not there."""
        return [file.path for file in self.files if not file.present]

    @property
    def complete(self) -> bool:
        """Whether a run can begin and every image is there."""
        return not (self.missing or self.absent or self.problem)

    @property
    def state(self) -> str:
        """What a reader has to know, in a few words."""
        if self.problem:
            return self.problem
        if self.missing:
            return "missing: " + ", ".join(self.missing)
        if self.absent:
            return f"{len(self.absent)} of {self.media} images are missing, first {self.absent[0]}"
        if self.expected is not None and self.questions != self.expected:
            return f"not the published set, which has {self.expected} questions"
        return "complete"


def check_data(task: Task, data_root: Path | None) -> DataReport:
    """Looks for everything that a task needs; no image is opened.

    Args:
        task: to look for.
        data_root: given by the user, or None for the usual place.
    """
    root = task.root(data_root)
    files = [file_state(Path(os.path.normpath(path))) for path in task.files(root)]
    items: list[Item] | None = None
    problem = ""
    # Image folders may be missing: the questions can be counted all the same.
    if all(file.present or not Path(file.path).suffix for file in files):
        try:
            items = task.read(root)
        except UserError as error:
            problem = str(error) if all(file.present for file in files) else ""
    media = sorted(set(_media(items or ())))
    return DataReport(
        task=task.name,
        title=task.title,
        files=files,
        questions=None if items is None else len(items),
        expected=task.published_size,
        media=len(media),
        absent=[str(path) for path in media if not path.exists()],
        problem=problem,
        source=task.source,
    )


def file_state(path: Path) -> FileState:
    """Size and digest of a file, or number of entries of a folder."""
    if path.is_dir():
        return FileState(str(path), True, sum(1 for _ in path.iterdir()))
    if not path.is_file():
        return FileState(str(path), False)
    return FileState(str(path), True, path.stat().st_size, file_digest(path)[:16])


def _media(items: list[Item] | tuple[()]) -> Iterator[Path]:
    for item in items:
        for source in (*item.images, *item.videos):
            if isinstance(source, str | os.PathLike):
                yield Path(source)
