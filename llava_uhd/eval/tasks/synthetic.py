"""The embedded benchmark: read a small sign, name a large mark, in pictures drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_uhd.data.files import ImageRoot, iterate_json
from llava_uhd.errors import UserError
from llava_uhd.eval.generate import image_size
from llava_uhd.eval.metrics import exact_match, place_accuracy
from llava_uhd.eval.task import Item, Task

QUICKSTART_ROOT = Path("playground/data/quickstart")


class Synthetic(Task):
    """Questions of `llava_uhd.data.synthetic`.

    Signs need native resolution, marks do not: ``sign_exact`` and ``digit_accuracy`` are over the
    questions about signs, ``mark_exact`` over the others.
    """

    name = "synthetic"
    title = "Embedded signs and marks"
    folder = "synthetic"
    source = f"draw it with 'python -m llava_uhd.data.synthetic --out {QUICKSTART_ROOT}'"
    main_metric = "sign_exact"
    max_new_tokens = 16

    def root(self, data_root: Path | None) -> Path:
        """The quickstart's data; a data root may also be the folder of the data itself."""
        if data_root is None:
            return QUICKSTART_ROOT
        return data_root if (data_root / "eval.jsonl").is_file() else data_root / self.folder

    def files(self, root: Path) -> list[Path]:
        """Question file and pictures."""
        return [root / "eval.jsonl", root / "images"]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of ``eval.jsonl``."""
        file, images = root / "eval.jsonl", ImageRoot(root / "images")
        for index, row in iterate_json(file):
            try:
                yield self._item(row, images)
            except KeyError as error:
                raise UserError(f"{file}, record {index}: has no field {error}") from None
            except UserError as error:
                raise UserError(f"{file}, record {index}: {error}") from error

    def _item(self, row: Any, images: ImageRoot) -> Item:
        if not isinstance(row, dict):
            raise UserError(f"must be an object, got {type(row).__name__}")
        answer = str(row["answer"])
        if not answer:
            raise UserError("has an empty answer")
        images.check(str(row["image"]))
        path = images.path / str(row["image"])
        groups = {"question": str(row["category"])}
        size = image_size(path)
        if size is not None:
            groups["size"] = f"{size[0]}x{size[1]}"
        if row["category"] == "sign" and "sign_cut" in row:
            groups["sign and slice borders"] = str(row["sign_cut"])
        return Item(row["question_id"], str(row["text"]), (path,), answer, groups=groups)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Exact match, and for signs the share of digits in their place."""
        right = exact_match(parsed, item.reference)
        if item.groups["question"] == "sign":
            return {"sign_exact": right, "digit_accuracy": place_accuracy(parsed, item.reference)}
        return {"mark_exact": right}
