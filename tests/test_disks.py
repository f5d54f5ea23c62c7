"""Disks that refuse to take more: one line, nothing lost, and the run goes on as if unbroken."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_kills import Fault, Runs, assert_only_whole
from fixtures_kills import runs as runs  # (fixture)
from fixtures_runs import FROM_NOTHING, ROOT, Train, assert_same_run, break_at, run_here

from llava_uhd.errors import USER_ERROR_STATUS, UserError
from llava_uhd.train import log
from llava_uhd.train.saving import UNFINISHED, checkpoints

RECIPE = "debug/finetune"
# Two micro-batches a step, and samples that are drawn anew every epoch.
LONG = (
    *FROM_NOTHING, "--trainer.max_steps", "7", "--trainer.save_steps", "2",
    "--data.six_slice_probability", "0.5", "--trainer.save_total_limit", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """Seven steps of four samples: almost two epochs."""
    return run_here(workplace, RECIPE, "out/unbroken", *LONG)


# Bytes that a file may have: what learns has 632 kB, the optimizer twice as much.
LIMITS = {"weights": 300_000, "optimizer": 700_000}


@pytest.mark.slow
@pytest.mark.parametrize("file", LIMITS)
def test_a_full_disk(
    runs: Runs, train: Train, unbroken: Path, file: str
) -> None:  # fmt: skip
    """The system itself refuses to write on."""
    output = f"out/full_{file}"
    break_at(3, train, RECIPE, output, *LONG)
    folder = unbroken.parent / f"full_{file}"
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    fault = Fault(largest_file=LIMITS[file])
    assert runs.run(output, RECIPE, *LONG, fault=fault) == USER_ERROR_STATUS
    said = runs.said(output).splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in runs.said(output), runs.said(output)
    assert "cannot be written" in said and "checkpoint-2 is whole, start again" in said
    assert [number for number, _ in checkpoints(folder)] == [2]
    assert_only_whole(folder)
    assert not list(folder.glob(f"{UNFINISHED}/checkpoint-*"))
    assert_same_run(unbroken, train(RECIPE, output, *LONG))


def test_a_log_that_cannot_be_written(
    train: Train, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (RECIPE, "out/full_log", *LONG)
    original = log._append

    def append(folder: Path, entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            raise OSError(errno.ENOSPC, "?", str(folder / log.LOG_FILE))
        original(folder, entry)

    with monkeypatch.context() as patched:
        patched.setattr(log, "_append", append)
        told = r"log\.jsonl: No space left on device.*checkpoint-2 is whole"
        with pytest.raises(UserError, match=told):
            train(*words)
    assert_same_run(unbroken, train(*words))


def in_a_small_disk(command: str, size: str) -> list[str]:
    """A shell command that runs with ``out/small`` on a disk of its own."""
    script = f"mount -t tmpfs -o size={size} tmpfs out/small && {command}"
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]


@pytest.mark.slow
def test_a_disk_that_is_really_full(workplace: Path) -> None:
    (workplace / "out/small").mkdir(parents=True, exist_ok=True)
    possible = (
        shutil.which("unshare")
        and not subprocess.run(
            in_a_small_disk("true", "1m"), cwd=workplace, capture_output=True, check=False
        ).returncode
    )
    if not possible:
        pytest.skip("this system lets no one mount a disk")
    words = [RECIPE, *LONG, "--trainer.output_dir", "out/small", "--trainer.check_room", "false"]
    command = f"{sys.executable} -m llava_uhd.train {' '.join(words)}; echo $?; ls out/small"
    done = subprocess.run(
        in_a_small_disk(command, "3m"),
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "checkpoint-2 is whole" in done.stderr and "Traceback" not in done.stderr, done.stderr
    status, *names = done.stdout.splitlines()[-20:][done.stdout.splitlines()[-20:].index("2") :]
    assert status == "2"
    assert "checkpoint-2" in names and "checkpoint-4" not in names


@pytest.mark.parametrize("blocked", ["the output folder", "the place of checkpoints"])
def test_a_folder_that_cannot_be_written(train: Train, workplace: Path, blocked: str) -> None:
    if blocked == "the output folder":
        output = "/proc/nowhere"
    else:
        output = "out/blocked"
        (workplace / output).mkdir(parents=True)
        (workplace / output / "loss.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        train(RECIPE, output, *FROM_NOTHING, "--trainer.max_steps", "2")
