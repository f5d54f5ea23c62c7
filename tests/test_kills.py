"""Runs that are killed at any moment, also while they write, and go on as if nothing had been."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_kills import (
    COUNT_FILE,
    Fault,
    Runs,
    assert_only_whole,
    finished,
    random_fault,
    runs,  # noqa: F401  (fixture)
)
from fixtures_runs import FROM_NOTHING, assert_same_run, start, steps, weights
from safetensors.torch import load_file

from llava_uhd.checkpoint.manifest import MANIFEST_FILE, read_manifest
from llava_uhd.errors import STOPPED_STATUS, USER_ERROR_STATUS, UserError
from llava_uhd.train.elastic import fitting, seal_facts
from llava_uhd.train.saving import UNFINISHED, checkpoints, seal

RECIPE = "debug/finetune"
LONG = (
    *FROM_NOTHING, "--trainer.max_steps", "7", "--trainer.save_steps", "2",
    "--data.six_slice_probability", "0.5", "--trainer.save_total_limit", "2",
)  # fmt: skip
# One file is written by torch.save for the optimizer, the rates, and the random numbers each.
SAVES = 3


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> Path:  # noqa: F811
    """Seven steps, four checkpoints, a result."""
    assert runs.run("out/unbroken", RECIPE, *LONG) == 0, runs.said("out/unbroken")
    shutil.copy(runs.workplace / COUNT_FILE, runs.workplace / "out/unbroken" / COUNT_FILE)
    return runs.workplace / "out/unbroken"


def test_what_a_run_leaves(runs: Runs, unbroken: Path) -> None:  # noqa: F811
    assert [step for step, _ in checkpoints(unbroken)] == [6, 7]
    assert not (unbroken / UNFINISHED).exists()
    facts = json.loads((unbroken / "checkpoint-7/complete.json").read_text())
    assert set(facts["files"]) == {"optimizer.pt", "rng_state.pth", "scheduler.pt",
                                   "trainable.safetensors", "trainer_state.json"}  # fmt: skip


# --- at chosen moments ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("save", [2 * SAVES - 2, 2 * SAVES])
def test_a_kill_in_the_middle_of_a_file(
    runs: Runs, unbroken: Path, save: int  # noqa: F811
) -> None:  # fmt: skip
    """Half an optimizer state, half the random numbers: the checkpoint before stays the newest."""
    output, folder = f"out/half_{save}", runs.workplace / f"out/half_{save}"
    assert runs.run(output, RECIPE, *LONG, fault=Fault(torch_save=save)) == -signal.SIGKILL
    assert (folder / UNFINISHED / "checkpoint-4").is_dir()
    assert [step for step, _ in checkpoints(folder)] == [2]
    assert_only_whole(folder)
    assert runs.run(output, RECIPE, *LONG) == 0, runs.said(output)
    assert "Going on from out" in runs.said(output) and "checkpoint-2" in runs.said(output)
    assert_same_run(unbroken, folder)


@pytest.mark.slow
def test_a_kill_while_the_result_is_moved(runs: Runs, unbroken: Path) -> None:  # noqa: F811
    """The last change of a file that brings the model into the output folder."""
    output, folder = "out/late", runs.workplace / "out/late"
    fault = Fault(before="model.safetensors")
    assert runs.run(output, RECIPE, *LONG, fault=fault) == -signal.SIGKILL
    assert (folder / "tokenizer.json").is_file() and not (folder / "model.safetensors").exists()
    assert (folder / UNFINISHED / "result/model.safetensors").is_file()
    assert not (folder / MANIFEST_FILE).exists()
    assert runs.run(output, RECIPE, *LONG) == 0, runs.said(output)
    assert "checkpoint-7" in runs.said(output) and read_manifest(folder)["finished"]
    assert_same_run(unbroken, folder)


# --- at random moments ----------------------------------------------------------------------------


def killed_at_random(
    runs: Runs, unbroken: Path, name: str, draw: random.Random  # noqa: F811
) -> dict[str, object]:  # fmt: skip
    """One kill at a random moment, then the same command again.

    Returns:
        What was met: where the kill fell, and what lay there.
    """
    output, folder = f"out/{name}", runs.workplace / "out" / name
    events = int((unbroken / COUNT_FILE).read_text())
    fault = random_fault(draw, events, seconds=7.0, saves=4 * SAVES)
    status = runs.run(output, RECIPE, *LONG, fault=fault)
    assert status in (0, -signal.SIGKILL), runs.said(output)  # a late one may come too late
    done = bool(folder.is_dir() and read_manifest(folder).get("finished"))
    found = {
        "broke": status != 0 and not done,  # not one that came behind the last file
        "writing": (folder / UNFINISHED).exists(),
        "checkpoints": [step for step, _ in checkpoints(folder)],
        "fault": {key: value for key, value in vars(fault).items() if value},
    }
    assert_only_whole(folder)
    assert runs.run(output, RECIPE, *LONG) == 0, runs.said(output)
    assert read_manifest(folder)["finished"] and not (folder / UNFINISHED).exists()
    assert_same_run(unbroken, folder)
    assert "Traceback" not in runs.said(output)
    return found


@pytest.mark.slow
def test_kills_at_random_moments(runs: Runs, unbroken: Path) -> None:  # noqa: F811
    draw = random.Random(1)
    found = [killed_at_random(runs, unbroken, f"random_{n}", draw) for n in range(3)]
    assert any(each["broke"] for each in found)


@pytest.mark.full
def test_twenty_kills(runs: Runs, unbroken: Path) -> None:  # noqa: F811
    draw, found = random.Random(2), []
    while sum(bool(each["broke"]) for each in found) < 20:
        found.append(killed_at_random(runs, unbroken, f"one_of_20_{len(found)}", draw))
    broken = [each for each in found if each["broke"]]
    writing = sum(bool(each["writing"]) for each in broken)
    for each in found:
        print(each)
    print(f"{len(broken)} kills, {writing} of them while files were written aside")
    assert writing >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "lora"])
def test_kills_in_other_stages(runs: Runs, kind: str) -> None:  # noqa: F811
    """Every kind of stage goes on with optimizer, order and random numbers; killed twice."""
    words = {
        "pretrain": ("debug/pretrain", "--trainer.max_steps", "5"),
        "lora": (RECIPE, *LONG, "--lora.r", "4", "--lora.dropout", "0.1"),
    }[kind]
    whole, broken = (f"out/{kind}_{end}" for end in ("whole", "broken"))
    assert runs.run(whole, *words) == 0, runs.said(whole)
    for fault in (Fault(torch_save=SAVES + 1), Fault(event=1, in_checkpoint=1)):
        assert runs.run(broken, *words, fault=fault) == -signal.SIGKILL, runs.said(broken)
        assert_only_whole(runs.workplace / broken)
    assert runs.run(broken, *words) == 0, runs.said(broken)
    first, second = runs.workplace / whole, runs.workplace / broken
    assert steps(first) == steps(second)
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in second.glob("*.safetensors"))
    for name in names:
        before, after = load_file(first / name), load_file(second / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


# --- several processes ----------------------------------------------------------------------------

TWO = (
    RECIPE, *FROM_NOTHING, "--trainer.max_steps", "12", "--trainer.save_steps", "3",
    "--trainer.per_device_train_batch_size", "1",
    # Groups of parameters that differ in all that they can differ in.
    "--stage.learn.projector", "1e-4", "--trainer.weight_decay", "0.1",
)  # fmt: skip
ZERO = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra 'deepspeed'"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["null", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)]
)
def test_several_processes(runs: Runs, engine: str) -> None:  # noqa: F811
    """One is killed; one is told to stop; another number of them goes on: the losses stay."""
    words = (*TWO, "--deepspeed", engine)
    outputs = [f"out/{engine}", f"out/{engine}_broken"]
    whole, broken = (runs.workplace / output for output in outputs)
    assert [finished(each) for each in runs.begin_ranks(2, outputs[0], *words)] == [0, 0]
    assert len(steps(whole)) == 12
    # SIGKILL to one: the other ends by itself.
    ranks = runs.begin_ranks(2, outputs[1], *words, fault=Fault(signal="SIGKILL", step=4))
    assert finished(ranks[1]) == -signal.SIGKILL
    assert finished(ranks[0], 60) not in (0, -signal.SIGKILL)
    assert [step for step, _ in checkpoints(broken)] == [3]
    assert_only_whole(broken)
    # SIGTERM to one: both save and leave.
    ranks = runs.begin_ranks(2, outputs[1], *words, fault=Fault(signal="SIGTERM", step=7))
    assert [finished(each) for each in ranks] == [STOPPED_STATUS] * 2, runs.said(outputs[1])
    done, path = checkpoints(broken)[-1]
    assert json.loads((path / "complete.json").read_text())["ranks"] == 2
    assert done == 8
    assert [e["loss"] for e in steps(broken)] == [e["loss"] for e in steps(whole)[:done]]
    # Others take over: the global batch, its order, its losses and the rates are the same.
    if engine == "null":
        assert runs.run(outputs[1], *words) == 0, runs.said(outputs[1])
    else:
        assert runs.run(outputs[1], *words) == USER_ERROR_STATUS
        assert "was written with DeepSpeed on 2 processes" in runs.said(outputs[1])
        ranks = runs.begin_ranks(4, outputs[1], *words)
        assert [finished(each) for each in ranks] == [0] * 4, runs.said(outputs[1])
    assert not (broken / UNFINISHED).exists()
    for ours, theirs in zip(steps(broken), steps(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["learning_rate"] == theirs["learning_rate"]
    after, expected = weights(broken), weights(whole)
    largest = max(float((after[name] - expected[name]).abs().max()) for name in expected)
    assert largest < 1e-5, largest


class Stub:
    """A trainer as far as going on looks at it."""

    is_deepspeed_enabled = is_fsdp_enabled = False

    def __init__(self, **args: int) -> None:
        self.args = SimpleNamespace(**args)


def test_other_engines_and_batches_are_refused(tmp_path: Path) -> None:
    def trainer(ranks: int, batch: int = 2, accumulated: int = 1) -> Any:
        return Stub(
            world_size=ranks,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )

    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    seal(folder, step=3, **seal_facts(trainer(4)))
    assert fitting(trainer(4), folder) == fitting(trainer(1, 4, 2), folder) == folder
    with pytest.raises(UserError, match=r"global batch of 8, this run has 4: start it on 4 proc"):
        fitting(trainer(2), folder)
    sharded = trainer(4)
    sharded.is_fsdp_enabled = True
    assert fitting(sharded, folder) == folder  # FSDP reads what was written without it
    zero = trainer(4)
    zero.is_deepspeed_enabled = True
    with pytest.raises(
        UserError, match=r"written without .* on 4 processes, this run is with DeepSpeed"
    ):
        fitting(zero, folder)


@pytest.mark.slow
def test_the_launcher_passes_signals_on(runs: Runs) -> None:  # noqa: F811
    """The real command: its processes write a checkpoint, it leaves with their status, briefly."""
    folder = runs.workplace / "out/launched"
    launcher = ("-m", "llava_uhd.launch", "--standalone", "--nproc_per_node", "2")
    words = (*TWO, "--trainer.max_steps", "400", "--trainer.save_steps", "400")
    process = start(
        runs.workplace, *words, "--trainer.output_dir", "out/launched", launcher=launcher
    )
    try:
        deadline = time.monotonic() + 240
        while len(steps(folder)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == STOPPED_STATUS, errors
    assert "Traceback" not in errors and "exitcode" not in errors, errors
    assert "stopped by SIGTERM" in " ".join(output.split())
    assert len(checkpoints(folder)) == 1
    assert_only_whole(folder)
