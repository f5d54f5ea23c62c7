"""What a benchmark is: questions, prompt, score. One file per benchmark under ``tasks/``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_uhd.errors import UserError
from llava_uhd.eval import published
from llava_uhd.eval.metrics import grouped, mean_of_each
from llava_uhd.images.pixels import ImageSource
from llava_uhd.images.video import VideoSource
from llava_uhd.registry import Registry
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER, Turn

DATA_ROOT = Path("playground/data/eval")

Mode = Literal["default", "published"]
Answers = Mapping[str | int, str]


class Parsed(str):
    """An answer that a published converter has parsed before: it is scored as it stands."""


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
        published_id: the published id where it is not unique, and ``id`` is made of more.
        extra: what else the published layouts or the scorer need.
        videos: files or folders of frames, in reading order.
    """

    id: str | int
    question: str
    images: tuple[ImageSource, ...] = ()
    reference: Any = None
    history: tuple[Turn, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    published_id: str | int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[VideoSource, ...] = ()

    @property
    def question_id(self) -> str | int:
        """The id that published files use."""
        return self.id if self.published_id is None else self.published_id


@dataclass(frozen=True)
class Scored:
    """An answered and scored question.

    Attributes:
        item: the question.
        answer: generated text.
        parsed: what the scorer read out of it.
        metrics: metric -> value of this item.
        answered: False where the answer is missing and counts as wrong.
    """

    item: Item
    answer: str
    parsed: str
    metrics: Mapping[str, float]
    answered: bool = True


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
        local: False where only a server, a judge or a person can score the answers.
        unanswered: what `published_answers` makes of a question without an answer: an error, a
            wrong answer (scored as `missing_text`), or a question that does not count.
        missing_text: stands for an answer that is not there.
        scored_by: name of the task that scores answers locally, for instance on another split.
        published_size: number of questions of the published set, None where that is not known.
        part_of: name of a task that asks the same; where that one is there, a run that names no
            tasks leaves this one out.
        scale: published numbers are the main metric times this.
        in_answer_order: answers of a file are scored in its order also where the mode is not
            "published".
        mode: "published" follows every oddity of the published scorer; see the documentation.
    """

    name: str
    title: str
    folder: str
    source: str
    main_metric: str
    max_new_tokens: int = 128
    beams: int = 1
    version: int = 1
    local: bool = True
    unanswered: Literal["error", "wrong", "skip"] = "error"
    missing_text: str = ""
    scored_by: str | None = None
    published_size: int | None = None
    part_of: str | None = None
    scale: float = 1.0
    in_answer_order: bool = False
    mode: Mode = "default"

    def in_mode(self, mode: Mode) -> Task:
        """A copy of the task that scores in another mode."""
        other = copy.copy(self)
        other.mode = mode
        return other

    def root(self, data_root: Path | None) -> Path:
        """Folder of this task's data.

        Args:
            data_root: given by the user, or None for the usual place.
        """
        return (data_root or DATA_ROOT) / self.folder

    def provide(self, root: Path) -> None:
        """Makes data that need no download; called where the task is named, before it is read."""
        return

    def with_settings(self, settings: Mapping[str, Any]) -> Task:
        """The task that scores answers made with these settings of a run; mostly itself."""
        return self

    def pictures(self, scored: Sequence[Scored]) -> list[tuple[str, bytes]]:
        """PNG files for the folder of the results: (file name, content); mostly none."""
        return []

    @abstractmethod
    def files(self, root: Path) -> list[Path]:
        """Files and image folders that must be there, under the task's folder ``root``."""

    def gold_files(self, root: Path) -> list[Path]:
        """What scoring needs of `files`: all that is no folder of images."""
        return [file for file in self.files(root) if file.suffix]

    @abstractmethod
    def items(self, root: Path) -> Iterable[Item]:
        """Questions in the order of the published file.

        Raises:
            UserError: a damaged file.
        """

    def unit(self, item: Item) -> str | int:
        """What stands or falls together with other items: a question with several copies."""
        return item.id

    @abstractmethod
    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Metrics of one answer as `parse` read it."""

    def parse(self, item: Item, answer: str) -> str:
        """What counts of a generated text."""
        return answer.strip()

    def turns(self, item: Item) -> list[Turn]:
        """The conversation that is sent: history, then the images in front of the question."""
        text = item.question
        for marker, given in ((VIDEO_MARKER, item.videos), (IMAGE_MARKER, item.images)):
            earlier = sum(turn.text.count(marker) for turn in item.history)
            text = f"{marker}\n" * (len(given) - earlier - item.question.count(marker)) + text
        return [*item.history, Turn("human", text)]

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

    def gold_items(self, root: Path) -> Iterable[Item]:
        """Questions that can be scored, without images; overridden where questions to answer and
        questions to score are listed in different files.
        """
        return self.items(root)

    def gold_for(self, root: Path, file: Path) -> list[Item]:
        """Items that a file of answers is scored with; overridden where such a file may hold the
        right answers itself.

        Args:
            root: folder of the task's data.
            file: as for `read_published`.
        """
        return self.load(root, gold=True)

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Answers that another program wrote: item id -> text, in the order of the file.

        Args:
            root: folder of the task's data.
            file: in the published layout; JSONL with ``question_id``, ``text`` and ``prompt``
                unless a benchmark's published scorer reads something else.

        Raises:
            UserError: a damaged file, or an id that occurs twice.
        """
        return published.read_answers(file)

    def published_row(self, item: Item, answer: str, model: str) -> dict[str, Any]:
        """The line of the published answers layout.

        Args:
            item: the question.
            answer: generated text.
            model: name of the model.
        """
        return published.answer_row(item.question_id, item.question, answer, model)

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """Files to upload, or that published scorers read: (file name, content); mostly none.

        Args:
            root: folder of the task's data.
            items: all of the task.
            answers: by item id; some may be missing.

        Raises:
            UserError: what the server would refuse.
        """
        return []

    def check_submission(self, root: Path, file: Path) -> None:
        """Looks whether a file has the format that `submission` writes.

        Args:
            root: folder of the task's data.
            file: to be uploaded.

        Raises:
            UserError: the first thing that the server would refuse.
        """
        raise UserError(f"{self.name} has no file to upload")

    def missing(self, root: Path, gold: bool = False) -> str | None:
        """None if the data are there, else one line: which file, and where to get it.

        Args:
            root: folder of the task's data.
            gold: ask only for what scoring needs.
        """
        files = self.gold_files(root) if gold else self.files(root)
        absent = [file for file in files if not file.exists()]
        if not absent:
            return None
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        return f"{self.name}: {absent[0]}{more} is missing; {self.source}"

    def read(self, root: Path, gold: bool = False) -> list[Item]:
        """All items, whatever is wrong with the files told in one line.

        Raises:
            UserError: a damaged file.
        """
        with published.well_formed(f"{self.name}: a file under {root}"):
            return list(self.gold_items(root) if gold else self.items(root))

    def load(self, root: Path, limit: int | None = None, gold: bool = False) -> list[Item]:
        """All items (the first ``limit`` of them), checked.

        Args:
            root: folder of the task's data.
            limit: so many, or None for all.
            gold: for scoring only: no images are asked for.

        Raises:
            UserError: missing data, no items, or an id that occurs twice.
        """
        message = self.missing(root, gold)
        if message:
            raise UserError(message)
        items = self.read(root, gold)
        if not items:
            raise UserError(f"{self.name}: {root} holds no questions")
        seen: set[str | int] = set()
        for item in items:
            if isinstance(item.id, bool) or not isinstance(item.id, str | int):
                raise UserError(
                    f"{self.name}: id {item.id!r} under {root} must be a text or a whole number"
                )
            if not isinstance(item.question, str):
                raise UserError(
                    f"{self.name}: question {item.id!r} under {root} must be a text, got "
                    f"{type(item.question).__name__}"
                )
            if item.id in seen:
                raise UserError(f"{self.name}: id {item.id!r} occurs twice under {root}")
            seen.add(item.id)
        return items[:limit]


TASKS: Registry[Task] = Registry("task")
