"""Numbers that are none, signals: the run ends in order and goes on as if unbroken."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_kills import Fault, Runs, assert_only_whole
from fixtures_kills import runs as runs  # (fixture)
from fixtures_runs import FROM_NOTHING, Train, assert_same_run, run_here, steps
from torch import nn
from transformers import Trainer

from llava_uhd.errors import STOPPED_STATUS, UserError
from llava_uhd.train import sequence
from llava_uhd.train import signals as train_signals
from llava_uhd.train.diagnostics import FOLDER, batches_of_step
from llava_uhd.train.guarded import FLOAT16_PATIENCE, GuardedTrainer
from llava_uhd.train.saving import checkpoints
from llava_uhd.train.signals import QuietWorker, StopOnSignal
from llava_uhd.train.trainer import StageTrainer

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


# --- numbers that are none ------------------------------------------------------------------------


class Watched:
    """What a run does in the step that goes wrong, and the trainer that does it."""

    def __init__(self) -> None:
        self.trainer: StageTrainer | None = None
        self.inputs: list[torch.Tensor] = []
        self.before: dict[str, torch.Tensor] = {}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Multiplies the loss of one micro-batch, or its gradients, as told."""

    def spoil(step: int, loss: float = 1.0, gradient: float = 1.0, micro: int = 0) -> Watched:
        watched = Watched()
        original, count = StageTrainer.compute_loss, []

        def compute_loss(self: StageTrainer, model: nn.Module, inputs: Any, **named: Any) -> Any:
            found = original(self, model, inputs, **named)
            if self.state.global_step != step:
                return found
            if not count:
                weights = self.model.state_dict().items()
                watched.before = {name: tensor.clone() for name, tensor in weights}
            count.append(None)
            watched.trainer = self
            watched.inputs.append(inputs["input_ids"])
            if len(count) - 1 != micro:
                return found
            spoiled = found + found.detach() * (loss - 1)
            spoiled.register_hook(lambda values: values * gradient)
            return spoiled

        monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss)
        return watched

    return spoil


def bundle(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of a bundle and what the first process adds to it."""
    place = folder / FOLDER / f"step-{step}"
    names = {path.name for path in place.iterdir()}
    assert names == {"report.json", "rank-0.json", "recipe.yaml", "rng_state.pth"}
    assert sum(path.stat().st_size for path in place.iterdir()) < 100_000
    report, own = (
        json.loads((place / f"{name}.json").read_text()) for name in ("report", "rank-0")
    )
    assert report["step"] == step and report["ranks"] == 1 and report["versions"]["torch"]
    return report, own


@pytest.mark.parametrize("step", [4, 7])
def test_a_loss_that_is_no_number(
    train: Train, unbroken: Path, spoil: Callable[..., Watched], step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The step is not taken, nothing of it is written, the samples are named."""
    words = (RECIPE, f"out/nan_{step}", *LONG, "--trainer.per_device_train_batch_size", "2")
    watched = spoil(step - 1, loss=math.nan, gradient=math.nan, micro=1)
    last = {4: 2, 7: 6}[step]
    told = rf"^step {step}: the loss is nan: .*diagnostics/step-{step} names.*checkpoint-{last} is"
    with pytest.raises(UserError, match=told):
        train(*words)
    trainer = watched.trainer
    assert trainer is not None
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, watched.before[name]), name
    folder = Path(words[1]).name
    folder = unbroken.parent / folder
    assert [number for number, _ in checkpoints(folder)] == {4: [2], 7: [4, 6]}[step]
    assert_only_whole(folder)
    report, own = bundle(folder, step)
    assert report["last_checkpoint"] == f"checkpoint-{last}" and report["log"]
    assert report["reason"] == "the loss is nan"
    assert report["not_finite_parameters"] > 0 and math.isnan(report["gradient_norm"])
    micro = own["micro_batches"]
    assert len(micro) == 2 and math.isfinite(micro[0]["loss"]) and math.isnan(micro[1]["loss"])
    monkeypatch.chdir(unbroken.parents[1])  # its pictures lie below
    samples = trainer.train_dataset
    for entry, ids in zip(micro, watched.inputs, strict=True):
        assert len(entry["samples"]) == len(ids) == 2
        for index, where, row in zip(entry["samples"], entry["where"], ids, strict=True):
            expected = samples[index]["input_ids"]
            assert torch.equal(row[: len(expected)], expected)
            assert repr(samples.records[index].id) in where
    monkeypatch.undo()
    assert_same_run(unbroken, train(*words))


def test_samples_of_a_packed_step_are_named(
    train: Train,
    unbroken: Path,
    spoil: Callable[..., Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = spoil(5, loss=math.nan, gradient=math.nan, micro=1)
    words = (*FROM_NOTHING, "--trainer.max_steps", "7", "--data.batching", "packed",
             "--trainer.group_by_modality_length", "false")  # fmt: skip
    with pytest.raises(UserError, match=r"^step 6: the loss is nan: .*diagnostics/step-6 names"):
        train(RECIPE, "out/nan_packed", *words)
    assert watched.trainer is not None
    _, own = bundle(unbroken.parent / "nan_packed", 6)
    monkeypatch.chdir(unbroken.parents[1])
    samples = watched.trainer.train_dataset.samples
    assert len(own["micro_batches"]) == len(watched.inputs) > 1
    for entry, ids in zip(own["micro_batches"], watched.inputs, strict=True):
        rows = [samples[index]["input_ids"] for index in entry["samples"]]
        assert torch.equal(torch.cat(rows), ids[0])
        assert len(entry["where"]) == len(rows)


def test_gradients_that_are_no_numbers(train: Train, spoil: Callable[..., Watched]) -> None:
    """The loss is a number, its gradients are not; there is no checkpoint yet."""
    watched = spoil(1, gradient=math.inf)
    told = r"^step 2: the gradient norm is (inf|nan): .* there is no checkpoint yet"
    with pytest.raises(UserError, match=told):
        train(RECIPE, "out/inf", *LONG)
    assert watched.trainer is not None
    for name, tensor in watched.trainer.model.state_dict().items():
        assert torch.equal(tensor, watched.before[name]), name


def test_gradients_that_explode(
    train: Train, unbroken: Path, spoil: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = [entry["grad_norm"] for entry in steps(unbroken)]
    bound = 2 * max(norms)
    words = (RECIPE, "out/explosion", *LONG)
    spoil(4, gradient=1000.0)
    given = ("--trainer.max_grad_norm_stop", str(bound))
    with pytest.raises(UserError, match=r"step 5: the gradient norm is .*max_grad_norm_stop"):
        train(*words, *given)
    report, _ = bundle(unbroken.parent / "explosion", 5)
    parts = report["gradient_norms"]
    assert set(parts) == {"projector", "language_model"} and report["not_finite"] == []
    total = math.sqrt(sum(norm * norm for norm in parts.values()))
    assert total == pytest.approx(report["gradient_norm"], rel=1e-5) and total > bound
    # The bound is no part of what is computed: a run goes on without it.
    monkeypatch.undo()
    assert_same_run(unbroken, train(*words))


def test_a_loss_that_only_the_log_sees(
    train: Train, unbroken: Path, spoil: Callable[..., Watched]
) -> None:
    """A value without effect on the gradients: no checkpoint is written with it."""
    spoil(2, loss=math.nan, gradient=1.0)
    words = (RECIPE, "out/logged", *LONG, "--trainer.logging_steps", "10")
    with pytest.raises(UserError, match=r"^step 4: the loss is nan: .*checkpoint-2 is whole"):
        train(*words)
    assert [number for number, _ in checkpoints(unbroken.parent / "logged")] == [2]


def test_clipping_is_the_librarys(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, for gradients above and below the bound."""
    own, seen = GuardedTrainer._clip_grad_norm, []

    def both(self: GuardedTrainer, model: nn.Module) -> Any:
        found = [p for p in model.parameters() if p.grad is not None]
        before = [p.grad.clone() for p in found]
        for bound in (0.1, 1e6):
            results = []
            for clip in (own, Trainer._clip_grad_norm):
                for parameter, gradient in zip(found, before, strict=True):
                    parameter.grad.copy_(gradient)
                with monkeypatch.context() as patched:
                    patched.setattr(self.args, "max_grad_norm", bound)
                    results.append((clip(self, model), [p.grad.clone() for p in found]))
            (norm, ours), (other, theirs) = results
            assert torch.equal(norm, other)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        seen.append(float(norm))
        return norm

    monkeypatch.setattr(GuardedTrainer, "_clip_grad_norm", both)
    train(RECIPE, "out/clipped", *FROM_NOTHING, "--trainer.max_steps", "1")
    assert len(seen) == 1


def test_float16_has_patience() -> None:
    """Overflows are how its scale is found; only a row of them is the end."""

    class Half:
        class args:
            fp16 = True

        class recipe:
            class trainer:
                max_grad_norm_stop = None

        step_losses: list[torch.Tensor] = []
        _overflows = 0
        told: list[str] = []

        def give_up(self, what: str, facts: dict[str, Any]) -> None:
            self.told.append(what)

    half = Half()
    for _ in range(3):
        for _ in range(FLOAT16_PATIENCE - 1):
            GuardedTrainer.check_norm(half, math.inf)  # type: ignore[arg-type]
        GuardedTrainer.check_norm(half, torch.tensor(2.0))  # type: ignore[arg-type]
    assert half.told == []
    for _ in range(FLOAT16_PATIENCE):
        GuardedTrainer.check_norm(half, math.inf)  # type: ignore[arg-type]
    assert half.told == ["the gradient norm is inf"]


def test_processes_take_turns() -> None:
    def batches() -> Iterator[list[int]]:
        return iter([[number] for number in range(100)])

    assert batches_of_step(batches(), 3, 1, 1, 2, 1) == [[7]]
    assert batches_of_step(batches(), 2, 3, 3, 2, 0) == [[12], [14], [16]]
    # The last step of an epoch may be shorter.
    assert batches_of_step(batches(), 2, 1, 3, 2, 1) == [[13]]


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [("SIGTERM", "fork"), ("SIGUSR1", "fork"), ("SIGINT", "fork"), ("SIGTERM", "forkserver")],
)
def test_a_signal_saves_and_leaves(
    runs: Runs, train: Train, unbroken: Path, name: str, workers: str
) -> None:  # fmt: skip
    """Sent to all processes of the run, as a scheduler does, the data loader's worker included."""
    output, folder = f"out/{name}_{workers}", unbroken.parent / f"{name}_{workers}"
    words = (RECIPE, *LONG, "--trainer.save_steps", "5", "--trainer.dataloader_num_workers", "1")
    fault = Fault(signal=name, step=3, workers=workers)
    assert runs.run(output, *words, fault=fault) == STOPPED_STATUS, runs.said(output)
    # The entry of step 3 is written behind the question whether to stop.
    assert [step for step, _ in checkpoints(folder)] == [4]
    assert f"stopped by {name} after step 4: checkpoint-4 is whole" in runs.said(output)
    assert_only_whole(folder)
    assert_same_run(unbroken, train(RECIPE, output, *LONG))


def test_only_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one waits for the end of a step. What schedulers repeat is not counted."""
    before = signal.getsignal(signal.SIGTERM)
    for first, second, ends in (
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGTERM, False),
        (signal.SIGUSR1, signal.SIGTERM, False),
    ):
        with StopOnSignal() as signals:
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), first)  # within a moment: the same press of the same key
            assert signals.received == first
            with monkeypatch.context() as patched:
                patched.setattr(train_signals, "SAME_PRESS", -1.0)
                if ends:
                    with pytest.raises(KeyboardInterrupt):
                        os.kill(os.getpid(), second)
                else:
                    os.kill(os.getpid(), second)
            assert signals.received == first
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_leave_signals_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    called: list[int] = []
    try:
        QuietWorker(called.append)(3)
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert called == [3]


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_sequence_of_stages_passes_signals_on(tmp_path: Path, name: str) -> None:
    """The stage ends when it likes, and with its status."""
    script = tmp_path / "stage.sh"
    script.write_text(
        f"trap 'sleep 0.2; exit 75' {name}\nkill -{name} $PPID\n"
        "for i in 1 2 3 4 5 6 7 8 9; do sleep 0.5; done\n"
    )
    before = signal.getsignal(getattr(signal, f"SIG{name}"))
    assert sequence.call(script, "a", "b") == STOPPED_STATUS
    assert signal.getsignal(getattr(signal, f"SIG{name}")) == before
    script.write_text("kill -KILL $$\n")
    assert sequence.call(script) == 137
