"""``bench pack``: what batches hold, and what training on them takes: padded and packed."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_uhd.bench.compress_passes import DTYPES
from llava_uhd.bench.output import make_console, mebibytes, print_table, seconds, write_json
from llava_uhd.bench.pack_data import ASSUMPTION, LONGEST, SAMPLES, Lengths, of_recipe, simulated
from llava_uhd.bench.pack_passes import MODELS, Passes, Task, prepare
from llava_uhd.bench.pack_plans import Sharing, Way, compare_plans
from llava_uhd.bench.timing import Comparison, compare
from llava_uhd.errors import UserError

# Least share of a packed row's slots that hold a token, and largest difference of the gradients,
# relative to the largest one, in float32.
FILL, GRADIENTS = 0.95, 1e-5

PLAN_NOTES = """\
"shuffled" and "grouped" are padded; "grouped" is the published group_by_modality_length, which
gives all devices like sums of lengths, not batches of one length (on simulated data it sorts by the
texts' tokens, which stand for words). Packed rows have at most so many tokens.
Fill: share of the slots of all batches that hold a token. Imbalance: cost of a step's costliest
batch over the mean of its batches. Operations: of a training pass with padding, attention within a
sample, against the first line; "with waiting" multiplies them by the imbalance, as if every device
always waited for the costliest batch."""

PASS_NOTES = """\
Forward and backward over the same samples, ways in turns; the tower rests. Attention of "packed"
works sample by sample, that of "packed, one mask" on the square of the row, as the library's sdpa
does. Time: CPU time, or wall time on CUDA; the best of all turns. Gradients: largest difference of
the gradients of the mean loss, relative to the largest of them."""


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "pack", help="packed batches against padded ones: slots, balance, throughput"
    )
    parser.add_argument("--recipe", help="also plan the data of this recipe")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="simulated ones to plan")
    default = Sharing()
    parser.add_argument(
        "--per-device", type=int, default=default.per_device, help="samples of a padded batch"
    )
    parser.add_argument("--devices", type=int, default=default.devices, help="of the planned run")
    parser.add_argument(
        "--accumulated", type=int, default=default.accumulated, help="batches of a device in a step"
    )
    parser.add_argument(
        "--budgets", default="4096", metavar="A,B", help="tokens of packed rows, beside the default"
    )
    parser.add_argument("--plan-only", action="store_true", help="no training passes")
    task = Task()
    parser.add_argument("--passes", type=int, default=64, help="samples to train on")
    parser.add_argument("--layers", type=int, default=task.layers, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=task.hidden, help="width, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--device", default=task.device, help="cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def check(options: argparse.Namespace) -> list[int | None]:
    """Budgets of packed rows, None for the default one.

    Raises:
        UserError: a number that is none.
    """
    names = ("samples", "per_device", "devices", "accumulated", "passes", "layers", "repeats")
    for name in (*names, "threads", "hidden"):
        if getattr(options, name) < 1:
            flag, value = name.replace("_", "-"), getattr(options, name)
            raise UserError(f"--{flag} must be at least 1, got {value}")
    if options.hidden % 64:
        raise UserError(f"--hidden must be a multiple of 64, got {options.hidden}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: this machine has no CUDA device")
    words = [word.strip() for word in options.budgets.split(",") if word.strip()]
    for word in words:
        if not word.isdigit() or int(word) < LONGEST:
            raise UserError(
                f"--budgets {options.budgets} must be numbers of tokens, at least {LONGEST}: 4096"
            )
    return [None, *map(int, words)]


def run(options: argparse.Namespace) -> int:
    """Plans, measures, prints, and returns 1 if rows are too empty or gradients differ."""
    budgets = check(options)
    torch.set_num_threads(options.threads)
    console = make_console()
    sharing = Sharing(options.per_device, options.devices, options.accumulated)
    data = [(simulated(options.samples), sharing, ASSUMPTION, budgets)]
    if options.recipe:
        data.append(recipe_data(options.recipe, options.devices))
    plans = []
    for lengths, shared, note, wanted in data:
        ways = compare_plans(lengths, shared, wanted)
        plans.append({**described(lengths, shared, note), "ways": [way.to_dict() for way in ways]})
        print_plans(console, lengths, shared, note, ways)
    console.print(PLAN_NOTES + "\n")
    measured = [] if options.plan_only else measure(options, sharing)
    for title, passes, comparison in measured:
        print_passes(console, title, passes, comparison)
    if measured:
        console.print(PASS_NOTES)
    failed = judge(plans, [comparison for _, _, comparison in measured], options.dtype)
    if options.json:
        found = [passes_dict(passes, comparison) for _, passes, comparison in measured]
        facts = {"torch": torch.__version__, "threads": options.threads, "device": options.device}
        write_json(options.json, {**facts, "plans": plans, "passes": found, "passed": not failed})
    for line in failed:
        console.print(f"FAILED: {line}")
    return 1 if failed else 0


def recipe_data(name: str, devices: int) -> tuple[Lengths, Sharing, str, list[int | None]]:
    """Lengths, batches and rows of a recipe; as many devices as can share its global batch.

    Args:
        name: of the recipe.
        devices: at most.
    """
    lengths, recipe = of_recipe(name)
    total = recipe.trainer.global_batch_size or devices
    shared = max(count for count in range(1, devices + 1) if total % count == 0)
    per_device, accumulated = recipe.trainer.batch_plan(shared)
    return lengths, Sharing(per_device, shared, accumulated), "counted", [recipe.data.pack_tokens]


def described(lengths: Lengths, sharing: Sharing, note: str) -> dict[str, Any]:
    """Facts of a table, ready for JSON."""
    return {
        "title": lengths.title,
        "note": note,
        "samples": len(lengths.tokens),
        "mean_tokens": float(lengths.tokens.mean()),
        "longest": int(lengths.tokens.max()),
        **vars(sharing),
    }


def print_plans(
    console: Console, lengths: Lengths, sharing: Sharing, note: str, ways: Sequence[Way]
) -> None:
    """Prints the table of one set of lengths."""
    tokens = lengths.tokens
    console.print(
        f"{lengths.title} ({note}): {tokens.mean():,.0f} tokens on average, {tokens.max():,} at "
        f"most; {sharing.per_device} a padded batch, {sharing.devices} devices, "
        f"{sharing.accumulated} accumulated"
    )
    first = ways[0].operations
    rows = [
        (
            way.name,
            f"{way.fill:.2%}",
            f"{way.batches:,}",
            f"{way.samples_per_step:.1f}",
            f"{way.imbalance:.3f}",
            f"{way.operations / first:.3f}",
            f"{way.operations * way.imbalance / (first * ways[0].imbalance):.3f}",
            f"{way.row:,}",
            seconds(way.plan_s),
        )
        for way in ways
    ]
    columns = (
        *("", "fill", "batches", "samples/step", "imbalance", "operations", "with waiting"),
        *("largest", "plan"),
    )
    print_table(console, "", columns, rows)


def measure(options: argparse.Namespace, sharing: Sharing) -> list[tuple[str, Passes, Comparison]]:
    """Times the passes of each kind of samples."""
    task = Task(options.layers, options.hidden, DTYPES[options.dtype], options.device)
    found = []
    for kind in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            passes = prepare(kind, task, options.passes, sharing, Path(folder))
        title = passes.lengths.title
        comparison = compare(title, passes.variants, repeats=options.repeats, device=options.device)
        found.append((title, passes, comparison))
    return found


def print_passes(console: Console, title: str, passes: Passes, comparison: Comparison) -> None:
    """Prints the table of one kind of samples."""
    samples = len(passes.lengths.tokens)
    rows = [
        (
            row.name,
            str(passes.batches[row.name]),
            seconds(row.best_s),
            f"{samples / row.best_s:,.1f}",
            f"{passes.learned / row.best_s:,.0f}",
            f"{comparison.speedup(row):.2f}",
            mebibytes(row.peak_bytes),
            f"{row.relative_error:.1e}",
        )
        for row in comparison.rows
    ]
    columns = (
        *("", "batches", "time", "samples/s", "learned tokens/s", "times faster"),
        *("peak memory", "gradients"),
    )
    print_table(console, title, columns, rows)


def passes_dict(passes: Passes, comparison: Comparison) -> dict[str, Any]:
    """A table of passes, ready for JSON."""
    samples = len(passes.lengths.tokens)
    rates = {
        row.name: {
            "batches": passes.batches[row.name],
            "samples_per_second": samples / row.best_s,
            "learned_tokens_per_second": passes.learned / row.best_s,
        }
        for row in comparison.rows
    }
    counts = {"samples": samples, "learned": passes.learned}
    return {**comparison.to_dict(), **counts, "rates": rates}


def judge(
    plans: Sequence[dict[str, Any]], comparisons: Sequence[Comparison], dtype: str
) -> list[str]:
    """What is not as it must be."""
    failed = [
        f"{plan['title']}: only {way['fill']:.1%} of the slots of rows of {way['row']:,} tokens "
        f"are filled, {FILL:.0%} wanted"
        for plan in plans
        for way in plan["ways"]
        if way["name"].startswith("packed") and way["fill"] < FILL
    ]
    if dtype == "float32":
        failed += [
            f"{one.title}: gradients differ by {one.worst_error:.1e}, more than {GRADIENTS:.0e}"
            for one in comparisons
            if one.worst_error > GRADIENTS
        ]
    return failed
