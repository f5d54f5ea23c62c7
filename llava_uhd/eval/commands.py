"""Commands of the evaluation that need no model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_uhd.errors import UserError, make_folder
from llava_uhd.eval.answers import write_json
from llava_uhd.eval.check_data import DataReport, check_data
from llava_uhd.eval.offline import score_file
from llava_uhd.eval.published import well_formed
from llava_uhd.eval.task import DATA_ROOT
from llava_uhd.eval.tasks import TASKS, find_task


def add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``check-data``, ``submission`` and ``check-submission``."""
    data = commands.add_parser("check-data", help="every expected file: present or missing")
    data.add_argument("--tasks", help="comma-separated; default: all")
    data.add_argument("--data-root", type=Path, help=f"default: {DATA_ROOT}")
    data.add_argument("--output", type=Path, help="JSON file to write, with sizes and digests")
    made = commands.add_parser("submission", help="files to upload from an answers file")
    made.add_argument("--task", required=True)
    made.add_argument("--answers", type=Path, required=True, help="in the published layout")
    made.add_argument("--output", type=Path, required=True, help="folder to write into")
    made.add_argument("--data-root", type=Path, help=f"default: {DATA_ROOT}")
    upload = commands.add_parser("check-submission", help="would a server take this file?")
    upload.add_argument("file", type=Path)
    upload.add_argument("--task", required=True)
    upload.add_argument("--data-root", type=Path, help=f"default: {DATA_ROOT}")


def check_data_command(options: argparse.Namespace) -> int:
    """``check-data``; 1 if data are damaged, or a task that was named is not complete."""
    names = [name for name in (options.tasks or "").split(",") if name.strip()]
    tasks = [find_task(name) for name in names] or [TASKS.get(name) for name in TASKS.names()]
    reports = [check_data(task, options.data_root) for task in dict.fromkeys(tasks)]
    console = Console()
    for report in reports:
        text = "\n".join(_lines(report))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    complete = sum(report.complete for report in reports)
    console.print(f"{complete} of {len(reports)} tasks can be run", highlight=False)
    if options.output is not None:
        _write(
            options.output,
            [
                {**dataclasses.asdict(report), "complete": report.complete, "state": report.state}
                for report in reports
            ],
        )
    return int(any(r.problem or (names and not r.complete) for r in reports))


def _write(file: Path, value: Any) -> None:
    if file.is_dir():
        raise UserError(f"--output {file} is a folder: name a file")
    make_folder(file.parent, "output folder")
    write_json(file, value)


def _lines(report: DataReport) -> list[str]:
    """A head, a line for each file, and what is to be done."""
    counts = []
    if report.questions is not None:
        of = "" if report.expected is None else f" of {report.expected}"
        counts.append(f"{report.questions}{of} questions")
    if report.media:
        counts.append(f"{report.media - len(report.absent)} of {report.media} images")
    lines = [": ".join([f"{report.task} ({report.title})", *[", ".join(counts)][: len(counts)]])]
    for file in report.files:
        about = "MISSING"
        if file.present:
            about = f"{file.size} bytes, {file.digest}" if file.digest else f"{file.size} entries"
        lines.append(f"    {file.path}: {about}")
    if not report.missing and report.state != "complete":
        lines.append(f"    {report.state}")
    if not report.complete:
        lines.append(f"    {report.source}")
    return lines


def submission_command(options: argparse.Namespace) -> int:
    """``submission``: what the published converters write, made from an answers file.

    Raises:
        UserError: missing data, damaged answers, or a file that the server would refuse.
    """
    task = find_task(options.task)
    root = task.root(options.data_root)
    message = task.missing(root, gold=True)
    if message:
        raise UserError(message)
    with well_formed(str(options.answers)):
        answers = task.read_published(root, options.answers)
    files = task.submission(root, task.read(root), answers)
    if not files:
        raise UserError(f"{task.name} has no file to upload")
    make_folder(options.output, "output folder")
    for name, content in files:
        file = options.output / name
        file.write_bytes(content)
        task.check_submission(root, file)
        Console().print(f"{file}", markup=False, highlight=False, soft_wrap=True)
    return 0


def check_submission_command(options: argparse.Namespace) -> int:
    """``check-submission``.

    Raises:
        UserError: what the server would refuse.
    """
    task = find_task(options.task)
    if not options.file.is_file():
        raise UserError(f"{options.file} does not exist")
    root = task.root(options.data_root)
    message = task.missing(root, gold=True)
    if message:
        raise UserError(message)
    task.check_submission(root, options.file)
    Console().print(f"{options.file}: a sound submission of {task.title}", soft_wrap=True)
    return 0


def score_published(options: argparse.Namespace) -> int:
    """``score --task``: an answers file in the published layout."""
    if options.results is not None or options.answers is None:
        raise UserError("score --task TASK needs --answers FILE, and no results folder")
    task = find_task(options.task)
    result = score_file(
        task, options.data_root, options.answers, "published" if options.compatible else "default"
    )
    if options.output is not None:
        _write(options.output, result)
    table = Table("metric", "score")
    for name, value in result["scores"].items():
        table.add_row(escape(name), f"{value:.6g}")
    console = Console()
    console.print(table)
    scored_as = TASKS.get(result["scored_as"])
    count = f"{len(result['items'])} items of {scored_as.title}"
    count += f", {len(result['missing'])} without an answer" if result["missing"] else ""
    console.print(count, markup=False, highlight=False, soft_wrap=True)
    return 0
