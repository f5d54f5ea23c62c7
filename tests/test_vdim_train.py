"""VDIM pre-training: the command, resuming, several processes, what is written and measured."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures_runs
import pytest
import torch
from fixtures_runs import ROOT, steps
from fixtures_tiny import picture
from PIL import Image
from safetensors.torch import load_file

from llava_uhd.checkpoint.manifest import MANIFEST_FILE, read_manifest
from llava_uhd.checkpoint.vdim import read_vdim, vdim_facts
from llava_uhd.config.recipe import list_recipes
from llava_uhd.config.vdim import load_vdim_recipe
from llava_uhd.errors import UserError
from llava_uhd.train.log import LOG_FILE
from llava_uhd.train.vdim import __main__ as command
from llava_uhd.train.vdim.build import build_module, build_transform
from llava_uhd.train.vdim.data import open_pictures
from llava_uhd.train.vdim.measure import (
    agreement,
    enlarged_target,
    measure,
    resized,
    shifted_target,
)
from llava_uhd.train.vdim.module import TowerFeatures

DEBUG = "vdim/debug"
CALM = ("--data.photographs", "false", "--trainer.disable_tqdm", "true")


def run_here(workplace: Path, output: str, *words: str, recipe: str = DEBUG) -> Path:
    """One run inside this process."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.chdir(workplace)
        given = [*CALM, *words, "--trainer.output_dir", output]
        patched.setattr(sys, "argv", ["vdim", recipe, *given])
        command.main()
    return workplace / output


def start(workplace: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "llava_uhd.train.vdim", DEBUG, *CALM, *words],
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def break_at(step: int, workplace: Path, output: str, *words: str) -> None:
    """Runs until the given step has been logged."""
    fixtures_runs.break_at(step, lambda *given: run_here(workplace, output, *given), *words)


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "vdim.safetensors"), **load_file(folder / "heads.safetensors")}


def assert_same_run(first: Path, second: Path) -> None:
    assert steps(first) == steps(second)
    before, after = learned(first), learned(second)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vdim")


@pytest.fixture(autouse=True)
def tidy_logging() -> Iterator[None]:
    """The command raises the level of the root logger; later tests want their own."""
    import logging

    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


LONG = ("--trainer.max_steps", "7", "--trainer.save_steps", "2")


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    """Seven steps of four pictures: almost two epochs."""
    return run_here(workplace, "out/unbroken", *LONG)


# --- the command ----------------------------------------------------------------------------------


def test_what_a_run_writes(unbroken: Path) -> None:
    assert {re.name for re in unbroken.iterdir() if not re.name.startswith("checkpoint-")} == {
        "recipe.yaml", "llava_uhd.json", "log.jsonl", "loss.png", "measure.json", "measure.md",
        "pictures", "vdim.safetensors", "vdim.ckpt", "heads.safetensors",
    }  # fmt: skip
    manifest = read_manifest(unbroken)
    assert manifest["finished"] and manifest["steps"] == 7 and manifest["scale"] == 4
    assert vdim_facts(unbroken)["scale"] == "4" and vdim_facts(unbroken)["width"] == "32"
    ours = read_vdim(unbroken / "vdim.safetensors", 32, 4)
    published = read_vdim(unbroken / "vdim.ckpt", 32, 4)
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[name], published[name]) for name in ours)
    heads = load_file(unbroken / "heads.safetensors")
    assert {"downsampler.w", "downsampler_2x.w", "scale_net.net.weight"} < heads.keys()
    entry = steps(unbroken)[-1]
    names = {"rec_4x", "rec_2x", "rec_1x", "crf_4x", "crf_2x", "tv", "ent", "total"}
    assert {f"loss/{name}" for name in names} < entry.keys()
    assert entry["loss"] == pytest.approx(entry["loss/total"] + entry["loss/rec_1x"], abs=1e-4)
    with Image.open(unbroken / "pictures/step-000007.png") as shown:
        assert shown.width > 4 * 200 and shown.height > 2 * 200
    rows = json.loads((unbroken / "measure.json").read_text())[-1]["rows"]
    assert [row["candidate"] for row in rows if row["group"] == "tiles"] == [
        "learned 4x", "learned 2x", "bilinear", "bicubic", "bilinear, 4x head",
    ]  # fmt: skip
    assert "| 4 tiles | learned 4x |" in (unbroken / "measure.md").read_text()


def test_a_finished_run_says_so(
    workplace: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    run_here(workplace, "out/unbroken", *LONG)
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    with pytest.raises(UserError, match=r"vdim\.n_jitters was 2, is 3"):
        run_here(workplace, "out/unbroken", *LONG, "--vdim.n_jitters", "3")


def test_a_finished_run_is_measured_again(
    workplace: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_manifest(unbroken)["measured"]
    words = ["vdim", str(unbroken / "recipe.yaml"), "--measure", str(unbroken), *CALM]
    monkeypatch.setattr(sys, "argv", words)
    assert command.measure_finished(*arguments_of(command.parse())) == rows
    monkeypatch.setattr(sys, "argv", [*words, "--vdim.scale", "2"])
    with pytest.raises(UserError, match="does not hold the 2x upsampler of width 32"):
        command.main()


def arguments_of(parsed: Any) -> tuple[Any, Any, Path]:
    recipe, folder = parsed
    return recipe, command.vdim_arguments(recipe), folder


@pytest.mark.parametrize("recipe", list_recipes("vdim/"))
def test_every_recipe_runs_a_step_in_debug_size(workplace: Path, recipe: str) -> None:
    words = ["--trainer.max_steps", "1"] + ([] if recipe == DEBUG else ["--debug"])
    folder = run_here(workplace, f"out/each/{recipe}", *words, recipe=recipe)
    assert len(steps(folder)) == 1 and read_manifest(folder)["finished"]


@pytest.mark.parametrize(
    "words",
    [
        ["--vdim.scale", "2"],
        ["--vdim.scale", "8", "--vdim.detach", "true"],
        ["--vdim.scale", "8", "--vdim.control", "false"],
        ["--vdim.downsampler", "simple", "--vdim.filter_ent_weight", "0.01"],
        ["--vdim.predicted_uncertainty", "false", "--vdim.tv_weight", "0.1"],
        ["--tower.path", "{model_type: siglip_vision_model, hidden_size: 24, intermediate_size: "
         "48, num_hidden_layers: 2, num_attention_heads: 2, image_size: 32, patch_size: 8}"],
    ],
)  # fmt: skip
def test_variants_learn(workplace: Path, words: list[str]) -> None:
    """Every parameter of the stack and of every head moves."""
    name = "-".join(words).replace("/", "").replace(" ", "")[:40]
    recipe = load_vdim_recipe(DEBUG, [*words, "--data.photographs", "false"])
    before = build_module(recipe).state_dict()
    folder = run_here(workplace, f"out/variants/{name}", *words, "--trainer.max_steps", "2")
    state = load_file(folder / "checkpoint-2/trainable.safetensors")
    still = {key for key, tensor in state.items() if torch.equal(tensor, before[key])}
    if recipe.vdim.scale == 8:  # only the published plain call uses it
        still -= {"upsampler.fixup_proj.1.weight", "upsampler.fixup_proj.1.bias"}
    # A constant added to all logits of a softmax changes little or nothing.
    assert all("attention_net.1.bias" in key for key in still), still


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tower.path", "./gone"], "vision tower ./gone does not exist"),
        (["--data.folder", "gone"], "data.folder gone does not exist"),
        (["--data.root", "gone"], "data.root must hold cocostuff"),
        (["--data.res", "36"], "data.res 36 is no multiple of the tower's patch of 8 pixels: use"),
        (["--trainer.global_batch_size", "7"], "global_batch_size 7"),
    ],
)
def test_mistakes_leave_no_output_folder(workplace: Path, words: list[str], message: str) -> None:
    if "7" in words:
        words = [*words, "--trainer.gradient_accumulation_steps", "2"]
    with pytest.raises(UserError, match=message) as caught:
        run_here(workplace, "out/mistake", *words)
    assert "\n" not in str(caught.value)
    assert not (workplace / "out/mistake").exists()


def test_a_broken_picture_ends_the_run_with_its_name(workplace: Path, tmp_path: Path) -> None:
    for index in range(6):
        picture(40, 40, index).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:80])
    with pytest.raises(UserError, match=r"2\.png"):
        run_here(workplace, "out/broken_picture", "--data.folder", str(tmp_path))


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 7])
def test_going_on_gives_the_unbroken_run(workplace: Path, unbroken: Path, step: int) -> None:
    output = f"out/broken_{step}"
    break_at(step, workplace, output, *LONG)
    assert_same_run(unbroken, run_here(workplace, output, *LONG))


@pytest.mark.slow
def test_killed_in_the_middle(workplace: Path, unbroken: Path) -> None:
    output = workplace / "out/killed"
    process = start(workplace, *LONG, "--trainer.output_dir", "out/killed")
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
    assert_same_run(unbroken, run_here(workplace, "out/killed", *LONG))
    assert not half.exists()


def test_going_on_measures_and_draws_again(workplace: Path) -> None:
    words = (*LONG, "--vdim.measure_every", "3", "--vdim.picture_every", "3",
             "--data.crop", "random", "--trainer.dataloader_num_workers", "1")  # fmt: skip
    break_at(5, workplace, "out/watched", *words)
    broken = run_here(workplace, "out/watched", *words)
    whole = run_here(workplace, "out/watched_unbroken", *words)
    assert_same_run(whole, broken)
    found = [json.loads((folder / "measure.json").read_text()) for folder in (whole, broken)]
    assert found[0] == found[1] and [entry["step"] for entry in found[0]] == [3, 6, 7]
    names = {path.name for path in (whole / "pictures").iterdir()}
    assert names == {f"step-00000{step}.png" for step in (3, 6, 7)}


def test_measuring_does_not_change_the_run(workplace: Path, unbroken: Path) -> None:
    words = (*LONG, "--vdim.measure_every", "1", "--vdim.picture_every", "2")
    assert_same_run(unbroken, run_here(workplace, "out/measured", *words))


def test_the_control_changes_nothing_else(workplace: Path, unbroken: Path) -> None:
    other = learned(run_here(workplace, "out/alone", *LONG, "--vdim.control", "false"))
    own = learned(unbroken)
    assert own.keys() - other.keys() == {key for key in own if "_1x." in key} != set()
    assert all(torch.equal(own[key], tensor) for key, tensor in other.items())


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(workplace: Path, tmp_path: Path) -> None:
    words = ("--trainer.per_device_train_batch_size", "2")
    alone = run_here(workplace, "out/one_process", *words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    process = start(tmp_path, *words, launcher=launcher)
    try:
        printed, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    assert "global batch 4 = 2 per device x 1 accumulated x 2 devices" in printed
    together = tmp_path / "checkpoints/vdim/debug"
    for first, second in zip(steps(alone), steps(together), strict=True):
        for key in ("loss", "grad_norm", "loss/rec_4x", "loss/crf_2x", "loss/total"):
            assert first[key] == pytest.approx(second[key], rel=1e-3, abs=1e-4), key
    before, after = learned(alone), learned(together)
    assert all(torch.allclose(before[k], after[k], atol=1e-4) for k in before)


# --- measuring ------------------------------------------------------------------------------------


class Mean(TowerFeatures):
    """A featuriser that averages patches: what it says between patches is known."""

    def __init__(self, patch: int) -> None:
        torch.nn.Module.__init__(self)
        self.patch, self.width = patch, 3

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pictures, self.patch)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_shifted_targets_are_patches_between_patches(scale: int) -> None:
    pictures = torch.randn(2, 3, 32, 40)
    target = shifted_target(Mean(8), pictures, scale)
    assert target.shape == (2, 3, 4 * scale, 5 * scale)
    # The middle of pixel (u, v) of the target, in pixels of the picture.
    u, v = 2 * scale - 1, 3 * scale
    row, column = (u + 0.5) * 8 / scale, (v + 0.5) * 8 / scale
    top, left = round(row - 4), round(column - 4)
    expected = pictures[..., top : top + 8, left : left + 8].mean((-1, -2))
    torch.testing.assert_close(target[..., u, v], expected)


def test_enlarged_targets_are_features_of_quarters() -> None:
    pictures = torch.randn(1, 3, 32, 32)
    target = enlarged_target(Mean(8), pictures)
    assert target.shape == (1, 3, 8, 8)
    twice = torch.nn.functional.interpolate(pictures, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(target, torch.nn.functional.avg_pool2d(twice, 8))


def test_agreement_of_a_map_with_itself_and_with_its_mean() -> None:
    target = torch.randn(2, 5, 8, 8)
    error, cosine = agreement(target, target, 2)
    assert error == 0 and cosine == pytest.approx(1)
    mean = target[..., 2:-2, 2:-2].mean((0, 2, 3), keepdim=True).expand_as(target)
    assert agreement(mean, target, 2)[0] == pytest.approx(1)
    assert resized(target, torch.zeros(2, 5, 4, 4), "bilinear").shape[-1] == 4


def test_measurements_are_repeatable_and_see_every_candidate_alike() -> None:
    recipe = load_vdim_recipe(DEBUG, ["--vdim.measure_views", "3"])
    module = build_module(recipe)
    transform = build_transform(recipe, module)
    groups = {"some": open_pictures(recipe.data).train[:3]}
    first = measure(module, groups, transform, 2)
    assert first == measure(module, groups, transform, 2) and module.training
    assert all(0 < row["error"] < 10 and row["pictures"] == 3 for row in first)
    by_name = {row["candidate"]: row for row in first}
    # A head like the learned map's gives the plain features the same loss.
    module.heads["1x"].load_state_dict(module.heads["4x"].state_dict())
    again = {row["candidate"]: row for row in measure(module, groups, transform, 2)}
    assert again["bilinear"]["loss"] == pytest.approx(again["bilinear, 4x head"]["loss"])
    assert again["learned 4x"] == by_name["learned 4x"]
    assert again["bilinear"]["shifted_error"] == by_name["bilinear"]["shifted_error"]


@pytest.mark.slow
def test_learning_beats_bilinear_enlargement(workplace: Path) -> None:
    """The upsampler of the demonstration's tower, briefly, on the embedded tiles."""
    tower = str(ROOT / "llava_uhd/assets/demo_tower")
    words = ("--tower.path", tower, "--trainer.max_steps", "40", "--trainer.global_batch_size", "8",
             "--trainer.per_device_train_batch_size", "8", "--data.held_out", "8",
             "--data.embedded", "quickstart", "--data.res", "64", "--vdim.max_pad", "6",
             "--vdim.crf_points", "50", "--trainer.save_strategy", "no")  # fmt: skip
    folder = run_here(workplace, "out/learning", *words, recipe="vdim/quickstart")
    rows = read_manifest(folder)["measured"]
    loss = {row["candidate"]: row["loss"] for row in rows if row["group"] == "leaves"}
    assert loss["learned 4x"] < loss["bilinear"] and loss["learned 4x"] < loss["bicubic"]
