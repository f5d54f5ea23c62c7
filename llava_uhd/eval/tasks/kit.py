"""What the benchmarks share that are known through VLMEvalKit: one table with images inside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import percent_of_each
from llava_uhd.eval.published import add_answer, iterate_rows, read_answers
from llava_uhd.eval.scoring.choice import choose, read_options
from llava_uhd.eval.tables import Row, images_of, read_table, whole_number
from llava_uhd.eval.task import DATA_ROOT, Item, Scored, Task
from llava_uhd.eval.tasks.question_file import LETTER
from llava_uhd.images.pixels import ImageSource

_FOLDER = "LMUData"  # environment variable, spelled as VLMEvalKit does
LETTER_ZH = "\n请直接回答选项字母。"
_CHINESE = re.compile("[一-鿿]")
_KIT_REQUEST = "Please select the correct answer from the options above. \n"

Style = Literal["llava", "kit"]


class KitTask(Task):
    """Rows of a table ``NAME.tsv``: index, question, image and answer, A, B, ... for options.

    The table is looked for in the task's folder, then in the folder that ``LMUData`` names
    (``~/LMUData`` where it is not set).

    Attributes:
        table: name of the table, without its ending.
        columns: that it must have.
        grouped_by: columns whose values are reported apart.
        style: form of the prompts: "llava" as LLaVA asks, "kit" as LLaVA-UHD v2 did through
            VLMEvalKit.
    """

    table: str
    columns: tuple[str, ...] = ("index", "question", "answer")
    grouped_by: tuple[str, ...] = ()
    style: Style = "llava"

    def root(self, data_root: Path | None) -> Path:
        """Folder with the table."""
        usual = (data_root or DATA_ROOT) / self.folder
        kit = Path(os.environ.get(_FOLDER) or "~/LMUData").expanduser()
        table = f"{self.table}.tsv"
        return kit if not (usual / table).is_file() and (kit / table).is_file() else usual

    def files(self, root: Path) -> list[Path]:
        """The table."""
        return [root / f"{self.table}.tsv"]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per row, with its images."""
        return self._items(self.files(root)[0], with_images=True)

    def gold_items(self, root: Path) -> Iterator[Item]:
        """The same without images."""
        return self._items(self.files(root)[0], with_images=False)

    def gold_for(self, root: Path, file: Path) -> list[Item]:
        """Where the table is missing, a table of predictions that holds the right answers too."""
        if self.missing(root, gold=True) and _is_table(file):
            head = read_table(file)[:1]
            if head and all(column in head[0] for column in self.columns):
                return list(self._items(file, with_images=False))
        return super().gold_for(root, file)

    def _items(self, file: Path, with_images: bool) -> Iterator[Item]:
        rows = read_table(file, *self.columns)
        by_index = {whole_number(row["index"]): row for row in rows}
        for number, row in enumerate(rows):
            if not self.belongs(row):
                continue
            try:
                images = images_of(row, by_index) if with_images else ()
                yield self.item(row, images)
            except UserError as error:
                raise UserError(f"{file}, row {number + 1}: {error}") from error

    def belongs(self, row: Row) -> bool:
        """Whether a row is part of the task."""
        return True

    def item(self, row: Row, images: tuple[ImageSource, ...]) -> Item:
        """The item of a row."""
        groups = {name: str(row[name]) for name in self.grouped_by if row.get(name) is not None}
        return Item(
            whole_number(row["index"]),
            self.question(row),
            images,
            self.reference(row),
            groups=groups,
            extra={"options": read_options(row)},
        )

    def question(self, row: Row) -> str:
        """What is asked: the question as it stands."""
        return str(row["question"])

    def reference(self, row: Row) -> Any:
        """What the scorer compares with.

        Raises:
            UserError: nothing.
        """
        if row["answer"] is None:
            raise UserError("has no answer")
        return str(row["answer"])

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """A table with the columns index and prediction, or an answers file."""
        if not _is_table(file):
            return read_answers(file)
        answers: dict[str | int, str] = {}
        for row in read_table(file, "index", "prediction"):
            if self.belongs(row):
                text = "" if row["prediction"] is None else str(row["prediction"])
                add_answer(answers, whole_number(row["index"]), text, file)
        return answers

    def parse(self, item: Item, answer: str) -> str:
        """The text as it is."""
        return answer

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Means in percent."""
        return percent_of_each([each.metrics for each in scored])


def _is_table(file: Path) -> bool:
    if file.suffix.lower() not in (".json", ".jsonl"):
        return True
    return "prediction" in next(iterate_rows(file), {})


class ChoiceTask(KitTask):
    """Questions with options, read by exact matching: no judge, what cannot be read is wrong."""

    main_metric = "accuracy"

    def question(self, row: Row) -> str:
        """Hint, question and options, and the request for a letter."""
        return choice_prompt(row, read_options(row), self.style)

    def parse(self, item: Item, answer: str) -> str:
        """The chosen letter, "Z" for a refusal, or an empty text."""
        return choose(answer, item.extra["options"]) or ""

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether the letter is right."""
        return {"accuracy": float(parsed == item.reference)}


def choice_prompt(row: Row, options: dict[str, str], style: Style) -> str:
    """A question with options as one text.

    Args:
        row: with ``question`` and perhaps ``hint``.
        options: letter -> text.
        style: see `KitTask`.
    """
    question, hint = str(row["question"]), row.get("hint")
    listed = [f"{letter}. {text}" for letter, text in options.items()]
    if style == "kit":
        text = (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\n"
        if listed:
            text += "\n".join(["Options:", *listed]) + "\n" + _KIT_REQUEST
    else:
        text = "\n".join([*([str(hint)] if hint else []), question, *listed])
    return text + (LETTER_ZH if _CHINESE.search(text) else LETTER)
