"""Evaluation.

::

    python -m llava_uhd.eval run CHECKPOINT [--tasks A,B]    answers and scores
    python -m llava_uhd.eval score RESULTS_DIR               scores saved answers again
    python -m llava_uhd.eval score --task TASK --data-root DIR --answers FILE --output OUT.json
                                                             scores a published answers file
    python -m llava_uhd.eval compare DIR1 DIR2 ...           side by side, with significance
    python -m llava_uhd.eval report RESULTS_DIR              tables and report.html again
    python -m llava_uhd.eval answer CHECKPOINT --question-file Q.jsonl --image-folder DIR
        --answers-file A.jsonl                               any questions in the published layout
    python -m llava_uhd.eval list                            tasks, and where their data come from
    python -m llava_uhd.eval check-data                      every expected file: here or missing
    python -m llava_uhd.eval submission --task TASK --answers FILE --output DIR
                                                             files to upload
    python -m llava_uhd.eval check-submission --task TASK FILE    would a server take this file?
    python -m llava_uhd.eval judge RESULTS_DIR --base-url URL --model NAME
                                                             scores by a chat model
    python -m llava_uhd.eval judge --question F --context F --answer-list REF OURS --rule F
        --output REVIEW                                      the published review
    python -m llava_uhd.eval judge summarize REVIEW          its summary
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from llava_uhd.checkpoint.compression import read_options
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.errors import UserError, command
from llava_uhd.eval.answer_file import add_answer_command, answer_command
from llava_uhd.eval.answers import SETTINGS_FILE
from llava_uhd.eval.choose import choose_tasks
from llava_uhd.eval.commands import (
    add_data_commands,
    check_data_command,
    check_submission_command,
    score_published,
    submission_command,
)
from llava_uhd.eval.compare import add_compare_command, compare_command
from llava_uhd.eval.generate import Answerer, Limits
from llava_uhd.eval.judge.command import judge_command, summarize_command
from llava_uhd.eval.judge.options import SUMMARIZE, add_judge_command, join_words
from llava_uhd.eval.protocols import OWN, PROTOCOLS, processor_for
from llava_uhd.eval.provenance import data_digest
from llava_uhd.eval.ranks import Ranks
from llava_uhd.eval.report import add_report_command, report_command, write_report
from llava_uhd.eval.results import RESULTS_NAME, TaskResult, write_results
from llava_uhd.eval.runner import RUN_FILE, Job, make_limits, prepare, run_job, score_again
from llava_uhd.eval.subject import add_model_options, load_subject
from llava_uhd.eval.task import DATA_ROOT, Task
from llava_uhd.eval.tasks import TASKS


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="answer and score")
    add_model_options(run)
    run.add_argument("--tasks", help="comma-separated; default: all whose data are here")
    run.add_argument("--limit", type=int, help="only the first N items: a trial, not comparable")
    run.add_argument("--batch-size", type=int, default=8)
    run.add_argument("--beams", type=int, help="default: the protocol's")
    run.add_argument("--max-new-tokens", type=int, help="default: the protocol's")
    run.add_argument(
        "--protocol",
        default=OWN,
        help=f"measure as a published system did ({', '.join(PROTOCOLS.names())}); default: {OWN}",
    )
    run.add_argument("--data-root", type=Path, help=f"default: {DATA_ROOT}")
    run.add_argument(
        "--output",
        type=Path,
        help="default: CHECKPOINT/eval, or eval-compression-K-S beside it when another compression "
        "than the checkpoint's own is asked for; the name of another protocol is added",
    )
    run.add_argument("--overwrite", action="store_true", help="throw earlier answers away")
    score = commands.add_parser("score", help="score saved answers again, without a model")
    score.add_argument("results", type=Path, nargs="?", help="folder that a run wrote")
    score.add_argument("--task", help="score an answers file of this task instead")
    score.add_argument("--answers", type=Path, help="with --task: file in the published layout")
    score.add_argument("--output", type=Path, help="with --task: JSON file to write")
    score.add_argument(
        "--compatible",
        action="store_true",
        help="with --task: as the published scorer, oddities too",
    )
    score.add_argument("--data-root", type=Path, help="default: where the run found them")
    listing = commands.add_parser("list", help="tasks and their data")
    listing.add_argument("--data-root", type=Path, help=f"default: {DATA_ROOT}")
    add_answer_command(commands)
    add_data_commands(commands)
    add_compare_command(commands)
    add_report_command(commands)
    add_judge_command(commands)
    return parser.parse_args(join_words(sys.argv[1:] if words is None else words))


def main(words: list[str] | None = None) -> int:
    """Runs the command; 0 if every item was answered and scored, 1 if not.

    Raises:
        UserError: a mistake that the user can mend, or a file that the system refuses.
    """
    logging.basicConfig(format="%(message)s")
    transformers_logging.set_verbosity_error()
    # Notes for developers of other libraries; users get errors of one line.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    options = parse_arguments(words)
    known = {
        "list": list_tasks,
        "answer": answer_command,
        "score": score_command,
        "compare": compare_command,
        "report": report_command,
        "check-data": check_data_command,
        "submission": submission_command,
        "check-submission": check_submission_command,
        "judge": judge_and_report,
        SUMMARIZE: summarize_command,
    }
    try:
        return known.get(options.command, run_command)(options)
    except BrokenPipeError:
        raise
    except OSError as error:  # a folder that is read only, a full disk
        if error.errno is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        raise UserError(f"{where}{error.strerror}") from error


def run_command(options: argparse.Namespace) -> int:
    """``run``: answers and scores."""
    ranks = Ranks.from_environment()
    console = Console(stderr=True, quiet=ranks.rank > 0)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    read_options(options)  # a mistake in them costs no time
    protocol = PROTOCOLS.get(options.protocol)
    tasks = [
        protocol.apply(task) for task in choose_tasks(options.tasks, options.data_root, console)
    ]
    limits = {
        task.name: make_limits(task, options.beams, options.max_new_tokens, options.batch_size)
        for task in tasks
    }
    subject = load_subject(options, ranks, console)
    model, processor = subject.model, subject.processor
    image = processor.image_config
    name = "eval" if subject.compression is None else f"eval-{subject.compression}"
    name += "" if protocol.name == OWN else f"-{protocol.name}"
    output = options.output or _default_output(subject.checkpoint, subject.folder, name)
    jobs = []
    for task in tasks:
        known = {**subject.settings, **protocol.settings(task, image)}
        jobs.append(make_job(task, limits[task.name], known, subject.facts, options, output))
    ranks.connect()
    try:
        prepare(jobs, ranks, options.overwrite)
        failed = 0
        for job in jobs:
            wanted = processor_for(processor, protocol.images(job.task.name, image))
            answerer = Answerer(model, wanted, job.task, limits[job.task.name])
            failed += answer_job(job, answerer, ranks, console)
        ranks.wait()
    finally:
        ranks.disconnect()
    if ranks.rank > 0:
        return int(failed > 0)
    return report(output, subject.checkpoint, [task.name for task in tasks])


def answer_job(job: Job, answerer: Answerer, ranks: Ranks, console: Console) -> int:
    """Answers and scores one task; the number of items that failed, the first of them told."""
    _, failures = run_job(job, answerer, ranks, console)
    for each in failures[:20]:
        text = f"failed: {job.task.name} {each.id!r}: {each.reason}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return len(failures)


def make_job(
    task: Task,
    limits: Limits,
    settings: dict[str, Any],
    facts: Mapping[str, Any],
    options: argparse.Namespace,
    output: Path,
) -> Job:
    """Reads the items of a task and completes the settings."""
    root = task.root(options.data_root)
    items = task.load(root)
    return Job(
        task=task,
        items=items,
        limit=options.limit,
        folder=output / task.name,
        data=root.absolute(),
        settings={
            **settings,
            "task": task.name,
            "task_version": task.version,
            "questions": data_digest(task, items),
            "beams": limits.beams,
            "max_new_tokens": limits.max_new_tokens,
        },
        provenance=facts,
    )


def _default_output(checkpoint: str, folder: Path, name: str) -> Path:
    # Results of a hub model do not belong into the hub's cache.
    parent = folder if Path(checkpoint).is_dir() else Path("checkpoints") / Path(checkpoint).name
    return parent / name


def report(output: Path, title: str, names: list[str]) -> int:
    """Writes and shows the table; 1 if one of the named tasks has no score."""
    results = write_results(output, title)
    page = write_report(output, title)
    show(results)
    for file in (output / f"{RESULTS_NAME}.md", page):
        Console().print(f"{file}", markup=False, highlight=False, soft_wrap=True)
    return int(any(result.problem for result in results if result.task in names))


def show(results: list[TaskResult]) -> None:
    """Prints the table of scores."""
    table = Table("task", "metric", "score", "items", "note")
    for result in results:
        for row in result.rows:
            text = "-" if row.value is None else f"{row.value:.4g}"
            text += "" if row.error is None else f" ± {row.error:.2g}"
            about = (escape(result.title), row.metric, text, str(row.items), escape(result.note))
            table.add_row(*about)
    Console().print(table)


def score_command(options: argparse.Namespace) -> int:
    """``score``: every task of a results folder from its saved answers, or an answers file."""
    if options.task is not None:
        return score_published(options)
    if options.results is None:
        raise UserError("score: name a results folder, or --task TASK --answers FILE")
    folders = [path.parent for path in sorted(options.results.glob(f"*/{SETTINGS_FILE}"))]
    if not folders:
        raise UserError(
            f"{options.results} holds no results: name the folder that a run wrote "
            "(CHECKPOINT/eval)"
        )
    for folder in folders:
        score_again(folder, TASKS.get(folder.name), options.data_root)
    return report(options.results, _title(folders[0]), [folder.name for folder in folders])


def _title(folder: Path) -> str:
    """The checkpoint whose answers a task's folder holds."""
    return str(read_json(folder / RUN_FILE).get("checkpoint", folder.parent))


def judge_and_report(options: argparse.Namespace) -> int:
    """``judge``: scores by a chat model, and the table with them."""
    judged = judge_command(options)
    if judged.results is None:
        return judged.status
    title = _title(judged.results / judged.tasks[0])
    return max(report(judged.results, title, judged.tasks), judged.status)


def list_tasks(options: argparse.Namespace) -> int:
    """``list``: registered tasks, whether their data are here, and where they come from."""
    table = Table("task", "title", "metric", "data", "where to get it")
    for column in table.columns:
        column.overflow = "fold"
    for name in TASKS.names():
        task = TASKS.get(name)
        root = task.root(options.data_root)
        here = f"{root}" if task.missing(root) is None else "missing"
        table.add_row(*map(escape, (name, task.title, task.main_metric, here, task.source)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    command(main)
