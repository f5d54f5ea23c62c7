"""``bench train``: steps of any recipe on random weights of its real shape, and expected hours."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
from rich.console import Console

from llava_uhd.bench.output import print_table, seconds, write_json
from llava_uhd.bench.train_data import Mix
from llava_uhd.bench.train_estimate import (
    DEFAULT_RECIPES,
    mix_of,
    parse_mfus,
    print_estimates,
)
from llava_uhd.bench.train_run import (
    BATCHINGS,
    GROUPED,
    PACKED,
    PADDED,
    Cuts,
    TrainTask,
    measure_alone,
)
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.train.flops import CONVENTION

COLUMNS = (
    *("recipe, batching", "step", "best", "samples/s", "tokens/s", "padding", "TFLOP/s", "MFU"),
    *("data wait", "tower", "projector", "LLM", "optimizer", "memory"),
)


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "train", help="training steps of recipes on random weights of their real shape"
    )
    parser.add_argument(
        "--recipe", metavar="A,B", help="names of recipes; with --estimate the default is several"
    )
    parser.add_argument("--debug", action="store_true", help="tiny models, as in training")
    parser.add_argument(
        "--overrides", default="", metavar="TEXT", help='recipe keys: "--lora.r 128 --data.x y"'
    )
    parser.add_argument(
        "--compare", metavar="A,B", help=f"ways to make batches: {', '.join(BATCHINGS)}"
    )
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that each is measured, in turns"
    )
    parser.add_argument("--batch", type=int, help="samples per device; default: the recipe's")
    parser.add_argument("--accumulate", type=int, default=1, help="passes of a step")
    parser.add_argument("--layers", type=int, help="cut the language model to so many layers")
    parser.add_argument("--hidden", type=int, help="cut its width")
    parser.add_argument("--tower-layers", type=int, help="cut the vision tower to so many layers")
    parser.add_argument("--text-tokens", type=float, help="mean of a sample; default: by stage")
    parser.add_argument("--text-sigma", type=float, help="of its logarithm")
    parser.add_argument("--text-only", type=float, help="share of samples without an image")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--estimate", action="store_true", help="expected hours instead")
    parser.add_argument("--devices", type=int, default=8, help="of the estimate")
    parser.add_argument("--mfu", default="0.25,0.4", metavar="A,B", help="of the estimate, assumed")
    parser.add_argument("--samples", type=int, help="of the estimate; default: as published")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures or estimates, and prints."""
    recipes = load_recipes(options)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=200, highlight=False, markup=False)  # its tables are wide
    if options.estimate:
        mfus = parse_mfus(options.mfu)
        for name in ("devices", "samples"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
        found = print_estimates(console, recipes, options.devices, mfus, options.samples)
        figures: dict[str, Any] = {"estimates": found}
    else:
        tasks = make_tasks(options, recipes)
        rows = measure_in_turns(tasks, options.rounds)
        print_measured(console, tasks, rows)
        figures = {"date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    if options.json:
        write_json(options.json, figures)
    return 0


def load_recipes(options: argparse.Namespace) -> list[Recipe]:
    """Recipes of a command line.

    Raises:
        UserError: none, or one that is not known.
    """
    names = [name.strip() for name in (options.recipe or "").split(",") if name.strip()]
    if not names and not options.estimate:
        raise UserError("bench train needs --recipe NAME, for instance uhd_v1/finetune_vicuna7b")
    words = shlex.split(options.overrides)
    return [load_recipe(name, words, debug=options.debug) for name in names or DEFAULT_RECIPES]


def make_tasks(options: argparse.Namespace, recipes: Sequence[Recipe]) -> list[TrainTask]:
    """What a command line measures.

    Raises:
        UserError: a number that is none, or an unknown way to make batches.
    """
    counts = ("steps", "rounds", "batch", "accumulate", "layers", "hidden", "tower_layers")
    for name in (*counts, "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.warmup < 0:
        raise UserError(f"--warmup must not be negative, got {options.warmup}")
    cuts = Cuts(options.layers, options.hidden, options.tower_layers)
    return [
        TrainTask(
            recipe,
            batching,
            make_mix(options, recipe),
            options.steps,
            options.warmup,
            options.batch or int(recipe.trainer.arguments.get("per_device_train_batch_size") or 8),
            options.accumulate,
            cuts,
            options.threads,
        )
        for recipe in recipes
        for batching in batchings(options.compare, recipe)
    ]


def batchings(text: str | None, recipe: Recipe) -> list[str]:
    """Ways to make batches: those of ``--compare``, else the recipe's own.

    Raises:
        UserError: an unknown one, or one twice.
    """
    if text is None:
        if recipe.data.batching == "packed":
            return [PACKED]
        return [GROUPED if recipe.trainer.group_by_modality_length else PADDED]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BATCHINGS or names.count(name) > 1:
            raise UserError(
                f"--compare {text}: name some of {', '.join(BATCHINGS)}, each once, such as "
                "padded,packed"
            )
    return names


def make_mix(options: argparse.Namespace, recipe: Recipe) -> Mix:
    """Lengths of a recipe's stage with those of the command line.

    Raises:
        UserError: a number that is none.
    """
    mix = mix_of(recipe)
    given = {
        "text": options.text_tokens,
        "sigma": options.text_sigma,
        "text_only": options.text_only,
    }
    mix = dataclasses.replace(mix, **{k: v for k, v in given.items() if v is not None})
    if mix.text < 1 or mix.sigma < 0 or not 0 <= mix.text_only <= 1:
        raise UserError(
            "--text-tokens must be at least 1, --text-sigma at least 0, --text-only a share: got "
            f"{mix.text:g}, {mix.sigma:g}, {mix.text_only:g}"
        )
    return mix


def measure_in_turns(tasks: Sequence[TrainTask], rounds: int) -> list[dict[str, Any]]:
    """Measures every task so many times, in turns; of each the round with the shortest step.

    Raises:
        UserError: see `llava_uhd.bench.train_run.measure`.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in tasks]
    for _ in range(rounds):
        for place, task in enumerate(tasks):
            found[place].append(measure_alone(task))
    best = [max(each, key=lambda row: row["tokens_per_second"]) for each in found]
    for row, each in zip(best, found, strict=True):
        row["rounds"] = [turn["tokens_per_second"] for turn in each]
    return best


def print_measured(
    console: Console, tasks: Sequence[TrainTask], rows: Sequence[dict[str, Any]]
) -> None:
    """Prints what was measured on what, and the table."""
    start = rows[0]["record"]["starts"][-1]
    devices = {rank["name"] for rank in start["ranks"]}
    console.print(
        f"{date.today().isoformat()}, {len(start['ranks'])} x {', '.join(sorted(devices))} "
        f"({start['ranks'][0]['device']}, {start['ranks'][0]['threads']} CPU thread(s)), torch "
        f"{torch.__version__}; peak for the MFU: {start['peak']['source']}"
    )
    for task, row in zip(tasks, rows, strict=True):
        console.print(describe(task, row))
    title = f"{tasks[0].steps} steps after {tasks[0].warmup} of warm-up"
    print_table(console, title, COLUMNS, [_cells(row) for row in rows])
    for line in comparisons(rows):
        console.print(line)
    for described in dict.fromkeys(task.mix.described for task in tasks):
        console.print(f"lengths (an assumption): {described}")
    console.print(CONVENTION)
    console.print("step: median; speeds, MFU and parts: of all measured steps together")


def comparisons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each further way to make batches of a recipe, against its first."""
    lines, first = [], rows[0]
    for row in rows:
        if row["recipe"] != first["recipe"]:
            first = row
        if row is first:
            continue
        # One thread of a CPU: its own time says more on a machine that others use too.
        kind = "cpu_second" if "tokens_per_cpu_second" in row else "second"
        tokens, samples = (
            row[f"{name}_per_{kind}"] / first[f"{name}_per_{kind}"]
            for name in ("tokens", "samples")
        )
        lines.append(
            f"{row['recipe']}: {row['batching']} against {first['batching']}: {samples:.2f} times "
            f"the samples and {tokens:.2f} times the tokens per {kind.replace('cpu_', 'CPU ')}"
        )
    return lines


def describe(task: TrainTask, row: dict[str, Any]) -> str:
    """A model in a line, with what was cut from it."""
    cut = ""
    if task.cuts.any:
        parts = {k: v for k, v in dataclasses.asdict(task.cuts).items() if v is not None}
        named = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parts.items())
        cut = f"; CUT to {named}: figures are of the cut model, nothing is extrapolated"
    return (
        f"{row['recipe']}, {row['batching']}: {row['parameters'] / 1e6:,.1f}M parameters, "
        f"{row['learning'] / 1e6:,.1f}M learn, {row['layers']} layers of width {row['hidden']}, "
        f"{row['dtype']}; {task.batch} samples x {task.accumulated} passes per device{cut}"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    parts = row["parts"]
    both = {
        name: parts[name] + parts[f"backward_{name}"]
        for name in ("vision_tower", "projector", "language_model")
    }
    memory = row["peak_memory_gib"]
    return [
        f"{row['recipe']}, {row['batching']}",
        seconds(row["step_seconds_median"]),
        seconds(row["step_seconds_best"]),
        f"{row['samples_per_second']:.3g}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['padding']:.1%}",
        "-" if row["tflops_per_second"] is None else f"{row['tflops_per_second']:.3g}",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['data_wait']:.1%}",
        *(f"{value:.1%}" for value in both.values()),
        f"{parts['optimizer']:.1%}",
        "-" if memory is None else f"{memory:.2f} GiB",
    ]
