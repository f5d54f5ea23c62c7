"""What a benchmark is: questions, prompt, score. One file per benchmark under ``tasks/``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import grouped, mean_of_each
from llava_uhd.images.pixels import ImageSource
from llava_uhd.registry import Registry
from llava_uhd.text.templates import IMAGE_MARKER, Turn

DATA_ROOT = Path("playground/data/eval")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in the task; its type is kept, because joins go by equality.
        question: what is asked now, without image markers unless they stand inside the text.
        images: paths, encoded bytes or PIL images, in reading order.
        reference: whatever the scorer compares with.
        history: earlier turns of the conversation, with their own image markers.
        groups: group -> value, for breakdowns; for instance ``{"size": "256x128"}``.
    """

    id: str | int
    question: str
    images: tuple[ImageSource, ...] = ()
    reference: Any = None
    history: tuple[Turn, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """An answered and scored question.

    Attributes:
        item: the question.
        answer: generated text.
        parsed: what the scorer read out of it.
        metrics: metric -> value of this item.
    """

    item: Item
    answer: str
    parsed: str
    metrics: Mapping[str, float]


class Task(ABC):
    """A benchmark.

    Attributes:
        name: registered name.
        title: shown in tables.
        folder: of the data, below the data root.
        source: where the data come from; shown when they are missing.
        main_metric: the metric that stands for the task in tables.
        max_new_tokens: most tokens of an answer.
        beams: of beam search; 1 is greedy.
        version: raised whenever prompts or scores change, so that old answers are not mixed in.
    """

    name: str
    title: str
    folder: str
    source: str
    main_metric: str
    max_new_tokens: int = 128
    beams: int = 1
    version: int = 1

    def root(self, data_root: Path | None) -> Path:
        """Folder of this task's data.

        Args:
            data_root: given by the user, or None for the usual place.
        """
        return (data_root or DATA_ROOT) / self.folder

    @abstractmethod
    def files(self, root: Path) -> list[Path]:
        """Files that must be there, under the task's folder ``root``."""

    @abstractmethod
    def items(self, root: Path) -> Iterable[Item]:
        """Questions in the order of the published file.

        Raises:
            UserError: a damaged file.
        """

    @abstractmethod
    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Metrics of one answer as `parse` read it."""

    def parse(self, item: Item, answer: str) -> str:
        """What counts of a generated text."""
        return answer.strip()

    def turns(self, item: Item) -> list[Turn]:
        """The conversation that is sent: history, then the images in front of the question."""
        earlier = sum(turn.text.count(IMAGE_MARKER) for turn in item.history)
        markers = len(item.images) - earlier - item.question.count(IMAGE_MARKER)
        return [*item.history, Turn("human", f"{IMAGE_MARKER}\n" * markers + item.question)]

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Scores of the task; the mean of each metric unless a benchmark says otherwise."""
        return mean_of_each([each.metrics for each in scored])

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """Group -> value -> scores and number of items."""
        names = dict.fromkeys(name for each in scored for name in each.item.groups)
        tables: dict[str, dict[str, dict[str, float]]] = {}
        for name in names:
            parts = grouped(scored, lambda each, name=name: each.item.groups.get(name))  # type: ignore[misc]
            tables[name] = {
                value: {**self.aggregate(rows), "items": len(rows)} for value, rows in parts.items()
            }
        return tables

    def missing(self, root: Path) -> str | None:
        """None if the data are there, else one line: which file, and where to get it."""
        absent = [file for file in self.files(root) if not file.exists()]
        if not absent:
            return None
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return f"{self.name}: {absent[0]}{more} is missing; {self.source}"

    def load(self, root: Path, limit: int | None = None) -> list[Item]:
        """All items (the first ``limit`` of them), checked.

        Raises:
            UserError: missing data, no items, or an id that occurs twice.
        """
        message = self.missing(root)
        if message:
            raise UserError(message)
        items = list(self.items(root))
        if not items:
            raise UserError(f"{self.name}: {root} holds no questions")
        seen: set[str | int] = set()
        for item in items:
            if item.id in seen:
                raise UserError(f"{self.name}: id {item.id!r} occurs twice under {root}")
            seen.add(item.id)
        return items[:limit]


TASKS: Registry[Task] = Registry("task")
