"""``judge``: reviews and grades by a chat model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from llava_uhd.errors import UserError
from llava_uhd.eval.judge.asking import Judge, Question, Verdict, estimate
from llava_uhd.eval.judge.cache import Cache
from llava_uhd.eval.judge.endpoint import Endpoint
from llava_uhd.eval.judge.folder import Work, judge_work, judged_folders, read_work
from llava_uhd.eval.judge.options import (
    check_numbers,
    make_endpoint,
    read_parameters,
)
from llava_uhd.eval.judge.review import (
    PARAMETERS,
    PUBLISHED_MODEL,
    begun,
    comparisons,
    read_file,
    write_review,
)
from llava_uhd.eval.judge.summary import find_reviews, summarise_file

_LISTED = 50  # problems that are printed


@dataclass(frozen=True)
class Judged:
    """What a command did.

    Attributes:
        status: of the process: 1 if a question has no verdict.
        results: folder whose tasks have new scores, or None.
        tasks: their names.
    """

    status: int
    results: Path | None = None
    tasks: list[str] = field(default_factory=list)


def judge_command(options: argparse.Namespace) -> Judged:
    """``judge``: of a results folder, or the published review.

    Raises:
        UserError: options that do not fit together, and whatever the forms raise.
    """
    check_numbers(options)
    words = options.words
    if options.question is not None:
        if words:
            raise UserError(f"judge --question takes no folder, got {words[0]!r}")
        return Judged(_review(options))
    if len(words) != 1:
        raise UserError("judge: name a results folder, or --question and other files of a review")
    return _results(options, Path(words[0]))


def summarize_command(options: argparse.Namespace) -> int:
    """``judge summarize``: the published summary on stdout, what was left out on stderr.

    Raises:
        UserError: no review, or a damaged one.
    """
    found = find_reviews(
        [*options.words, *options.files], options.dir, options.select, options.version
    )
    for file in found:
        summary = summarise_file(file, options.ignore, options.compatible)
        Console(emoji=False).print(summary.text, markup=False, highlight=False, soft_wrap=True)
        if summary.unread:
            how = "counted as -1" if options.compatible else "left out (--compatible averages -1)"
            ids = ", ".join(map(str, summary.unread))
            _say(
                f"{file}: {len(summary.unread)} of {summary.count} replies could not be read and "
                f"are {how}: {ids}"
            )
    return 0


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _review(options: argparse.Namespace) -> int:
    """``judge --question``: 1 if a question got no reply."""
    if len(options.answer_list or ()) != 2:
        raise UserError("judge --question needs --answer-list REFERENCE OURS")
    for name in ("rule", "output"):
        if getattr(options, name) is None:
            raise UserError(f"judge --question needs --{name}")
    reference, ours = options.answer_list
    made = comparisons(
        read_file(options.question, "question_id", "text"),
        None if options.context is None else read_file(options.context, "image"),
        read_file(reference, "question_id", "text"),
        read_file(ours, "question_id", "text"),
        options.rule,
        by_position=options.compatible,
    )
    output: Path = options.output
    cache_file = options.cache or output.with_name(f"{output.name}.cache")
    parameters = {**PARAMETERS, **read_parameters(options)}
    model = options.model or PUBLISHED_MODEL
    if options.overwrite and not options.dry_run:
        output.unlink(missing_ok=True)
        cache_file.unlink(missing_ok=True)
    endpoint = make_endpoint(options)
    with Cache(cache_file, write=not options.dry_run) as cache:
        done = 0 if options.overwrite else begun(output, made, options.compatible)
        questions = [each.question(parameters) for each in made[done:]]
        _say(f"{output}: {done} of {len(made)} reviews are there")
        _tell_cost(questions, model, cache, options)
        if options.dry_run:
            return 0
        judge = Judge(endpoint, model, cache, options.concurrency or 1, options.reasks or 0)
        verdicts = write_review(
            judge, made, output, parameters, Console(stderr=True), options.compatible
        )
    _conclude(endpoint, judge)
    silent = _list_problems("review", verdicts)
    if silent:
        _say(f"{output} ends before the first question without a reply: run it again")
    return int(silent > 0)


def _results(options: argparse.Namespace, results: Path) -> Judged:
    """``judge RESULTS_DIR``: 1 if a question has no verdict or a task could not be judged."""
    if not options.model:
        raise UserError("judge RESULTS_DIR needs --model: the judge's name on the server")
    parameters = read_parameters(options)
    works: list[Work] = []
    refused = 0
    for folder in judged_folders(results, options.tasks):
        try:
            works.append(
                read_work(
                    folder,
                    options.data_root,
                    options.runs,
                    options.rule,
                    options.prompt_file,
                    parameters,
                )
            )
        except UserError as error:
            if options.tasks is not None:
                raise
            refused += 1
            _say(f"left out: {error}")
    cache_file = options.cache or results / "judge.cache"
    if options.overwrite and not options.dry_run:
        cache_file.unlink(missing_ok=True)
    endpoint = make_endpoint(options)
    missing = 0
    with Cache(cache_file, write=not options.dry_run) as cache:
        for work in works:
            _say(f"{work.job.task.name}: prompt {work.plan.prompt}")
        questions = [question for work in works for question in work.questions]
        _tell_cost(questions, options.model, cache, options)
        if options.dry_run:
            return Judged(int(refused > 0))
        reasks = 1 if options.reasks is None else options.reasks
        judge = Judge(endpoint, options.model, cache, options.concurrency or 4, reasks)
        for work in works:
            verdicts = judge_work(judge, work, Console(stderr=True), options.compatible)
            _list_problems(work.job.task.name, verdicts)
            missing += sum(each.metrics is None for each in verdicts)
    _conclude(endpoint, judge)
    names = [work.job.task.name for work in works]
    return Judged(int(missing + refused > 0), results if names else None, names)


def _tell_cost(
    questions: Sequence[Question], model: str, cache: Cache, options: argparse.Namespace
) -> None:
    Console().print(
        f"{model}: {estimate(questions, model, cache).text(options.price)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _conclude(endpoint: Endpoint, judge: Judge) -> None:
    endpoint.close()
    _say(
        f"{endpoint.requests} requests; the server counted {judge.prompt_tokens} tokens sent and "
        f"{judge.new_tokens} back"
    )


def _list_problems(name: str, verdicts: Sequence[Verdict]) -> int:
    """Prints the questions without a verdict; the number of those without any reply."""
    bad = [each for each in verdicts if each.metrics is None]
    for each in bad[:_LISTED]:
        run = f" (run {each.question.run + 1})" if each.question.run else ""
        _say(f"no verdict: {name} {each.question.id!r}{run}: {each.problem}")
    if len(bad) > _LISTED:
        _say(f"and {len(bad) - _LISTED} more")
    if bad:
        _say(f"{name}: {len(bad)} of {len(verdicts)} questions have no verdict")
    return sum(each.reply is None for each in bad)
