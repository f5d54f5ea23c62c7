"""The record of a run: counts of batches, operations by hand, run.json, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import FROM_NOTHING, Train, break_at, start
from fixtures_tiny import picture, tiny_parts

from llava_uhd.checkpoint import manifest
from llava_uhd.checkpoint.manifest import code_version, library_versions, read_manifest
from llava_uhd.config.compression import CompressionConfig
from llava_uhd.config.training import StageConfig
from llava_uhd.data.collator import Collator
from llava_uhd.errors import UserError
from llava_uhd.language.runs import Run
from llava_uhd.train import record_tensorboard
from llava_uhd.train.counting import FACTS, Counting, Facts, facts_of
from llava_uhd.train.flops import (
    PEAKS,
    TrainingFlops,
    device_peak,
    kept_tokens,
    measured_peak,
    peak_of,
    shortened,
)
from llava_uhd.train.log import read_log
from llava_uhd.train.meter import CLOCK_KEYS, TIME
from llava_uhd.train.record import (
    HIDDEN,
    LAUNCHER_VARIABLES,
    all_ranks,
    read_record,
    this_rank,
    without_secrets,
)
from llava_uhd.train.stages import apply_stage, parameter_groups
from llava_uhd.train.timing import PARTS

# --- what a batch holds ---------------------------------------------------------------------------


def samples() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model, processor = tiny_parts()
    made = []
    for text, images in (
        ("USER: <image>\nWhat? ASSISTANT: red", [picture(64, 32)]),
        ("USER: What? ASSISTANT: yes it is", []),
        ("USER: <image>\nWhich? ASSISTANT: no", [picture(32, 96)]),
    ):
        inputs = processor(text=text, images=images or None)
        sample = {key: value for key, value in inputs.items() if key != "attention_mask"}
        sample = {k: v[0] if k == "input_ids" else v for k, v in sample.items()}
        labels = sample["input_ids"].clone()
        labels[:-2] = -100
        made.append({**sample, "labels": labels})
    return model, made


def test_padded_and_packed_batches_count_alike() -> None:
    model, made = samples()
    config = model.config
    lengths = tuple(len(sample["input_ids"]) for sample in made)
    found = {
        packed: Counting(Collator(0, packed), config, compresses=True)(made)[FACTS]
        for packed in (False, True)
    }
    assert found[False].lengths == found[True].lengths == lengths
    assert found[False].slots == 3 * max(lengths) and found[True].slots == sum(lengths)
    for facts in found.values():
        assert facts.samples == 3 and facts.tokens == sum(lengths) and facts.learned == 6
        assert len(facts.grids) == sum(len(s["view_grids"]) for s in made if "view_grids" in s)
        assert facts.visual == sum(run.length for runs in facts.runs for run in runs)
        assert [len(runs) for runs in facts.runs] == [
            len(sample["view_grids"]) if "view_grids" in sample else 0 for sample in made
        ]
        assert facts.visual == 4 * len(facts.grids)


def test_counts_are_not_of_the_model() -> None:
    model, made = samples()
    batch = Counting(Collator(0), model.config)(made)
    assert batch[FACTS].runs == ()
    assert facts_of({k: v for k, v in batch.items() if k != FACTS}, model.config) == batch[FACTS]


# --- operations, by hand --------------------------------------------------------------------------


def test_language_model_by_hand() -> None:
    config = tiny_parts()[0].config
    count = TrainingFlops(config, {"projector": None, "language_model": None})
    # Width 64, 4 heads of 16, 2 key heads, MLP 96, 2 layers.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    words = config.text_config.vocab_size
    facts = Facts((10, 7), 20, 0, 5, ())
    products = 2 * (2 * layer) * 17 + 2 * words * 64 * 5
    inside = 2 * (2 * 64 * (10**2 + 7**2))
    by_hand = products + inside
    assert count.forward(facts) == by_hand
    found = count(facts)
    assert (found.tower, found.projector, found.language) == (0, 0, 3 * by_hand)
    adapted = TrainingFlops(config, {"language_model": None}, adapters=True)(facts)
    frozen = TrainingFlops(config, {"projector": None})(facts)
    assert adapted.language == frozen.language == 2 * products + 3 * inside


def test_tower_and_projector_count_their_passes() -> None:
    config = tiny_parts()[0].config
    facts = Facts((20,), 20, 4, 5, ((4, 4),))
    # 2 of 3 layers of width 32, MLP 48, class token, patches of 8 x 8.
    tower = 2 * (2 * 17 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 17**2 * 32) + 2 * 16 * 3 * 64 * 32
    rest = TrainingFlops(config, {"language_model": None})(facts)
    first = TrainingFlops(config, {"projector": None})(facts)
    all_of_it = TrainingFlops(config, {"vision_tower": None, "projector": None})(facts)
    patches = 2 * 16 * 3 * 64 * 32  # nobody wants the gradients of pixels
    assert (rest.tower, first.tower, all_of_it.tower) == (tower, tower, 3 * tower - patches)
    features = 2 * 16 * 32 * 64  # nor those of a tower at rest
    assert first.projector + features == 3 * rest.projector == all_of_it.projector > 0
    assert (first + rest).total == first.total + rest.total


def test_compression_counts_the_shorter_layers() -> None:
    config = tiny_parts()[0].config
    count = TrainingFlops(config, {"language_model": None})
    facts = Facts((30, 12), 42, 18, 5, (), ((Run(9, 3), Run(9, 3)), ()))
    compression = CompressionConfig("avgpool1d", layer=1, stride=4, remainder="keep")
    assert shortened(facts, compression) == [30 - 2 * (9 - 3), 12]
    shorter = Facts((18, 12), 30, 6, 5, ())
    head = 2 * config.text_config.vocab_size * 64 * 5
    halves = (count.forward(facts) - head) / 2 + (count.forward(shorter) - head) / 2
    assert count.forward(facts, compression) == halves + head
    off = CompressionConfig("avgpool1d", layer=2, stride=4)
    assert count.forward(facts, off) == count.forward(facts)
    assert kept_tokens("avgpool1d", Run(9, 3), 4, False) == 2
    assert kept_tokens("fastv", Run(9, 3), 4, True) == 3


def test_peaks() -> None:
    assert PEAKS["A100"] == 312e12 and PEAKS["H100"] == PEAKS["H200"] == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB").flops == 312e12
    assert peak_of("NVIDIA H100 80GB HBM3").flops == 989e12
    assert peak_of("NVIDIA H100 PCIe").flops == 756e12
    assert peak_of("NVIDIA GH200 480GB").flops == 989e12
    unknown = peak_of("Some Card")
    assert unknown.flops is None and "Some Card" in unknown.source
    assert measured_peak(64, 2) > 0
    assert "measured" in device_peak(torch.device("cpu")).source


# --- rates ----------------------------------------------------------------------------------------


def test_groups_know_their_parts() -> None:
    model = tiny_parts()[0]
    stage = StageConfig("finetune", {"projector": 1e-3, "language_model": None})
    apply_stage(model, stage)
    groups = parameter_groups(model, stage, 1e-5, 0.1, set())
    assert {group["part"]: group["lr"] for group in groups} == {
        "projector": 1e-3,
        "language_model": 1e-5,
    }


# --- run.json -------------------------------------------------------------------------------------


def test_record_and_log_of_a_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_THING", "hush")
    monkeypatch.setenv("MASTER_PORT", "29501")
    words = ("--trainer.max_steps", "3", "--trainer.save_steps", "2", "--trainer.seed", "7")
    rates = ("--stage.learn.projector", "0.001")
    folder = train("debug/finetune", "out/record", *FROM_NOTHING, *words, *rates)
    record = read_record(folder)
    (start,) = record["starts"]
    assert (start["from_step"], start["reached_step"], start["max_steps"]) == (0, 3, 3)
    assert start["how"] == "finished" and start["started"] <= start["ended"]
    assert start["seed"] == 7 and start["devices"] == 1
    assert start["versions"]["torch"] == torch.__version__ and "transformers" in start["versions"]
    assert set(start["code"]) == {"version", "commit", "changed"}
    assert start["launcher"]["MASTER_PORT"] == "29501"
    assert "hush" not in json.dumps(record)
    (rank,) = start["ranks"]
    assert rank["rank"] == 0 and rank["device"] == "cpu" and rank["host"] and rank["name"]
    assert start["peak"]["flops_per_device"] > 0 and "measured" in start["peak"]["source"]
    assert (
        record["data_sha256"] == json.loads((folder / "data_manifest.json").read_text())["sha256"]
    )
    assert "multiply-add is 2" in record["flop_convention"]
    assert read_manifest(folder)["code"]["version"] == start["code"]["version"]
    entries = [entry for entry in read_log(folder) if "loss" in entry]
    for entry in entries:
        parts = [entry[f"{TIME}{part}"] for part in PARTS]
        assert entry["step_seconds"] == pytest.approx(sum(parts), abs=1e-4)
        assert entry["mfu"] > 0 and entry["tflops_per_second"] > 0 and entry["peak_memory_gib"] > 0
        assert entry["learned_tokens_per_second"] < entry["tokens_per_second"]
        assert entry[f"{TIME}language_model"] > 0 and entry[f"{TIME}backward_language_model"] > 0
        assert entry[f"{TIME}optimizer"] > 0 and entry[f"{TIME}data"] > 0
    # The rates of the step itself: the first one warms up.
    assert entries[0]["learning_rate"] == 0
    assert entries[1]["learning_rate_projector"] == pytest.approx(1e-3)
    assert entries[1]["learning_rate_language_model"] == pytest.approx(2e-5)
    assert {key for entry in entries for key in entry if key.startswith(TIME)} <= set(CLOCK_KEYS)


def test_mfu_follows_from_the_entry(train: Train) -> None:
    folder = train("debug/pretrain", "out/mfu", "--trainer.max_steps", "1")
    (entry,) = [entry for entry in read_log(folder) if "loss" in entry]
    peak = read_record(folder)["starts"][0]["peak"]["flops_per_device"]
    assert entry["mfu"] == pytest.approx(1e12 * entry["tflops_per_second"] / peak, rel=0.02)
    samples = entry["samples_per_second"] * entry["step_seconds"]
    assert samples == pytest.approx(4, rel=0.02), "four samples in the step"


def test_each_start_is_appended(train: Train) -> None:
    words = (*FROM_NOTHING, "--trainer.max_steps", "4", "--trainer.save_steps", "2")
    break_at(3, train, "debug/finetune", "out/broken", *words)
    folder = train("debug/finetune", "out/broken", *words)
    first, second = read_record(folder)["starts"]
    assert (first["from_step"], first["reached_step"], first["ended"]) == (0, 2, None)
    assert (second["from_step"], second["reached_step"], second["how"]) == (2, 4, "finished")


def test_secrets_are_left_out() -> None:
    words = ["train", "--hub_token", "abc", "--trainer.hub_token=abc", "--x", "1", "--api_key=k"]
    shown = without_secrets(words)
    assert shown == [
        *("train", "--hub_token", HIDDEN, f"--trainer.hub_token={HIDDEN}", "--x", "1"),
        f"--api_key={HIDDEN}",
    ]
    assert not [name for name in LAUNCHER_VARIABLES if "TOKEN" in name or "KEY" in name]


def test_one_process_is_all_ranks() -> None:
    mine = this_rank(torch.device("cpu"))
    assert all_ranks(mine) == [mine]
    assert mine["threads"] == torch.get_num_threads()


def test_code_version_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "clone/venv/llava_uhd/checkpoint"
    inner.mkdir(parents=True)
    monkeypatch.setattr(manifest, "__file__", str(inner / "manifest.py"))
    nothing = {"version": manifest.__version__, "commit": None, "changed": None}
    assert code_version() == nothing, "no repository"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C"]
    subprocess.run([*git, str(tmp_path / "clone"), "init", "-q"], check=True)
    assert code_version() == nothing, "somebody else's repository"
    root = str(inner.parents[1])
    subprocess.run([*git, root, "init", "-q"], check=True)
    (inner / "manifest.py").write_text("")
    subprocess.run([*git, root, "add", "."], check=True)
    subprocess.run([*git, root, "commit", "-q", "-m", "one"], check=True)
    assert len(code_version()["commit"]) == 40 and code_version()["changed"] is False
    (inner / "manifest.py").write_text("changed")
    assert code_version()["changed"] is True
    monkeypatch.setenv("PATH", "")
    assert code_version() == nothing, "no git"


def test_versions_of_what_is_installed() -> None:
    assert {"llava_uhd", "torch", "transformers", "accelerate"} <= set(library_versions())


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_has_every_number(train: Train) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("--trainer.max_steps", "2", "--trainer.report_to", "tensorboard")
    folder = train("debug/pretrain", "out/board", *words)
    assert not (folder / "runs").exists(), "the library's own folder is not written"
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    entries = [entry for entry in read_log(folder) if "loss" in entry]
    assert [step for step, _ in written] == [1, 2]
    assert [value for _, value in written] == pytest.approx([entry["loss"] for entry in entries])
    assert {"train/mfu", "train/time_data", "train/grad_norm"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert record_tensorboard.tensorboard(tmp_path) == []
    told = capsys.readouterr().out.strip().splitlines()
    assert len(told) == 1 and "not installed" in told[0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_logs_by_recipe(train: Train, workplace: Path, name: str) -> None:
    """Asked for and not installed: told before the first step."""
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=name) as told:
        train("debug/pretrain", f"out/{name}", "--trainer.report_to", name)
    assert "\n" not in str(told.value)


# --- two processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_add_up(tmp_path: Path) -> None:
    """With ZeRO-2, whose optimizer steps inside the backward call."""
    pytest.importorskip("deepspeed")
    words = (*FROM_NOTHING, "--deepspeed", "zero2", "--trainer.max_steps", "2")
    launcher = ("-m", "llava_uhd.launch", "--standalone", "--nproc_per_node", "2")
    process = start(tmp_path, "debug/finetune", *words, launcher=launcher)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    folder = tmp_path / "checkpoints/debug/finetune"
    (begun,) = read_record(folder)["starts"]
    assert begun["devices"] == 2 and [rank["rank"] for rank in begun["ranks"]] == [0, 1]
    assert begun["deepspeed"] == "zero2" and begun["launcher"]["WORLD_SIZE"] == "2"
    for entry in read_log(folder)[:2]:
        # Counts of both processes in the mean of their seconds; operations of one of them.
        samples = entry["samples_per_second"] * entry["step_seconds"]
        assert samples == pytest.approx(4, rel=0.02), "the global batch"
        assert entry[f"{TIME}optimizer"] > 0
        parts = [entry[f"{TIME}{part}"] for part in PARTS]
        assert entry["step_seconds"] == pytest.approx(sum(parts), abs=1e-4)
