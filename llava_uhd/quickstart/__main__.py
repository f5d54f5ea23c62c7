"""``python -m llava_uhd.quickstart``: draw data, pretrain, finetune, evaluate, report.

Every step is a command of its own that a user could type, runs in its own process, and goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.errors import UserError, command
from llava_uhd.quickstart.report import Arm, write_report
from llava_uhd.quickstart.systems import SYSTEMS, Reading, System

console = Console(highlight=False)

METRICS = {"sign_exact": "sign exact", "digit_accuracy": "digits", "mark_exact": "mark exact"}

# What --short changes: every step runs, nothing is learned.
SHORT = [
    *("--trainer.max_steps", "6", "--trainer.warmup_steps", "1"),
    *("--trainer.save_steps", "3", "--trainer.logging_steps", "1"),
]


@dataclass
class Run:
    """One call of the quickstart.

    Attributes:
        system: what is shown.
        root: folder of the checkpoints.
        short: few steps and questions.
        seed: of both training stages; None keeps the recipes'.
    """

    system: System
    root: Path
    short: bool
    seed: int | None

    @property
    def vdim(self) -> Path:
        """Output of the upsampler's pre-training."""
        return self.root / self.system.vdim_folder

    @property
    def pretrained(self) -> Path:
        """Output of the first stage."""
        return self.root / self.system.pretrain_folder

    @property
    def times_file(self) -> Path:
        """Seconds of the steps done so far."""
        return self.root / f"{self.system.main.folder}.times.json"

    def training_words(self) -> list[str]:
        """Overrides that every training command gets."""
        words = SHORT if self.short else []
        return words if self.seed is None else [*words, "--trainer.seed", str(self.seed)]


def main() -> None:
    """Command line, see the module's first line."""
    run, compare = parse()
    started = time.perf_counter()
    system = run.system
    words: list[str] = []
    if system.vdim is not None:
        title = "VDIM: the upsampler learns to add detail to feature maps"
        step(run, "vdim", title, train_command(run, system.vdim, run.vdim))
        words = ["--model.upsampler_file", str(run.vdim)]
    title = "Pretrain: projector and the small language model learn to read single tiles"
    step(run, "pretrain", title, train_command(run, system.pretrain, run.pretrained, words))
    for reading in (system.main, *(system.controls if compare else ())):
        teach(run, reading)
    readings = (system.main, *system.controls)
    evaluated = [
        Arm(run.root / each.folder, each.title, each.description)
        for each in readings
        if _is_evaluated(run.root / each.folder)
    ]
    folder = run.root / system.main.folder
    vdim = run.vdim if system.vdim is not None else None
    report = write_report(folder, evaluated, run.pretrained, _times(run), vdim)
    show_scores(evaluated)
    conclude(folder, report, (time.perf_counter() - started) / 60)


def teach(run: Run, reading: Reading) -> None:
    """Second stage and evaluation of one way to read."""
    folder = run.root / reading.folder
    words = ["--model.checkpoint", str(run.pretrained)]
    step(
        run,
        f"finetune {reading.folder}",
        f"Finetune: {reading.title}",
        train_command(run, reading.recipe, folder, words),
    )
    evaluate = ["llava_uhd.eval", "run", str(folder), "--tasks", "synthetic"]
    limit = ["--limit", "8"] if run.short else []
    step(run, f"eval {reading.folder}", f"Evaluate: {reading.title}", [*evaluate, *limit])


def parse() -> tuple[Run, bool]:
    """Reads the command line: the run, and whether the control arms are trained too.

    Raises:
        UserError: unknown system, or one without control arms and ``--compare``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "system", nargs="?", default="uhd_v1", help=f"one of {', '.join(SYSTEMS.names())}"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also train and evaluate the control arms"
    )
    parser.add_argument("--short", action="store_true", help="every step, but hardly any training")
    parser.add_argument("--output-dir", type=Path, default=Path("checkpoints"))
    parser.add_argument("--seed", type=int, help="seed of the training; default: the recipes'")
    options = parser.parse_args()
    system = SYSTEMS.get(options.system)
    if options.compare and not system.controls:
        raise UserError(
            f"--compare: {options.system} has no control arms; uhd_v1 and llavolta have"
        )
    return Run(system, options.output_dir, options.short, options.seed), options.compare


def train_command(run: Run, recipe: str, folder: Path, words: list[str] | None = None) -> list[str]:
    """Module and arguments of one training stage."""
    output = ["--trainer.output_dir", str(folder)]
    module = "llava_uhd.train.vdim" if recipe == run.system.vdim else "llava_uhd.train"
    return [module, recipe, *output, *(words or []), *run.training_words()]


def step(run: Run, name: str, title: str, words: list[str]) -> None:
    """Runs one command in its own process and records how long it took.

    Raises:
        UserError: the command failed; its own message stands above.
    """
    console.rule(f"[bold]{title}")
    console.print(f"python -m {' '.join(words)}", style="dim", soft_wrap=True)
    started = time.perf_counter()
    status = subprocess.run(
        [sys.executable, "-m", *words], check=False, env=environment()
    ).returncode
    if status:
        raise UserError(
            f"'python -m {' '.join(words)}' ended with status {status}: see its message above; "
            "the quickstart goes on from there when it is started again"
        )
    seconds = time.perf_counter() - started
    times = _times(run)
    # A step that had been done before takes a moment: its first time is the one worth keeping.
    times[name] = max(seconds, times.get(name, 0.0))
    run.root.mkdir(parents=True, exist_ok=True)
    write_whole(run.times_file, json.dumps(times, indent=2) + "\n")


def environment() -> dict[str, str]:
    """Environment of the steps: waiting threads sleep.

    By default they spin, and on a machine that does other work as well the steps then take several
    times as long.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **os.environ}


def _times(run: Run) -> dict[str, float]:
    """Seconds of the steps done so far."""
    path = run.times_file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_evaluated(folder: Path) -> bool:
    return (folder / "eval" / "synthetic" / "scores.json").is_file()


def show_scores(arms: list[Arm]) -> None:
    """Prints one row per evaluated model."""
    table = Table(title="Held-out pictures", title_justify="left")
    table.add_column("how pictures are read")
    for heading in METRICS.values():
        table.add_column(heading, justify="right")
    for arm in arms:
        scores = arm.scores
        row = [f"{scores[name]:.3f}" if name in scores else "" for name in METRICS]
        table.add_row(arm.title, *row)
    console.print(table)


def conclude(folder: Path, report: Path, minutes: float) -> None:
    """Says where everything is and how to talk to the model."""
    console.rule("[bold]Done")
    console.print(f"{minutes:.1f} minutes. Report with pictures: {report}", soft_wrap=True)
    picture = Path("playground/data/quickstart/images/eval/000000.png")
    console.print("Talk to the model:", soft_wrap=True)
    console.print(
        f"  python -m llava_uhd.serve.cli --model-path {folder} --image-file {picture}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    command(main)
