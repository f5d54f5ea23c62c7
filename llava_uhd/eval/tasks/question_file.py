"""What the tasks of the published question files share: JSON lines, one image folder, prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import iterate_rows
from llava_uhd.eval.task import Item, Task

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


class QuestionFileTask(Task):
    """Questions from lines ``{"question_id", "image", "text", "category"}``.

    Attributes:
        questions: the file, below the task's folder.
        images: the folder that image names are relative to, below the task's folder.
    """

    questions: str
    images: str

    def files(self, root: Path) -> list[Path]:
        """Question file and image folder."""
        return [root / self.questions, root / self.images]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line, in the order of the file."""
        for row in iterate_rows(root / self.questions, "question_id", "image", "text"):
            yield self.item(root, row)

    def item(self, root: Path, row: dict[str, Any]) -> Item:
        """The item of a line."""
        image = image_path(root / self.images, row["image"], root / self.questions)
        return Item(row["question_id"], row["text"], (image,))


def image_path(folder: Path, name: Any, file: Path) -> Path:
    """Path of an image that a file names; whether it is there shows when it is read.

    Args:
        folder: of the images.
        name: relative to it.
        file: that names it, for messages.

    Raises:
        UserError: not a text, or it leads out of the folder.
    """
    plain = name.replace("\\", "/") if isinstance(name, str) else ""
    parts = plain.split("/")
    if not plain or plain.startswith("/") or ":" in parts[0] or ".." in parts or "\0" in plain:
        raise UserError(f"{file}: image name {name!r} is refused: it must stay inside {folder}")
    return folder / plain


def first_of(*files: Path) -> Path:
    """The first file that exists, or the first of all."""
    return next((file for file in files if file.exists()), files[0])


def numbered(key: str, seen: Counter[str]) -> str:
    """The key, with " #2", " #3", ... behind it when it comes again; ``seen`` counts along."""
    seen[key] += 1
    return key if seen[key] == 1 else f"{key} #{seen[key]}"
