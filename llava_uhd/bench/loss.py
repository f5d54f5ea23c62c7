"""``bench loss``: the loss with all logits at once, in pieces, and by Liger's kernels."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from llava_uhd.bench.alone import Alone, compare_alone
from llava_uhd.bench.output import make_console, mebibytes, print_table, seconds, write_json
from llava_uhd.bench.timing import Comparison, Variant, compare
from llava_uhd.errors import UserError
from llava_uhd.language.decoder import LogitRule
from llava_uhd.language.loss import Form, LossPlan, plan_chunks, supervised_loss
from llava_uhd.train.memory import logit_bytes

FORMS = ("whole", "chunked", "auto", "liger")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest differences to "whole" in float32, relative to the largest value.
LARGEST_ERROR = 1e-5
# Rows of the head's gradient that are compared.
COMPARED = 1024

NOTES = """\
Forward and backward pass from the decoder's output on, the gradient of the head included. Memory:
what the process takes (CUDA: the allocator's peak) beyond weights and inputs; estimate: that of
the pre-flight, with the gradient of the head. Ratio: against the first line. Difference: largest
one of loss and gradients, relative to the largest value. Time: CPU time, or wall time on CUDA; the
best run."""


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        rows: learned tokens.
        vocabulary: logits of each.
        hidden: width of the language model.
        frozen: the head rests (adapters, first stages).
        dtype: of weights and states.
        device: where.
    """

    rows: int = 4096
    vocabulary: int = 151936
    hidden: int = 896
    frozen: bool = False
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def small(self) -> Task:
        """The same, to warm up."""
        return replace(self, rows=16, vocabulary=64, hidden=32)

    def estimate(self, form: str) -> float:
        """Bytes that the pre-flight expects, with the gradient of the head."""
        size = DTYPES[self.dtype].itemsize
        shape = (self.rows, self.vocabulary, self.hidden)
        gradient = 0 if self.frozen else self.vocabulary * self.hidden * size
        return logit_bytes(*shape, size, form, not self.frozen) + gradient


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser("loss", help="memory and time of the loss: all logits, or pieces")
    task = Task()
    parser.add_argument("--rows", type=int, default=task.rows, help="learned tokens")
    parser.add_argument("--vocabulary", type=int, default=task.vocabulary, help="logits")
    parser.add_argument("--hidden", type=int, default=task.hidden, help="width")
    parser.add_argument("--frozen-head", action="store_true", help="the head rests")
    parser.add_argument("--compare", metavar="A,B", help=f"some of {', '.join(FORMS)}")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", choices=DTYPES, default=task.dtype, help="of weights")
    parser.add_argument("--device", default=task.device, help="cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def make(task: Task, form: str) -> Variant:
    """The loss of random states in one form, and its gradients."""
    options: dict[str, Any] = {"device": task.device, "dtype": DTYPES[task.dtype]}
    generator = torch.Generator(task.device).manual_seed(0)
    head = nn.Linear(task.hidden, task.vocabulary, bias=False, **options)
    head.weight.requires_grad_(not task.frozen)
    with torch.no_grad():
        head.weight.normal_(std=task.hidden**-0.5, generator=generator)
    states = torch.randn(1, task.rows + 1, task.hidden, generator=generator, **options)
    states.requires_grad_()
    shape = (1, task.rows + 1)
    labels = torch.randint(task.vocabulary, shape, generator=generator, device=task.device)
    plan, rule = LossPlan(cast(Form, form)), LogitRule(task.vocabulary)

    def passes() -> torch.Tensor:
        states.grad = head.weight.grad = None
        loss = supervised_loss(head, states, labels, plan=plan, rule=rule)
        loss.backward()
        return loss

    def common(loss: torch.Tensor) -> torch.Tensor:
        # Scaled to the order of one, so that none hides the errors of the others.
        assert states.grad is not None
        parts = [loss.detach()[None], states.grad.flatten() * task.rows * task.hidden**0.5]
        if head.weight.grad is not None:
            parts.append(head.weight.grad[:COMPARED].flatten() * task.rows)
        return torch.cat([part.float().cpu() for part in parts])

    return Variant(passes, common)


def check(options: argparse.Namespace) -> tuple[Task, tuple[str, ...]]:
    """Task and forms of a command line.

    Raises:
        UserError: a number that is none, or a form that this machine cannot run.
    """
    for name in ("rows", "vocabulary", "hidden", "repeats", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    cuda = options.device != "cpu"
    if cuda and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: this machine has no CUDA device")
    able = cuda and importlib.util.find_spec("liger_kernel") is not None
    default = "whole,chunked,liger" if able else "whole,chunked"
    forms = tuple(word.strip() for word in (options.compare or default).split(","))
    for form in forms:
        if form not in FORMS or forms.count(form) > 1:
            known = ", ".join(FORMS)
            raise UserError(f"--compare {options.compare}: name some of {known}, each once")
    if "liger" in forms and not able:
        raise UserError("--compare liger needs --device cuda and the package liger-kernel")
    sizes = (options.rows, options.vocabulary, options.hidden)
    return Task(*sizes, options.frozen_head, options.dtype, options.device), forms


def run(options: argparse.Namespace) -> int:
    """Measures, prints, and returns 1 if the forms differ in float32."""
    task, forms = check(options)
    learns = "rests" if task.frozen else "learns"
    title = (
        f"{task.rows:,} learned tokens, {task.vocabulary:,} words, width {task.hidden:,}, "
        f"{task.dtype}, the head {learns}, {task.device}"
    )
    if task.device == "cpu":
        jobs = [Alone(title, task, task.small, forms)]
        found = compare_alone(make, jobs, repeats=options.repeats, threads=options.threads)[0]
    else:
        variants = {form: make(task, form) for form in forms}
        found = compare(title, variants, repeats=options.repeats, device=task.device)
    print_comparison(task, found)
    if options.json:
        estimates = {form: task.estimate(form) for form in forms}
        write_json(options.json, {**found.to_dict(), "estimates": estimates})
    return int(task.dtype == "float32" and found.worst_error > LARGEST_ERROR)


def print_comparison(task: Task, found: Comparison) -> None:
    """Prints the table."""
    console, first, rows = make_console(), found.rows[0], []
    for row in found.rows:
        pieces = plan_chunks(row.name, task.rows, task.vocabulary)
        own = "its own" if row.name == "liger" else str(pieces)
        rows.append(
            [
                *(row.name, own, mebibytes(row.peak_bytes)),
                f"{row.peak_bytes / first.peak_bytes:.2f}" if first.peak_bytes else "-",
                mebibytes(round(task.estimate(row.name))),
                *(seconds(row.best_s), f"{row.best_s / first.best_s:.2f}"),
                f"{row.relative_error:.1e}",
            ]
        )
    columns = ("form", "pieces", "memory", "ratio", "estimate", "time", "ratio", "difference")
    print_table(console, found.title, columns, rows)
    console.print(NOTES)
