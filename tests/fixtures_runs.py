"""Training runs for tests: in this process or in one of their own, whole or broken off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_uhd.data.synthetic import embedded_split
from llava_uhd.train import __main__ as command
from llava_uhd.train.log import JsonLog, read_log
from llava_uhd.train.meter import CLOCK_KEYS

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("debug/pretrain", "debug/finetune")
# What may differ between two equal runs.
CLOCKS = (*CLOCK_KEYS, "train_runtime")

Train = Callable[..., Path]


def with_drawn_data(folder: Path) -> Path:
    """The folder, with the embedded data of debug runs drawn once for all of them."""
    for name in ("debug", "debug_mixed"):
        embedded_split(name, "pretrain", folder / "playground/data")
    return folder


def run_here(workplace: Path, recipe: str, output: str, *words: str) -> Path:
    """One run inside this process."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.chdir(workplace)
        given = [*words, "--trainer.output_dir", output, "--trainer.disable_tqdm", "true"]
        patched.setattr(sys, "argv", ["train", recipe, *given])
        command.main()
    return workplace / output


def start(workplace: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "llava_uhd.train", *words],
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_on_two(workplace: Path, *words: str) -> str:
    """The real command on two processes, with an end to every hang; what it printed."""
    launcher = ("-m", "llava_uhd.launch", "--standalone", "--nproc_per_node", "2")
    process = start(workplace, *words, launcher=launcher)
    try:
        printed, errors = process.communicate(timeout=420)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    # Warnings of libraries at each call would bury what the run says.
    assert errors.count("FutureWarning") < 10, errors[:3000]
    return printed


def steps(folder: Path) -> list[dict[str, Any]]:
    """The log without the final summary and without clocks."""
    entries = [entry for entry in read_log(folder) if "loss" in entry]
    return [{k: v for k, v in entry.items() if k not in CLOCKS} for entry in entries]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    assert steps(first) == steps(second)
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


# The debug model starts without a first stage.
FROM_NOTHING = ("--model.projector_file", "null")


class Broken(Exception):
    """Stands for whatever ends a run."""


def break_at(step: int, train: Train, *words: str) -> None:
    """Runs until the given step has been logged."""
    original = JsonLog.on_log

    def on_log(self: JsonLog, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        if given[1].global_step == step:
            raise Broken

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JsonLog, "on_log", on_log)
        with pytest.raises(Broken):
            train(*words)
