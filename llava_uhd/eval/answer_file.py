"""``answer``: any question file in the published layout, without a benchmark around it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_uhd.errors import UserError, make_folder
from llava_uhd.eval.answers import read_answers
from llava_uhd.eval.generate import Answerer
from llava_uhd.eval.layout import PUBLISHED_FILE, write_published
from llava_uhd.eval.provenance import data_digest
from llava_uhd.eval.published import iterate_rows
from llava_uhd.eval.ranks import Ranks
from llava_uhd.eval.runner import Job, make_limits, prepare, run_job
from llava_uhd.eval.subject import add_model_options, load_subject
from llava_uhd.eval.task import Item, Scored, Task
from llava_uhd.eval.tasks.question_file import image_path, numbered

WORK = ".work"
"""Behind the name of the answers file: the folder that a killed run goes on from."""


class Questions(Task):
    """The questions of a file, which nobody scores.

    Args:
        file: lines ``{"question_id", "text"}``, with ``image`` (a name, or a list of them) where
            there is one.
        folder: that image names are relative to, or None where no question has an image.
    """

    name = "questions"
    title = "Questions of a file"
    folder = "."
    source = "name it with --question-file"
    main_metric = "answered"
    max_new_tokens = 1024
    local = False

    def __init__(self, file: Path, folder: Path | None) -> None:
        self.file = file
        self.images = folder

    def files(self, root: Path) -> list[Path]:
        """Questions, and images where a folder is named."""
        return [self.file] if self.images is None else [self.file, self.images]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line; where an id comes again, " #2" is put behind it for the log."""
        seen: Counter[str] = Counter()
        for index, row in enumerate(iterate_rows(self.file, "question_id", "text")):
            key, text = row["question_id"], row["text"]
            if isinstance(key, bool) or not isinstance(key, str | int) or not isinstance(text, str):
                raise UserError(
                    f"{self.file}, record {index}: question_id must be a text or a whole number, "
                    "and text a text"
                )
            unique = numbered(str(key), seen)
            yield Item(
                key if unique == str(key) else unique,
                text,
                tuple(self._image(name, index) for name in _names(row.get("image"))),
                published_id=key,
            )

    def _image(self, name: Any, index: int) -> Path:
        if self.images is None:
            raise UserError(
                f"{self.file}, record {index}: has an image ({name!r}): name their folder with "
                "--image-folder"
            )
        return image_path(self.images, name, self.file)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Nothing."""
        return {}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Nothing."""
        return {}


def _names(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def add_answer_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``answer``; names with "_" are those of the published programs."""
    answer = commands.add_parser("answer", help="answer any question file in the published layout")
    add_model_options(answer)
    answer.add_argument("--question-file", type=Path, required=True, help="JSON lines")
    answer.add_argument("--image-folder", type=Path, help="that image names are relative to")
    answer.add_argument("--answers-file", type=Path, required=True, help="JSON lines to write")
    answer.add_argument("--limit", type=int, help="only the first N questions")
    answer.add_argument("--batch-size", type=int, default=8)
    answer.add_argument("--beams", "--num_beams", type=int, help="default: 1")
    answer.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help="default: 1024")
    answer.add_argument("--overwrite", action="store_true", help="throw earlier answers away")


def answer_command(options: argparse.Namespace) -> int:
    """``answer``; 1 if a question got no answer.

    Raises:
        UserError: missing or damaged files, or answers made with other settings.
    """
    ranks = Ranks.from_environment()
    console = Console(stderr=True, quiet=ranks.rank > 0)
    file: Path = options.answers_file
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    if file.is_dir():
        raise UserError(f"--answers-file {file} is a folder: name a file")
    task = Questions(options.question_file, options.image_folder)
    items = task.load(file.parent)
    limits = make_limits(task, options.beams, options.max_new_tokens, options.batch_size)
    make_folder(file.parent, "folder of the answers file")
    subject = load_subject(options, ranks, console)
    settings = {
        **subject.settings,
        **{f"image.{k}": v for k, v in vars(subject.processor.image_config).items()},
        "task": task.name,
        "questions": data_digest(task, items),
        "beams": limits.beams,
        "max_new_tokens": limits.max_new_tokens,
    }
    folder = file.with_name(file.name + WORK)
    job = Job(task, items, options.limit, folder, file.parent.absolute(), settings, subject.facts)
    ranks.connect()
    try:
        prepare([job], ranks, options.overwrite)
        answerer = Answerer(subject.model, subject.processor, task, limits)
        _, failures = run_job(job, answerer, ranks, console)
        if ranks.rank == 0:
            _write(job, file)
        ranks.wait()
    finally:
        ranks.disconnect()
    for each in failures[:20]:
        console.print(f"failed: {each.id!r}: {each.reason}", markup=False, soft_wrap=True)
    if ranks.rank == 0:
        done = len(job.wanted) - len(failures)
        text = f"{file}: {done} of {len(items)} questions answered"
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return int(bool(failures))


def _write(job: Job, file: Path) -> None:
    """Puts the answers that there are into the file, in the order of the questions."""
    answers = {key: each.text for key, each in read_answers(job.folder, job.settings).items()}
    model = Path(str(job.provenance["checkpoint"])).name
    write_published(job.folder, job.task, job.wanted, answers, model)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes((job.folder / PUBLISHED_FILE).read_bytes())
    partial.replace(file)
