"""Going on after a kill: the unbroken run, to the last bit."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from fixtures_runs import (
    FROM_NOTHING,
    Train,
    assert_same_run,
    break_at,
    run_here,
    start,
    steps,
)

from llava_uhd.checkpoint.manifest import MANIFEST_FILE
from llava_uhd.config.recipe import load_recipe
from llava_uhd.errors import UserError
from llava_uhd.train.log import CURVE_FILE, LOG_FILE
from llava_uhd.train.output import RECIPE_FILE, last_complete_checkpoint

# --- going on -------------------------------------------------------------------------------------

LONG = (
    *FROM_NOTHING, "--trainer.max_steps", "7", "--trainer.save_steps", "2",
    "--data.six_slice_probability", "0.5", "--trainer.save_total_limit", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """Seven steps of four samples: almost two epochs."""
    return run_here(workplace, "debug/finetune", "out/unbroken", *LONG)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
def test_going_on_gives_the_unbroken_run(train: Train, unbroken: Path, step: int) -> None:
    output = f"out/broken_{step}"
    break_at(step, train, "debug/finetune", output, *LONG)
    assert_same_run(unbroken, train("debug/finetune", output, *LONG))


def test_broken_again_and_again(train: Train, unbroken: Path) -> None:
    for step in (3, 5, 5, 6):
        break_at(step, train, "debug/finetune", "out/again", *LONG)
    assert_same_run(unbroken, train("debug/finetune", "out/again", *LONG))


VARIANTS = {
    "pretrain": ["--trainer.max_steps", "5"],
    "everything": ["--trainer.max_steps", "5", "--stage.learn.vision_tower", "true",
                   "--stage.learn.language_model", "true"],
    # Sixteen samples do not divide by six, and epochs count instead of steps.
    "uneven": ["--trainer.global_batch_size", "6", "--trainer.num_train_epochs", "2"],
    # An entry of the log averages over steps on both sides of a checkpoint.
    "sparse log": ["--trainer.max_steps", "9", "--trainer.logging_steps", "3"],
    "workers": ["--trainer.max_steps", "7", "--trainer.dataloader_num_workers", "1"],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_in_other_runs(train: Train, variant: str) -> None:
    words = ["debug/pretrain", f"out/{variant.replace(' ', '_')}", *VARIANTS[variant]]
    break_at(6 if variant == "sparse log" else 3, train, *words)
    broken = train(*words)
    words[1] += "_unbroken"
    assert_same_run(train(*words), broken)


@pytest.mark.slow
def test_killed_in_the_middle(workplace: Path, train: Train, unbroken: Path) -> None:
    output = workplace / "out/killed"
    process = start(workplace, "debug/finetune", *LONG, "--trainer.output_dir", "out/killed")
    try:
        deadline = time.monotonic() + 240
        while len(steps(output)) < 5:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (output / MANIFEST_FILE).exists()
    # What a kill in the middle of writing leaves behind.
    half = output / "checkpoint-9"
    half.mkdir()
    shutil.copy(output / "checkpoint-4/trainable.safetensors", half)
    with (output / LOG_FILE).open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert_same_run(unbroken, train("debug/finetune", "out/killed", *LONG))
    assert not half.exists()


@pytest.mark.parametrize("left", ["nothing", "weights", "half state"])
def test_half_written_checkpoints_are_removed(
    train: Train, unbroken: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = left.replace(" ", "_")
    output = f"out/half_{name}"
    break_at(5, train, "debug/finetune", output, *LONG)
    newest = unbroken.parents[0] / f"half_{name}" / "checkpoint-4"
    state = (newest / "trainer_state.json").read_text()
    for file in newest.iterdir():
        if left == "nothing" or file.name != "trainable.safetensors":
            file.unlink()
    if left == "half state":
        (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    assert last_complete_checkpoint(newest.parent) == newest.parent / "checkpoint-2"
    assert not newest.exists()
    capsys.readouterr()
    assert_same_run(unbroken, train("debug/finetune", output, *LONG))
    assert f"Going on from {output}/checkpoint-2" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("lost", ["manifest", "result", "nothing after the last step"])
def test_killed_while_the_result_is_written(train: Train, unbroken: Path, lost: str) -> None:
    """All steps are done: none may be added."""
    output = f"out/late_{lost.split()[0]}"
    words = [*LONG, "--trainer.save_steps", "7"]
    if lost.startswith("nothing"):
        break_at(7, train, "debug/finetune", output, *LONG)
    folder = train("debug/finetune", output, *words) if "nothing" not in lost else None
    if folder is not None:
        (folder / MANIFEST_FILE).unlink()
        if lost == "result":
            (folder / "model.safetensors").unlink()
            (folder / CURVE_FILE).unlink()
    assert_same_run(unbroken, train("debug/finetune", output, *words))


def test_other_settings_are_refused(train: Train) -> None:
    words = ("debug/pretrain", "out/settings", "--trainer.max_steps", "3")
    break_at(2, train, *words, "--trainer.save_steps", "1")
    with pytest.raises(UserError, match=r"trainer\.learning_rate was 0\.001, is 0\.01.*output_dir"):
        train(*words, "--trainer.learning_rate", "0.01")
    with pytest.raises(UserError, match=r"model\.image\.max_slices was 7, is 3"):
        train(*words, "--model.image.max_slices", "3")
    folder = train(*words, "--trainer.save_steps", "2")
    assert [entry["step"] for entry in steps(folder)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"trainer\.max_steps was 3, is 4"):
        train(*words[:2], "--trainer.max_steps", "4")
    assert load_recipe(str(folder / RECIPE_FILE)).trainer.arguments["max_steps"] == 3


def test_a_half_written_recipe_is_no_obstacle(train: Train) -> None:
    words = ("debug/pretrain", "out/half_recipe", "--trainer.max_steps", "1")
    folder = train(*words)
    recipe = (folder / RECIPE_FILE).read_bytes()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / RECIPE_FILE).write_bytes(recipe[: len(recipe) // 2])
    train(*words)
    assert (folder / RECIPE_FILE).read_bytes() == recipe
