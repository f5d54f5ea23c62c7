"""The command line of the judge."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.judge.endpoint import KEY_VARIABLE, URL_VARIABLES, Endpoint, Retry, default_url
from llava_uhd.eval.judge.review import PUBLISHED_MODEL

SUMMARIZE = "judge-summarize"


def join_words(words: Sequence[str]) -> list[str]:
    """The command line with ``judge summarize`` in one word, which has options of its own."""
    return [SUMMARIZE, *words[2:]] if list(words[:2]) == ["judge", "summarize"] else list(words)


def add_judge_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``judge`` and ``judge summarize`` (see `join_words`)."""
    judge = commands.add_parser(
        "judge",
        help="GPT-assisted review, with any OpenAI-compatible server",
        description="judge RESULTS_DIR: scores of the judged tasks of a results folder. judge "
        "--question F [--context F] --answer-list REF OURS --rule F --output REVIEW: the published "
        "review. judge summarize REVIEW...: its summary.",
    )
    judge.add_argument("words", nargs="*", metavar="RESULTS_DIR")
    _add_server(judge.add_argument_group("server"))
    _add_compatible(judge)
    judge.add_argument("-r", "--rule", type=Path, help="rule.json with the prompts of reviews")
    results = judge.add_argument_group("of a results folder")
    results.add_argument("--tasks", help="comma-separated; default: all judged ones in it")
    results.add_argument("--data-root", type=Path, help="default: where the run found them")
    results.add_argument("--runs", type=int, default=1, help="judge so often; scores are means")
    results.add_argument("--prompt-file", type=Path, help="published evaluator with the prompt")
    review = judge.add_argument_group("published review")
    review.add_argument("-q", "--question", type=Path, help="JSON lines of questions")
    review.add_argument("-c", "--context", type=Path, help="JSON lines that stand for the images")
    review.add_argument("-a", "--answer-list", type=Path, nargs="+", help="reference, then ours")
    review.add_argument("-o", "--output", type=Path, help="review file; goes on with what is there")
    summary = commands.add_parser(SUMMARIZE, help="judge summarize: of review files")
    summary.add_argument("words", nargs="*", type=Path, metavar="REVIEW")
    _add_compatible(summary)
    summary.add_argument("-d", "--dir", type=Path, help="folder of review files")
    summary.add_argument("-v", "--version", choices=("0613", "0314"), help="of the judge, by name")
    summary.add_argument("-s", "--select", nargs="*", default=[], help="parts of the name")
    summary.add_argument("-f", "--files", type=Path, nargs="*", default=[], help="review files")
    summary.add_argument("-i", "--ignore", nargs="*", default=[], help="question ids to leave out")


def _add_compatible(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compatible",
        action="store_true",
        help="as published: replies that cannot be read count as -1 (MM-Vet: 0), answers belong to "
        "questions by position",
    )


def _add_server(server: argparse._ArgumentGroup) -> None:
    server.add_argument(
        "--base-url", help=f"default: {' or '.join(URL_VARIABLES)}, else the server of OpenAI"
    )
    server.add_argument("--model", help=f"default, for the published review: {PUBLISHED_MODEL}")
    server.add_argument(
        "--key-variable",
        default=KEY_VARIABLE,
        help=f"environment variable of the key; default: {KEY_VARIABLE}",
    )
    server.add_argument("--dry-run", action="store_true", help="say what it will cost, ask nothing")
    server.add_argument(
        "--price", type=float, nargs=2, metavar=("SENT", "BACK"), help="dollars per million tokens"
    )
    server.add_argument(
        "--concurrency",
        type=int,
        help="requests at a time; default: 4, and 1 for the published review",
    )
    server.add_argument(
        "--reasks",
        type=int,
        help="ask so often again where a reply cannot be read; default: 1, and 0 for the published "
        "review",
    )
    server.add_argument("--retries", type=int, default=6, help="of a request that fails")
    server.add_argument(
        "--first-wait", type=float, default=1.0, help="seconds before the first retry; doubles"
    )
    server.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")
    server.add_argument("--max-tokens", type=int, help="of a reply; default: the published number")
    server.add_argument(
        "--parameters",
        help="JSON object, over the published parameters of requests; null removes one",
    )
    server.add_argument("--cache", type=Path, help="file of replies; default: beside the results")
    server.add_argument("--overwrite", action="store_true", help="throw earlier replies away")


def check_numbers(options: argparse.Namespace) -> None:
    """Raises:
    UserError: a number that makes no sense.
    """
    least = {"concurrency": 1, "runs": 1, "reasks": 0, "retries": 0, "first_wait": 0}
    least |= {"max_tokens": 1}
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and not value >= number:
            word = name.replace("_", "-")
            raise UserError(f"--{word} {value}: must be at least {number}")
    if not options.timeout > 0:
        raise UserError(f"--timeout {options.timeout}: must be more than 0")


def read_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Parameters of requests that the user sets; null is None.

    Raises:
        UserError: no JSON object, or one that sets model or messages.
    """
    found: dict[str, Any] = {}
    if options.max_tokens is not None:
        found["max_tokens"] = options.max_tokens
    if options.parameters is not None:
        try:
            given = json.loads(options.parameters)
        except ValueError as error:
            raise UserError(f"--parameters is no JSON ({error})") from error
        if not isinstance(given, dict) or {"model", "messages", "stream"} & set(given):
            raise UserError(
                "--parameters must be a JSON object without model, messages and stream, for "
                'instance \'{"temperature": null, "seed": 1}\''
            )
        found |= given
    return found


def make_endpoint(options: argparse.Namespace) -> Endpoint:
    """The server that the options name."""
    return Endpoint(
        options.base_url or default_url(),
        options.key_variable,
        options.timeout,
        Retry(options.retries, options.first_wait),
    )
