"""Training: the command, what learns, what is written, and going on after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, VISION, picture
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.manifest import MANIFEST_FILE, read_manifest
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.data.synthetic import embedded_split
from llava_uhd.errors import UserError
from llava_uhd.train import __main__ as command
from llava_uhd.train.log import CURVE_FILE, LOG_FILE, JsonLog, draw_loss, read_log, smooth
from llava_uhd.train.output import RECIPE_FILE, last_complete_checkpoint

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("debug/pretrain", "debug/finetune")
# What may differ between two equal runs.
CLOCKS = ("samples_per_second", "tokens_per_second", "train_runtime")

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with the embedded data drawn."""
    folder = tmp_path_factory.mktemp("workplace")
    embedded_split("debug", "pretrain", folder / "playground/data")
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


@pytest.fixture
def train(workplace: Path) -> Train:
    return lambda *words: run_here(workplace, *words)


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
    capsys.readouterr()
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


FROM_NOTHING = ("--model.projector_file", "null")


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
    words = [] if recipe.startswith("debug/") else ["--debug"]
    words += ["--trainer.max_steps", "1", "--model.projector_file", "null"]
    assert load_recipe(recipe, words).debug
    folder = train(recipe, f"out/each/{recipe}", *words)
    assert len(steps(folder)) == 1 and load_pretrained(folder)


def test_debug_never_shares_a_folder_with_the_real_run() -> None:
    for name in list_recipes():
        if not name.startswith("debug/"):
            assert load_recipe(name, debug=True).output_dir != load_recipe(name).output_dir


# --- from folders on disk, as a lab does ----------------------------------------------------------


@pytest.fixture(scope="module")
def folders(workplace: Path) -> Path:
    """A language model and a tower as transformers writes them."""
    tokenizer = build_demo_tokenizer()
    torch.manual_seed(0)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    language = LlamaForCausalLM(LlamaConfig(**values, vocab_size=len(tokenizer)))
    language.generation_config.temperature, language.generation_config.top_p = 0.9, 0.6
    language.generation_config.do_sample = True
    language.save_pretrained(workplace / "language")
    # Vicuna's contradiction.
    file = workplace / "language/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": False}))
    tokenizer.save_pretrained(workplace / "language")
    values = {key: value for key, value in VISION.items() if key != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**values)).save_pretrained(workplace / "tower")
    return workplace


LAB = ("--model.language_model", "language", "--model.vision_tower", "tower")


def test_projector_then_model(train: Train, folders: Path) -> None:
    words = ("--trainer.max_steps", "2", "--trainer.warmup_steps", "0")
    stage1 = train("debug/pretrain", "out/stage1", *LAB, *words)
    assert not (stage1 / "model.safetensors").exists()
    assert read_manifest(stage1)["kind"] == "projector"
    projector = load_file(stage1 / "projector.safetensors")
    kept = load_file(stage1 / "checkpoint-2/trainable.safetensors")
    assert set(kept) == {f"projector.{name}" for name in projector}

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folders)
        model, processor = load_pretrained(stage1)
    assert all(torch.equal(projector[k], v) for k, v in model.projector.state_dict().items())
    tower = load_file(folders / "tower/model.safetensors")
    found = model.vision_tower.state_dict()
    assert torch.equal(
        found["layers.0.mlp.fc1.weight"], tower["encoder.layers.0.mlp.fc1.weight"]
    ) or torch.equal(
        found["layers.0.mlp.fc1.weight"], tower["vision_model.encoder.layers.0.mlp.fc1.weight"]
    )
    assert processor.template_name == "plain"

    still = ("--trainer.learning_rate", "0", "--model.projector_file", "out/stage1")
    stage2 = train("debug/finetune", "out/stage2", *LAB, *words, *still)
    state = weights(stage2)
    assert all(torch.equal(state[f"projector.{name}"], projector[name]) for name in projector)
    model, processor = load_pretrained(stage2)
    assert processor.template_name == "v1" and not model.generation_config.do_sample
    assert not model.config.projector.train_positions

    more = train(
        "debug/finetune", "out/stage3", *words, "--model.checkpoint", "out/stage2",
        "--trainer.learning_rate", "0", "--model.image.max_slices", "3",
    )  # fmt: skip
    again, processor = load_pretrained(more)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(more).items())
    assert again.config.image.max_slices == processor.image_config.max_slices == 3
    assert again.config.image.scale_resolution == 64


def test_a_projector_for_another_model_is_refused(train: Train, folders: Path) -> None:
    words = ("--trainer.max_steps", "1")
    train("debug/pretrain", "out/narrow", *LAB, *words, "--model.projector.num_queries", "9")
    with pytest.raises(UserError, match=r"num_queries 9 \(the model has 16\)"):
        train("debug/finetune", "out/wide", *LAB, *words, "--model.projector_file", "out/narrow")


# --- going on -------------------------------------------------------------------------------------

LONG = (
    *FROM_NOTHING, "--trainer.max_steps", "7", "--trainer.save_steps", "2",
    "--data.six_slice_probability", "0.5", "--trainer.save_total_limit", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """Seven steps of four samples: almost two epochs."""
    return run_here(workplace, "debug/finetune", "out/unbroken", *LONG)


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    # A folder of its own: the processes also share the drawing of the data.
    process = start(tmp_path, "debug/finetune", *words, launcher=launcher)
    try:
        printed, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
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


@pytest.fixture(autouse=True)
def tidy_logging() -> Iterator[None]:
    """The command raises the level of the root logger; later tests want their own."""
    import logging

    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
