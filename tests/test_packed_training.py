"""Packed runs: the loss of their steps, going on after a break, several processes, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import (
    FROM_NOTHING,
    Train,
    assert_same_run,
    break_at,
    run_here,
    run_on_two,
    steps,
    weights,
)
from PIL import Image
from test_interfaces import table
from torch.nn import functional as F

from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.config.recipe import load_recipe
from llava_uhd.data.collator import Collator
from llava_uhd.errors import UserError
from llava_uhd.language.by_sample import BY_SAMPLE
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.train import __main__ as command
from llava_uhd.train.log import read_log
from llava_uhd.train.packed import PLAN_FILE, _check_devices, rows_per_step

PACKED = (
    *FROM_NOTHING, "--data.batching", "packed", "--trainer.group_by_modality_length", "false",
    "--data.preview", "0",
)  # fmt: skip
# Three samples or four in a row, two rows in a step: 16 samples are three steps an epoch.
LONG = (
    *PACKED, "--data.pack_tokens", "512", "--trainer.global_batch_size", "6",
    "--trainer.max_steps", "8", "--trainer.save_steps", "2", "--data.six_slice_probability", "0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """Eight steps of two rows: almost three epochs."""
    return run_here(workplace, "debug/finetune", "out/unbroken", *LONG)


def plan_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PLAN_FILE).read_text())


# --- what a step learns ---------------------------------------------------------------------------


def test_a_step_learns_the_mean_over_all_learned_tokens(
    workplace: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the log against those of the samples, one by one, over all rows of a step."""
    expected: list[float] = []
    build = command.build_trainer

    def build_and_look(*given: Any) -> Any:
        trainer = build(*given)
        samples, model = trainer.train_dataset.samples, trainer.model.eval()
        plan = trainer.train_dataset.packing.plan(0)
        for step in range(2):  # the second one is taken at a rate of zero
            losses = []
            for row in range(step * plan.rows_per_step, (step + 1) * plan.rows_per_step):
                for index in plan.row(row):
                    batch = Collator(0)([samples[index]])
                    with torch.no_grad():
                        logits = model(**batch, logits_to_keep=0).logits[0, :-1]
                    targets = batch["labels"][0, 1:]
                    kept = targets != IGNORE_INDEX
                    losses.append(F.cross_entropy(logits[kept], targets[kept], reduction="none"))
            expected.append(float(torch.cat(losses).mean()))
        model.train()
        return trainer

    monkeypatch.setattr(command, "build_trainer", build_and_look)
    words = ("--data.pack_tokens", "512", "--trainer.global_batch_size", "9")
    folder = train("debug/finetune", "out/mean", *PACKED, *words, "--trainer.max_steps", "2")
    assert plan_of(folder)["rows_per_step"] == 3
    assert [entry["loss"] for entry in steps(folder)] == pytest.approx(expected, rel=1e-5)


def test_accumulated_rows_equal_a_longer_row(train: Train) -> None:
    """All 16 samples in one row, or in three."""
    words = (*PACKED, "--trainer.global_batch_size", "null", "--trainer.max_steps", "3")
    one = train("debug/finetune", "out/row_1", *words, "--data.pack_tokens", "4000")
    three = train(
        "debug/finetune", "out/row_3", *words, "--data.pack_tokens", "1000",
        "--trainer.gradient_accumulation_steps", "3",
    )  # fmt: skip
    assert [plan_of(each)["rows_per_step"] for each in (one, three)] == [1, 3]
    assert [plan_of(each)["steps_per_epoch"] for each in (one, three)] == [1, 1]
    for first, second in zip(steps(one), steps(three), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=2e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    before, after = weights(one), weights(three)
    assert all(torch.allclose(before[k], after[k], atol=1e-5) for k in before)


def test_the_rows_of_a_run(unbroken: Path) -> None:
    plan = plan_of(unbroken)
    assert plan["pack_tokens"] == 512 and plan["rows_per_step"] == 2
    assert plan["steps_per_epoch"] in (3, 4) and plan["first_epoch"]["samples"] == 16
    entries = steps(unbroken)
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    last = [entry["epoch"] for entry in entries]
    assert last == pytest.approx([step / plan["steps_per_epoch"] for step in range(1, 9)])
    found = {path.name for path in unbroken.iterdir()}
    assert set(table("of a packed run")) <= found
    assert read_manifest(unbroken)["data"]["samples"] >= 16


@pytest.mark.parametrize(
    "recipe",
    [
        "llava_1_5/finetune_vicuna7b",
        "uhd_v2/finetune_vicuna7b",
        "onevision/stage2_ov_qwen2_7b",
        "llavolta/finetune_4stage",
    ],
)
def test_every_kind_of_recipe_packs(train: Train, recipe: str) -> None:
    words = [*PACKED, "--debug", "--trainer.max_steps", "4", "--trainer.logging_steps", "1"]
    folder = train(recipe, f"out/each/{recipe}", *words)
    assert len(steps(folder)) == 4
    stages = [entry for entry in read_log(folder) if "compression_stage" in entry]
    if recipe.startswith("llavolta"):
        assert [entry["step"] for entry in stages] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        ((), BY_SAMPLE),
        (("--model.attn_implementation", "sdpa"), "sdpa"),
        (("--lora.r", "4", "--stage.learn.language_model", "1e-3"), BY_SAMPLE),
    ],
)
def test_attention_works_sample_by_sample_unless_chosen(
    train: Train,
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    backend: str,
) -> None:
    if "--lora.r" in words:
        pytest.importorskip("peft")
    seen: list[Any] = []
    build = command.build_trainer
    monkeypatch.setattr(
        command, "build_trainer", lambda *given: seen.append(build(*given)) or seen[0]
    )
    short = ("--trainer.max_steps", "2", "--trainer.save_steps", "9")
    name = f"out/backend_{len(words)}_{backend}"
    folder = train("debug/finetune", name, *LONG, *short, *words)
    assert seen[0].model.get_decoder().config._attn_implementation == backend
    first = [each["loss"] for each in steps(unbroken)[:2]]
    assert [each["loss"] for each in steps(folder)] == pytest.approx(first, rel=1e-5)
    # A LoRA folder has no configuration of a whole model.
    for config in folder.glob("config.json"):
        assert BY_SAMPLE not in config.read_text()


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_going_on_gives_the_unbroken_run(train: Train, unbroken: Path, step: int) -> None:
    output = f"out/broken_{step}"
    break_at(step, train, "debug/finetune", output, *LONG)
    assert_same_run(unbroken, train("debug/finetune", output, *LONG))
    assert plan_of(unbroken) == plan_of(unbroken.parent / f"broken_{step}")


def test_workers_do_not_change_the_run(train: Train, unbroken: Path) -> None:
    words = (*LONG, "--trainer.dataloader_num_workers", "2")
    break_at(5, train, "debug/finetune", "out/workers", *words)
    assert_same_run(unbroken, train("debug/finetune", "out/workers", *words))


def test_counts_are_made_again_where_they_are_lost(train: Train, unbroken: Path) -> None:
    break_at(3, train, "debug/finetune", "out/lost", *LONG)
    (unbroken.parent / "lost/token_counts.npz").unlink()
    assert_same_run(unbroken, train("debug/finetune", "out/lost", *LONG))


def test_pictures_of_another_size_end_a_run(workplace: Path, train: Train) -> None:
    data = workplace / "resized"
    shutil.copytree(workplace / "playground/data/debug", data)
    words = (*LONG, "--data.path", str(data / "finetune.json"),
             "--data.image_folder", str(data / "images"))  # fmt: skip
    break_at(3, train, "debug/finetune", "out/resized", *words)
    for path in (data / "images/finetune/000").iterdir():
        Image.open(path).resize((40, 40)).save(path)
    (workplace / "out/resized/token_counts.npz").unlink()
    with pytest.raises(UserError, match="other numbers of tokens than when it was written"):
        train("debug/finetune", "out/resized", *words)


def test_a_run_goes_on_with_its_rows(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many devices there are, as long as they can share a step."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    _check_devices(plan_of(unbroken)["rows_per_step"], unbroken)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="steps have 2 packed rows, which 3 devices cannot share"):
        _check_devices(plan_of(unbroken)["rows_per_step"], unbroken)


def assert_alike(first: Path, second: Path) -> None:
    """Up to the order in which sums are taken."""
    assert plan_of(first) == plan_of(second)
    for one, other in zip(steps(first), steps(second), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[k], after[k], atol=1e-4) for k in before)


@pytest.mark.slow
def test_two_processes_equal_one(unbroken: Path, tmp_path: Path) -> None:
    printed = run_on_two(tmp_path, "debug/finetune", *LONG, "--deepspeed", "null")
    assert "a step has 2 rows = 1 accumulated x 2 devices" in printed
    assert_alike(unbroken, tmp_path / "checkpoints/debug/finetune")


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(
    workplace: Path, train: Train, unbroken: Path
) -> None:
    words = (*LONG, "--deepspeed", "null")
    break_at(5, train, "debug/finetune", "out/grown", *words)
    printed = run_on_two(workplace, "debug/finetune", *words, "--trainer.output_dir", "out/grown")
    assert "Going on from" in printed and "1 accumulated x 2 devices" in printed
    assert_alike(unbroken, workplace / "out/grown")


# --- sizes of rows and steps ----------------------------------------------------------------------


def test_rows_hold_the_per_device_batch_on_average(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--trainer.global_batch_size", "8", "--trainer.per_device_train_batch_size", "4")
    folder = train("debug/finetune", "out/sizes", *PACKED, *words, "--trainer.max_steps", "2")
    plan = plan_of(folder)
    assert 4 * 132 <= plan["pack_tokens"] <= 4 * 178 and plan["rows_per_step"] == 2
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"16 samples packed into {plan['first_epoch']['rows']} rows of at most" in printed
    assert "a step has 2 rows = 2 accumulated x 1 devices (cpu)" in printed


def test_the_global_batch_is_kept_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("uhd_v1/finetune_vicuna7b", [*PACKED, "--data.pack_tokens", "4096"])
    assert recipe.trainer.global_batch_size == 128
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rows_per_step(recipe, 800.0, 4096) == 24  # 123 samples
    recipe.trainer.global_batch_size = None
    assert rows_per_step(recipe, 800.0, 4096) == 8
    recipe.trainer.arguments["gradient_accumulation_steps"] = 5
    assert rows_per_step(recipe, 800.0, 4096) == 40


# --- refusals -------------------------------------------------------------------------------------


def test_what_does_not_go_together() -> None:
    def refused(reason: str, *words: str) -> None:
        with pytest.raises(UserError, match=reason):
            load_recipe("llava_1_5/finetune_vicuna7b", [*PACKED, *words])

    load_recipe("llava_1_5/finetune_vicuna7b", list(PACKED))
    refused(
        "trainer.group_by_modality_length and data.batching packed exclude each other.*"
        "--trainer.group_by_modality_length false",
        "--trainer.group_by_modality_length", "true",
    )  # fmt: skip
    refused("train_sampling_strategy and data", "--train_sampling_strategy", "group_by_length")
    refused(
        "global_batch_size and trainer.gradient_accumulation_steps exclude",
        "--trainer.gradient_accumulation_steps", "2", "--trainer.global_batch_size", "8",
    )  # fmt: skip
    refused("auto_find_batch_size cannot", "--auto_find_batch_size", "true")
    refused("data.pack_tokens must be at least 1", "--data.pack_tokens", "0")
    refused("data.batching", "--data.batching", "tight")


def test_a_sample_longer_than_a_row(train: Train) -> None:
    words = (*PACKED, "--data.pack_tokens", "140")
    with pytest.raises(
        UserError,
        match=r"finetune\.json, record \d+ .* has \d+ tokens, more than the 140 of "
        r"data\.pack_tokens: raise it to at least \d+, or cut",
    ):
        train("debug/finetune", "out/too_long", *words)


def test_broken_images_are_left_out(train: Train, workplace: Path) -> None:
    """One with a broken header, one with a broken body; the run counts both."""
    data = workplace / "broken"
    shutil.copytree(workplace / "playground/data/debug", data)
    for index, content in ((3, b""), (7, None)):
        image = data / f"images/finetune/000/00000{index}.png"
        image.write_bytes(image.read_bytes()[:200] if content is None else content)
    words = (
        *PACKED, "--data.path", str(data / "finetune.json"), "--data.image_folder",
        str(data / "images"), "--data.on_broken_image", "skip", "--data.max_broken", "0.2",
        "--data.pack_tokens", "178", "--trainer.max_steps", "null",
        "--trainer.num_train_epochs", "1", "--trainer.global_batch_size", "2",
    )  # fmt: skip
    folder = train("debug/finetune", "out/lenient", *words)
    assert read_manifest(folder)["data"]["broken"] == 2
    assert read_manifest(folder)["data"]["samples"] == 16
    # A row of a broken sample alone teaches nothing.
    assert len(steps(folder)) == plan_of(folder)["steps_per_epoch"] >= 8


def test_a_padded_run_is_not_gone_on_with_packed(train: Train) -> None:
    words = [word.replace("packed", "padded") for word in PACKED]
    break_at(3, train, "debug/finetune", "out/changed", *words)
    with pytest.raises(UserError, match="data.batching was padded, is packed"):
        train("debug/finetune", "out/changed", *PACKED)


def test_padded_is_the_default() -> None:
    recipe = load_recipe("llava_1_5/finetune_vicuna7b")
    assert recipe.data.batching == "padded" and recipe.trainer.group_by_modality_length
    assert dataclasses.replace(recipe.data, pack_tokens=9).batching == "padded"
