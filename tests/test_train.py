"""Training: the command, what learns, what is written, and going on after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_runs import (
    CLOCKS,
    FROM_NOTHING,
    STAGES,
    Train,
    assert_same_run,
    break_at,
    run_on_two,
    start,
    steps,
    weights,
)
from fixtures_tiny import picture

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.manifest import MANIFEST_FILE, read_manifest
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.errors import UserError
from llava_uhd.train import __main__ as command
from llava_uhd.train.log import CURVE_FILE, LOG_FILE, draw_loss, read_log, smooth

# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_stages_as_typed(workplace: Path) -> None:
    for recipe in STAGES:
        process = start(workplace, recipe)
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        for word in ("vision_tower", "projector", "language_model", "frozen", "global batch 4"):
            assert word in printed, word
        folder = workplace / "checkpoints" / recipe
        assert f"final loss {steps(folder)[-1]['loss']} after 4 steps" in printed
        assert [entry["step"] for entry in steps(folder)] == [1, 2, 3, 4]
        assert (folder / CURVE_FILE).read_bytes().startswith(b"\x89PNG")
        manifest = read_manifest(folder)
        assert manifest["finished"] and manifest["recipe"] == recipe and manifest["steps"] == 4
        assert manifest["data"]["samples"] == 16
        for entry in read_log(folder)[:4]:
            assert {"loss", "learning_rate", "grad_norm", *CLOCKS[:2]} <= entry.keys()
            assert entry["samples_per_second"] > 0 and isinstance(entry["loss"], float)
    model, processor = load_pretrained(folder)
    inputs = processor(text="USER: <image>\nWhat? ASSISTANT:", images=[picture(128, 64)])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    first = weights(workplace / "checkpoints/debug/pretrain")["projector.pos_embed"]
    assert torch.equal(first, model.projector.pos_embed), "the first stage's projector was used"


def test_a_finished_run_says_so(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("debug/pretrain", "out/finished", "--trainer.max_steps", "1")
    folder = train(*words)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said = capsys.readouterr().out
    assert "computing in float32; attention sdpa; gradient checkpointing" in said
    train(*words)
    assert "out/finished is finished: nothing to do" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["uhd_v1/pretrain_vicuna7b"], "hf download lmsys/vicuna-7b-v1.5"),
        (["debug/pretrain", "--data.path", "gone.json", "--data.image_folder", "."], "gone.json"),
    ],
)
def test_missing_inputs_end_with_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    process = start(tmp_path, *words)
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, errors
    assert len(lines) == 1 and message in lines[0] and errors.rstrip().endswith(lines[0])
    assert "Traceback" not in errors
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("debug/pretrain", ["--model.vision_tower", "./gone"], "vision tower ./gone does not"),
        ("debug/pretrain", ["--model.language_model", "./gone"], "language model ./gone does not"),
        ("debug/finetune", ["--model.projector_file", "gone"], r"bash pretrain\.sh"),
        ("debug/pretrain", ["--model.checkpoint", "./gone"], "checkpoint ./gone does not exist"),
        ("debug/pretrain", ["--data.path", "gone.json"], r"gone\.json"),
        ("debug/pretrain", ["--data.embedded", "none"], "'none' is not one of"),
        ("debug/pretrain", ["--trainer.global_batch_size", "7", "--gradient_accumulation_steps",
                            "2"], "global_batch_size 7"),
        ("debug/pretrain", ["--trainer.max_step", "7"], "max_steps"),
        ("debug/pretrain", ["--trainer.optim", "adamm"], "trainer.optim must be one of"),
        ("debug/pretrain", ["--stage.learn.projectr", "true"], "projector"),
    ],
)  # fmt: skip
def test_mistakes_leave_no_output_folder(
    train: Train, workplace: Path, recipe: str, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(recipe, "out/mistake", *words)
    assert "\n" not in str(caught.value)
    assert not (workplace / "out/mistake").exists()


def test_parts_that_do_not_fit_leave_a_folder_that_can_be_used(train: Train) -> None:
    """The mistake shows when the model is built; mending it is not another run."""
    short = ("--trainer.max_steps", "1")
    with pytest.raises(UserError, match="model.image.patch_size is 14"):
        train("debug/pretrain", "out/mended", "--model.image.patch_size", "14", *short)
    assert (train("debug/pretrain", "out/mended", *short) / MANIFEST_FILE).is_file()


# --- what learns ----------------------------------------------------------------------------------


def initial_and_final(
    train: Train, recipe: str, output: str, *words: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of a run without any learning rate, and of the same run with one."""
    common = ("--trainer.max_steps", "2", "--trainer.warmup_steps", "0", *words)
    still = train(recipe, f"{output}_still", *common, "--trainer.learning_rate", "0")
    moved = train(recipe, f"{output}_moved", *common, "--trainer.learning_rate", "0.01")
    return weights(still), weights(moved)


@pytest.mark.parametrize(
    ("recipe", "words", "learning", "resting"),
    [
        ("debug/pretrain", [], ("projector.",), ()),
        (
            "debug/finetune",
            FROM_NOTHING,
            ("projector.", "language_model."),
            ("projector.pos_embed",),
        ),
        (
            "debug/finetune",
            (*FROM_NOTHING, "--stage.learn.vision_tower", "true",
             "--model.projector.train_positions", "true"),
            ("projector.", "language_model.", "vision_tower."),
            (),
        ),
        (
            "debug/finetune",
            (*FROM_NOTHING, "--stage.learn.projector", "false"),
            ("language_model.",),
            (),
        ),
    ],
)  # fmt: skip
def test_only_the_stage_s_parts_change(
    train: Train, recipe: str, words: list[str], learning: tuple[str, ...], resting: tuple[str, ...]
) -> None:
    name = f"out/parts_{len(learning)}_{len(words)}"
    before, after = initial_and_final(train, recipe, name, *words)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    expected = {name for name in before if not name.startswith(learning) or name in resting}
    # Rows of tokens that no sample holds do not keep a table from changing.
    assert unchanged == expected


def test_optimizer_groups_have_their_own_rates(train: Train, workplace: Path) -> None:
    seen: list[Any] = []
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        build = command.build_trainer
        patched.setattr(
            command, "build_trainer", lambda *given: seen.append(build(*given)) or seen[0]
        )
        train(
            "debug/finetune", "out/rates", *FROM_NOTHING, "--trainer.max_steps", "1",
            "--stage.learn.projector", "0.003", "--trainer.weight_decay", "0.1",
            "--trainer.lr_scheduler_type", "constant",
        )  # fmt: skip
    model, optimizer = seen[0].model, seen[0].optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[str, tuple[float, float]] = {}
    for group in getattr(optimizer, "optimizer", optimizer).param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in rates
            rates[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in rates.items():
        assert rate == (0.003 if name.startswith("projector.") else 2e-5), name
        bias_or_norm = name.endswith("bias") or "norm" in name or ".ln_" in name
        assert decay == (0.0 if bias_or_norm else 0.1), name


def test_accumulation_equals_one_large_batch(train: Train) -> None:
    runs = []
    for size in (4, 2, 1):
        words = ("--trainer.per_device_train_batch_size", str(size), *FROM_NOTHING)
        runs.append(train("debug/finetune", f"out/batch_{size}", *words))
    for other in runs[1:]:
        for first, second in zip(steps(runs[0]), steps(other), strict=True):
            assert first["loss"] == pytest.approx(second["loss"], abs=2e-5)
            assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
        before, after = weights(runs[0]), weights(other)
        assert all(torch.allclose(before[k], after[k], atol=1e-5) for k in before)


def test_workers_do_not_change_the_run(train: Train) -> None:
    words = (*FROM_NOTHING, "--data.six_slice_probability", "0.5")
    alone = train("debug/finetune", "out/workers_0", *words)
    helped = train(
        "debug/finetune", "out/workers_2", *words, "--trainer.dataloader_num_workers", "2"
    )
    assert_same_run(alone, helped)


@pytest.mark.parametrize("recipe", [name for name in list_recipes()])
def test_every_recipe_runs_a_step_in_debug_size(train: Train, workplace: Path, recipe: str) -> None:
    if "lora" in recipe:
        pytest.importorskip("peft")
        if "qlora" in recipe:
            pytest.importorskip("bitsandbytes")
    words = [] if recipe.startswith("debug/") else ["--debug"]
    words += ["--trainer.max_steps", "1", "--model.projector_file", "null"]
    assert load_recipe(recipe, words).debug
    folder = train(recipe, f"out/each/{recipe}", *words)
    assert len(steps(folder)) == 1 and load_pretrained(folder)


def test_debug_never_shares_a_folder_with_the_real_run() -> None:
    for name in list_recipes():
        if not name.startswith("debug/"):
            assert load_recipe(name, debug=True).output_dir != load_recipe(name).output_dir


# --- data -----------------------------------------------------------------------------------------


def test_broken_images_are_counted(train: Train, workplace: Path) -> None:
    data = workplace / "playground/data/debug"
    copy = workplace / "broken_data"
    shutil.copytree(data, copy)
    for index in (3, 7):
        image = copy / f"images/finetune/000/00000{index}.png"
        image.write_bytes(image.read_bytes()[:200])
    words = ("--data.path", str(copy / "finetune.json"), "--data.image_folder",
             str(copy / "images"), *FROM_NOTHING)  # fmt: skip
    with pytest.raises(UserError, match=r"finetune\.json.*00000[37]\.png"):
        train("debug/finetune", "out/strict", *words)
    lenient = ("--data.on_broken_image", "skip", "--data.max_broken", "0.2")
    folder = train("debug/finetune", "out/lenient", *words, *lenient)
    assert read_manifest(folder)["data"]["broken"] == 2
    assert len(steps(folder)) == 4
    few = ("--data.on_broken_image", "skip", "--data.max_broken", "0.1")
    with pytest.raises(UserError, match="2 broken samples"):
        train("debug/finetune", "out/few", *words, *few)


def test_texts_and_images_mixed(train: Train, workplace: Path) -> None:
    """Batches of one modality each, as the published sampler makes them."""
    rows = json.loads((workplace / "playground/data/debug/finetune.json").read_text())[:8]
    for index in range(8):
        talk = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "three " * index}]
        rows.append({"id": f"text-{index}", "conversations": talk})
    (workplace / "mixed.json").write_text(json.dumps(rows))
    words = ("--data.path", "mixed.json", "--data.image_folder",
             "playground/data/debug/images", "--stage.learn.vision_tower", "true")  # fmt: skip
    assert load_recipe("debug/finetune").trainer.group_by_modality_length
    break_at(3, train, "debug/finetune", "out/mixed", *FROM_NOTHING, *words)
    broken = train("debug/finetune", "out/mixed", *FROM_NOTHING, *words)
    whole = train("debug/finetune", "out/mixed_unbroken", *FROM_NOTHING, *words)
    assert_same_run(whole, broken)
    assert all(0 < entry["loss"] < 20 for entry in steps(whole))


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(workplace: Path, train: Train, tmp_path: Path) -> None:
    words = (*FROM_NOTHING, "--deepspeed", "null", "--trainer.per_device_train_batch_size", "1")
    alone = train("debug/finetune", "out/alone", *words)
    # A folder of its own: the processes also share the drawing of the data.
    printed = run_on_two(tmp_path, "debug/finetune", *words)
    assert "global batch 4 = 1 per device x 2 accumulated x 2 devices" in printed
    together = tmp_path / "checkpoints/debug/finetune"
    for first, second in zip(steps(alone), steps(together), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)
    before, after = weights(alone), weights(together)
    assert all(torch.allclose(before[k], after[k], atol=1e-4) for k in before)
    assert read_manifest(together)["finished"]


# --- log and curve --------------------------------------------------------------------------------


def test_log_and_curve(tmp_path: Path) -> None:
    assert read_log(tmp_path) == [] and not draw_loss({"none": tmp_path}, tmp_path / "x.png")
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": 1.0}\n{"st')
    assert [entry["loss"] for entry in read_log(tmp_path)] == [2.0, 1.0]
    assert draw_loss({"a": tmp_path, "b": tmp_path}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 0.0])[1] == pytest.approx(0.9 / 1.9)
