"""All stages of a recipe set in a row, and the evaluation of the result.

::

    python -m llava_uhd.train.sequence SET [--evaluate [TASKS]] [--section.key value ...]

SET is FOLDER/NAME for the recipes FOLDER/pretrain_NAME and FOLDER/finetune_NAME, or a folder that
holds recipes called pretrain and finetune; onevision/NAME has the four stages stage1, stage1_5,
stage2_si and stage2_ov. A name may have - for _. Options go to all stages; --pretrain.OPTION,
--stage1.OPTION, ... and --evaluate.OPTION to one of them; --output_dir DIR to the last stage, the
others then write DIR-pretrain, DIR-stage1, ... A stage that is finished is not trained again, and
one that was broken off goes on from its last checkpoint: after an interruption repeat the command.
--dry-run prints what would be run.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError, command
from llava_uhd.registry import nearest_hint
from llava_uhd.train.output import is_finished
from llava_uhd.train.signals import SIGNALS

# Stages of a set, in their order: LLaVA-1.5 and LLaVA-UHD; LLaVA-OneVision.
SEQUENCES = (("pretrain", "finetune"), ("stage1", "stage1_5", "stage2_si", "stage2_ov"))
STAGES = tuple(stage for sequence in SEQUENCES for stage in sequence)
EVALUATE = "evaluate"
DRY_RUN = "dry-run"
OUTPUT_OPTIONS = ("output_dir", "trainer.output_dir")

# An option with its values: ["--data.path", "a.json", "b.json"].
Option = list[str]


@dataclass
class Step:
    """One stage of the sequence.

    Attributes:
        stage: one of `STAGES`.
        name: of the recipe.
        options: of the command line.
    """

    stage: str
    name: str
    options: list[str]

    @property
    def recipe(self) -> Recipe:
        """With the options on top."""
        return load_recipe(self.name, self.options)


@dataclass
class Plan:
    """What a command asks for.

    Attributes:
        steps: stages in their order.
        evaluate: words for the evaluation, None without one.
        dry: print the commands instead of running them.
    """

    steps: list[Step] = field(default_factory=list)
    evaluate: list[str] | None = None
    dry: bool = False


def recipe_sets() -> dict[str, tuple[str, ...]]:
    """Every set and the recipes of its stages.

    Example: ``"uhd_v2/vicuna7b"`` has ``uhd_v2/pretrain_vicuna7b`` and
    ``uhd_v2/finetune_vicuna7b``; ``"debug"`` has ``debug/pretrain`` and ``debug/finetune``.
    """
    names = set(list_recipes())
    sets = {}
    for last in sorted(names):
        folder, _, recipe = last.rpartition("/")
        for stages in SEQUENCES:
            if recipe == stages[-1]:
                sets[folder] = tuple(f"{folder}/{stage}" for stage in stages)
            elif recipe.startswith(f"{stages[-1]}_"):
                own = recipe.removeprefix(f"{stages[-1]}_")
                sets[f"{folder}/{own}"] = tuple(f"{folder}/{stage}_{own}" for stage in stages)
    return {name: recipes for name, recipes in sets.items() if names.issuperset(recipes)}


def stages_of(recipes: Sequence[str]) -> tuple[str, ...]:
    """Stages of the recipes of a set, one of `SEQUENCES`."""
    first = recipes[0].rpartition("/")[2]
    return next(stages for stages in SEQUENCES if f"{first}_".startswith(f"{stages[0]}_"))


def split_options(words: Sequence[str]) -> list[Option]:
    """A command line as options, each with its values.

    Raises:
        UserError: a word that belongs to no option.
    """
    options: list[Option] = []
    for word in words:
        if word.startswith("--"):
            options.append([word])
        elif not options:
            raise UserError(f"'{word}' belongs to no option: options look like --section.key value")
        else:
            options[-1].append(word)
    return options


def make_plan(name: str, words: Sequence[str]) -> Plan:
    """What to run for a set and the options behind it.

    Raises:
        UserError: an unknown set or option.
    """
    sets = recipe_sets()
    if name not in sets and name.replace("-", "_") in sets:
        name = name.replace("-", "_")
    if name not in sets:
        hint = nearest_hint(name, list(sets))
        raise UserError(f"unknown recipe set '{name}'{hint} (known: {', '.join(sets)})")
    stages = stages_of(sets[name])
    plan = Plan([Step(stage, recipe, []) for stage, recipe in zip(stages, sets[name], strict=True)])
    own: list[str] = []  # of the evaluation
    for flag, *values in split_options(words):
        option, equals, value = flag[2:].partition("=")
        values = [value, *values] if equals else values
        head, _, rest = option.partition(".")
        if option == DRY_RUN and not values:
            plan.dry = True
        elif option == EVALUATE:
            plan.evaluate = ["--tasks", *values] if values else plan.evaluate or []
        elif head == EVALUATE and rest:
            own += [f"--{rest}", *values]
        elif option in OUTPUT_OPTIONS and len(values) == 1:
            for step in plan.steps:
                ending = "" if step is plan.steps[-1] else f"-{step.stage}"
                step.options += ["--trainer.output_dir", values[0].rstrip("/") + ending]
        else:
            for step in plan.steps:
                if head == step.stage and rest:
                    step.options += [f"--{rest}", *values]
                elif head not in stages:
                    step.options += [f"--{option}", *values]
    if own and plan.evaluate is None:
        raise UserError(f"{own[0].replace('--', f'--{EVALUATE}.')} needs --{EVALUATE}")
    link(plan)
    if plan.evaluate is not None:
        plan.evaluate = evaluation(plan, [*plan.evaluate, *own])
    return plan


def link(plan: Plan) -> None:
    """Lets each stage read what the one before writes, unless its options name another place.

    The recipes of a set do that already; options such as --debug move the folders.
    """
    for first, second in itertools.pairwise(plan.steps):
        written, recipe = first.recipe.output_dir, second.recipe
        model = recipe.model
        named = {"--model.checkpoint", "--model.projector_file", "--pretrain_mm_mlp_adapter"}
        if named.intersection(second.options) or written in (
            model.checkpoint,
            model.projector_file,
        ):
            continue
        # What a recipe over a checkpoint reads is a checkpoint also where --debug left it out.
        whole = load_recipe(second.name).model.checkpoint is not None
        second.options += [f"--model.{'checkpoint' if whole else 'projector_file'}", written]


def evaluation(plan: Plan, words: list[str]) -> list[str]:
    """Words for the evaluation: a model of embedded data gets the questions drawn with them."""
    embedded = plan.steps[-1].recipe.data.embedded
    if embedded is None:
        return words
    if "--tasks" not in words:
        words = ["--tasks", "synthetic", *words]
    alone = words[words.index("--tasks") + 1 :][:1] == ["synthetic"]
    if alone and "--data-root" not in words:
        words = [*words, "--data-root", f"playground/data/{embedded}"]
    return words


def run(plan: Plan, scripts: Path) -> int:
    """Trains what is not finished, then evaluates; stops at the first failure.

    Args:
        plan: from `make_plan`.
        scripts: folder of ``pretrain.sh``, ``finetune.sh`` and ``eval.sh``.

    Returns:
        Status of the last command.
    """
    recipes = [step.recipe for step in plan.steps]
    told, last = ("# ", [f"--{DRY_RUN}"]) if plan.dry else ("", [])
    finished = [place for place, recipe in enumerate(recipes) if is_finished(recipe)]
    for place, (step, recipe) in enumerate(zip(plan.steps, recipes, strict=True)):
        if finished and place <= finished[-1]:
            # A finished later stage needs the earlier ones no more, even if they were removed.
            print(
                f"{told}{step.name}: finished ({recipe.output_dir}), not trained again", flush=True
            )
            continue
        print(f"{told}{step.name}: training, into {recipe.output_dir}", flush=True)
        script = "pretrain.sh" if step is plan.steps[0] else "finetune.sh"
        status = call(scripts / script, step.name, *step.options, *last)
        if status:
            return status
    if plan.evaluate is None:
        return 0
    print(f"{told}evaluating {recipes[-1].output_dir}", flush=True)
    return call(scripts / "eval.sh", recipes[-1].output_dir, *plan.evaluate, *last)


def call(script: Path, *words: str) -> int:
    """Runs a script; its status, or 128 and the number of the signal that ended it.

    Signals are passed on to it, which may take its time to end.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Before it starts: a signal that comes a moment later must not leave it alone.
    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        process = subprocess.Popen(["sh", str(script), *words])
        for number in early:
            process.send_signal(number)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def main() -> int:
    """Runs the command in the repository, from which all paths count."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"}.intersection(words):
        print((__doc__ or "").strip())
        print("\nSets: " + ", ".join(recipe_sets()))
        return 0
    root = Path(__file__).resolve().parents[2]
    scripts = root / "scripts"
    if not (scripts / "pretrain.sh").is_file():
        raise UserError(f"{scripts} does not exist: run from a clone of the repository")
    os.chdir(root)
    # What a flag does not do is told by the stages themselves.
    logging.getLogger("llava_uhd").setLevel(logging.ERROR)
    if words[0].startswith("-"):
        raise UserError(
            f"which recipe set? {words[0]} is an option; known: {', '.join(recipe_sets())}"
        )
    return run(make_plan(words[0], words[1:]), scripts)


if __name__ == "__main__":
    command(main)
