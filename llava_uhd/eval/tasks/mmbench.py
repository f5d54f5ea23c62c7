"""MMBench and MMBench-CN, development splits: the upload table, and exact matching here."""

from __future__ import annotations

import logging
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import mean
from llava_uhd.eval.published import answer_id
from llava_uhd.eval.scoring.choice import NOTHING, choose
from llava_uhd.eval.tables import Row, read_table, whole_number
from llava_uhd.eval.task import DATA_ROOT, Answers, Item, Scored
from llava_uhd.eval.tasks.kit import LETTER_ZH, ChoiceTask
from llava_uhd.eval.tasks.question_file import LETTER
from llava_uhd.eval.workbook import workbook
from llava_uhd.images.pixels import ImageSource

logger = logging.getLogger(__name__)

_COPY = 1_000_000  # what is added to the index of a question's next copy with turned options
_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
_PLACE = 6  # of the column with predictions
_LETTERS = "ABCD"
# Cells that pandas, with which the published programs read tables, takes for empty.
_EMPTY = frozenset(
    "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,"
    "null".split(",")
)


class MMBench(ChoiceTask):
    """Each question stands there several times with its options turned; all copies must be right.

    ``accuracy`` is the share of such questions in percent. ``circular_accuracy`` is the same as a
    share and ``vanilla_first_round_accuracy`` that of right first copies, as VLMEvalKit has them.
    """

    name = "mmbench"
    title = "MMBench dev"
    folder = "mmbench"
    source = "get mmbench_dev_20230712.tsv from the MMBench repository of OpenCompass"
    table = "mmbench_dev_20230712"
    columns = ("index", "question", "A", "B", "answer")
    request = LETTER
    published_size: int | None = 4_377
    max_new_tokens = 1024
    unanswered = "wrong"
    missing_text = "nan"  # what the published scorer makes of an empty cell

    def items(self, root: Path) -> Iterator[Item]:
        """One item per row, in the order of the table."""
        cut = 0
        for item in super().items(root):
            cut += item.extra["cut"]
            yield item
        if cut:
            logger.warning(
                "%s: in %d questions an option such as 'None' ends the list of options, as in the "
                "published program",
                self.name,
                cut,
            )

    def item(self, row: Row, images: tuple[ImageSource, ...]) -> Item:
        """The item of a row."""
        if not isinstance(whole_number(row["index"]), int):
            raise UserError(f"index {row['index']!r} must be a whole number")
        listed = _listed(row)
        named = ("l2-category", "category", "split")
        groups = {name: str(row[name]) for name in named if not is_empty(row.get(name))}
        filled = [letter for letter in _LETTERS if row.get(letter) is not None]
        return Item(
            whole_number(row["index"]),
            "\n".join([_logged(row, listed), self.request.lstrip("\n")]),
            images,
            self.reference(row),
            groups=groups,
            extra={
                "options": {
                    letter: str(row[letter])
                    for letter in string.ascii_uppercase
                    if not is_empty(row.get(letter))
                },
                "listed": listed,
                "logged": _logged(row, listed),
                "cut": len(filled) > len(listed),
            },
        )

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """An answers file, or the table of predictions, whose empty cells are no answers."""
        answers = super().read_published(root, file)
        if file.suffix.lower() in (".xlsx", ".tsv", ".csv"):
            return {key: text for key, text in answers.items() if text}
        return answers

    def published_row(self, item: Item, answer: str, model: str) -> dict[str, Any]:
        """With the round and the options; the prompt is logged without the request for a letter."""
        prompt, options = item.extra["logged"], list(item.extra["listed"])
        return {
            "question_id": item.id,
            "round_id": 0,
            "prompt": prompt,
            "text": answer,
            "options": options,
            "option_char": list(_LETTERS[: len(options)]),
            "answer_id": answer_id(model, item.id, prompt),
            "model_id": model,
            "metadata": {},
        }

    def parse(self, item: Item, answer: str) -> str:
        """The chosen letter, or "Z"."""
        return choose(answer, item.extra["options"]) or NOTHING

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether this copy is right."""
        return {"copy": float(parsed == item.reference)}

    def unit(self, item: Item) -> int:
        """The question, which has copies."""
        return int(item.id) % _COPY

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Questions all of whose copies are right, and first copies that are."""
        if not scored:
            return {}
        groups: dict[int, list[float]] = {}
        for each in scored:
            groups.setdefault(int(each.item.id) % _COPY, []).append(each.metrics["copy"])
        circular = mean(min(copies) for copies in groups.values())
        scores = {"accuracy": 100 * circular, "circular_accuracy": circular}
        first = [each.metrics["copy"] for each in scored if int(each.item.id) < _COPY]
        if first:
            scores["vanilla_first_round_accuracy"] = mean(first)
        return scores

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """The table for the server: without images, with predictions."""
        rows = read_table(self.files(root)[0], *self.columns)
        columns = [name for name in rows[0] if name not in _LEFT_OUT]
        columns.insert(_PLACE, "prediction")
        cells = []
        for row in rows:
            key = whole_number(row["index"])
            filled = {name: None if is_empty(row[name]) else row[name] for name in row}
            filled |= {"index": key, "prediction": answers.get(key)}
            cells.append([filled[name] for name in columns])
        return [(f"{self.table}.xlsx", workbook(columns, cells))]

    def check_submission(self, root: Path, file: Path) -> None:
        """The columns in their order, the rows of the table, a prediction in each."""
        rows = read_table(self.files(root)[0], *self.columns)
        columns = [name for name in rows[0] if name not in _LEFT_OUT]
        columns.insert(_PLACE, "prediction")
        found = read_table(file, "index", "prediction")
        if list(found[0]) != columns:
            raise UserError(f"{file}: its columns must be {', '.join(columns)}")
        if [whole_number(row["index"]) for row in found] != [
            whole_number(row["index"]) for row in rows
        ]:
            raise UserError(f"{file}: its rows are not those of {self.table}.tsv in the same order")
        empty = [row["index"] for row in found if row["prediction"] in (None, "")]
        if empty:
            raise UserError(f"{file}: {len(empty)} rows have no prediction (first: {empty[0]})")


class MMBenchCN(MMBench):
    """Lies in ``mmbench_cn/`` by the published script, in ``mmbench/`` by its guide."""

    name = "mmbench_cn"
    title = "MMBench-CN dev"
    folder = "mmbench_cn"
    source = "get mmbench_dev_cn_20231003.tsv from the MMBench repository of OpenCompass"
    table = "mmbench_dev_cn_20231003"
    request = LETTER_ZH
    published_size = None

    def root(self, data_root: Path | None) -> Path:
        """The first of the folders that has the table."""
        other = (data_root or DATA_ROOT) / MMBench.folder
        found = super().root(data_root)
        table = f"{self.table}.tsv"
        return other if not (found / table).is_file() and (other / table).is_file() else found


def is_empty(value: Any) -> bool:
    """Whether the published program takes a cell for empty; "None" and "nan" in any case, too."""
    text = str(value)
    return value in (None, "") or text in _EMPTY or text.lower() in ("nan", "none")


def _listed(row: Row) -> list[str]:
    """Options of a prompt: up to the first empty one."""
    options = []
    for letter in _LETTERS:
        if is_empty(row.get(letter)):
            break
        options.append(str(row[letter]))
    return options


def _logged(row: Row, options: Sequence[str]) -> str:
    """The prompt without its last line."""
    hint = [] if is_empty(row.get("hint")) else [str(row["hint"])]
    lettered = [f"{letter}. {text}" for letter, text in zip(_LETTERS, options)]
    return "\n".join([*hint, str(row["question"]), *lettered])
