"""The published commands of LLaVolta: each of them, what it asks for, and where things go."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_runs import ROOT

from llava_uhd.checkpoint.compression import lay_over, read_options
from llava_uhd.config.compression import CompressionConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main, parse_arguments
from llava_uhd.eval.tasks import find_task
from llava_uhd.train.sequence import make_plan, recipe_sets

PLACE = ROOT / "scripts/v1_5"
SCHEMES = ("4stage", "heavy-compression", "light-compression", "reproduce")
TASK_NAMES = ("gqa", "llavabench", "mmbench", "mmbench_cn", "mme", "mmvet")
TASK_NAMES += ("pope", "seed", "sqa", "textvqa", "vizwiz", "vqav2")
# Compression at inference: layer and stride.
INFERENCE = {"heavy-compression": (2, 8), "light-compression": (16, 8)}
VARIABLES = ("NAME", "ROOT_DATA", "ROOT_WEIGHT", "ROOT_LOG", "NPROC", "NNODES", "MASTER_PORT")

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Runs a script in an empty folder, with this interpreter or with a stand-in that is quick."""

    def run(
        script: str,
        *words: str,
        python: str = "",
        place: Path | None = PLACE,
        cwd: Path | None = None,
        **more: str,
    ) -> object:
        prefix = sys.prefix
        if python:
            file = tmp_path / "env/bin/python"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'#!/bin/sh\ncase "$1" in -c) exit 0 ;; esac\n{python}\n')
            file.chmod(0o755)
            prefix = str(tmp_path / "env")
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        environment = {**kept, "VIRTUAL_ENV": prefix, "NPROC": "1", **more}
        shell = "sh" if python else "bash"
        return subprocess.run(
            [shell, str(place / script if place else script), *words],
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run  # type: ignore[return-value]


def commands(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Modules and words of the commands that were printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for line in done.stdout.splitlines():
        if not line.startswith("# "):
            go, there, then, python, option, *words = shlex.split(line)
            assert [go, there, then, option] == ["cd", str(ROOT), "&&", "-m"]
            assert python.endswith("/bin/python")
            found.append(words)
    return found


# What a stand-in does to tell what it was asked for.
TELL = "printf '%s\\n' \"$@\""


def recipes(done: subprocess.CompletedProcess[str]) -> list[Recipe]:
    """Recipes of the stages that a training script asks for (through `TELL`)."""
    assert done.returncode == 0, done.stdout + done.stderr
    option, module, name, *words = done.stdout.splitlines()
    assert (option, module) == ("-m", "llava_uhd.train.sequence")
    return [step.recipe for step in make_plan(name, words).steps]


# --- the files ------------------------------------------------------------------------------------


def test_every_published_command_is_here() -> None:
    trained = {path.name for path in PLACE.glob("train-*.sh")}
    assert trained == {f"train-{scheme}.sh" for scheme in SCHEMES}
    folders = {scheme.replace("-", "_") for scheme in SCHEMES}
    assert {path.name for path in (PLACE / "eval").iterdir()} == folders
    for folder in folders:
        found = {path.stem for path in (PLACE / "eval" / folder).iterdir()}
        assert found == set(TASK_NAMES)
    files = [*PLACE.glob("*.sh"), *PLACE.glob("eval/*/*.sh")]
    assert len(files) == 1 + 4 + 48
    for path in files:
        assert os.access(path, os.X_OK)
        subprocess.run(["sh", "-n", str(path)], check=True)
        if path.name != "_forward.sh":
            assert len(path.read_text().splitlines()) == 2, "all of it stands in one place"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_evaluation(call: Call, scheme: str, task: str) -> None:
    script = f"eval/{scheme.replace('-', '_')}/{task}.sh"
    ((module, *words),) = commands(call(script, "--dry-run", python="exit 9"))
    assert module == "llava_uhd.eval"
    options = parse_arguments(words)
    assert options.checkpoint == str(ROOT / f"checkpoints/llava-v1.5-7b-{scheme}")
    assert (options.tasks, options.data_root) == (task, None)
    expected = CompressionConfig()
    if scheme in INFERENCE:
        expected = CompressionConfig("avgpool1d", *INFERENCE[scheme], "drop", "half")
    # Over a published checkpoint, and over one of ours that compresses by itself.
    for own in (CompressionConfig(), CompressionConfig("avgpool1d", 2, 8, "drop", "half")):
        assert lay_over(own, read_options(options)) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training(call: Call, scheme: str) -> None:
    first, second = recipes(call(f"train-{scheme}.sh", python=TELL))
    recipe = scheme.replace("-", "_")
    assert [first.name, second.name] == [
        f"llavolta/pretrain_{recipe}",
        f"llavolta/finetune_{recipe}",
    ]
    assert first.output_dir == f"checkpoints/llava-v1.5-7b-pretrain-{scheme}"
    assert second.output_dir == f"checkpoints/llava-v1.5-7b-{scheme}"
    assert second.model.projector_file == first.output_dir
    assert first.data.path == "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"


def test_training_without_running_it(call: Call, tmp_path: Path) -> None:
    words = ("--dry-run", "--evaluate", "--evaluate.limit", "3")
    done = call("train-heavy-compression.sh", *words, ROOT_WEIGHT="a b")
    *stages, last = commands(done)
    assert last == ["llava_uhd.eval", "run", f"{tmp_path}/a b/llava-v1.5-7b-heavy-compression",
                    "--limit", "3"]  # fmt: skip
    first, second = (load_recipe(name, options) for _, name, *options in stages)
    assert [module for module, *_ in stages] == ["llava_uhd.train"] * 2
    assert first.output_dir == f"{tmp_path}/a b/llava-v1.5-7b-pretrain-heavy-compression"
    assert second.output_dir == last[2] and second.model.projector_file == first.output_dir
    assert [line.split(":")[0] for line in done.stdout.splitlines()[::2]] == [
        "# llavolta/pretrain_heavy_compression",
        "# llavolta/finetune_heavy_compression",
        f"# evaluating {last[2]}",
    ]
    assert not list(tmp_path.iterdir())


# --- the environment ------------------------------------------------------------------------------


def test_roots_and_name(call: Call, tmp_path: Path) -> None:
    roots = {"ROOT_DATA": "my data", "ROOT_WEIGHT": str(tmp_path / "weights/")}
    words = ("--pretrain.learning_rate", "1e-4", "--data.max_length", "1024")
    script = "train-light-compression.sh"
    first, second = recipes(call(script, *words, python=TELL, NAME="it's", **roots))
    data = f"{tmp_path}/my data"
    assert first.data.path == f"{data}/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    assert first.data.image_folder == f"{data}/LLaVA-Pretrain/images"
    assert second.data.path == f"{data}/LLaVA-Tuning/llava_v1_5_mix665k.json"
    assert second.data.image_folder == f"{data}/LLaVA-Tuning"
    assert first.output_dir == f"{tmp_path}/weights/llava-v1.5-7b-pretrain-it's"
    assert second.output_dir == f"{tmp_path}/weights/llava-v1.5-7b-it's"
    assert second.model.projector_file == first.output_dir
    rates = [recipe.trainer.arguments["learning_rate"] for recipe in (first, second)]
    assert rates == [1e-4, 2e-5] and first.data.max_length == second.data.max_length == 1024
    ((_, *words_),) = commands(
        call("eval/light_compression/pope.sh", "--dry-run", python=":", NAME="it's", **roots)
    )
    options = parse_arguments(words_)
    assert options.checkpoint == second.output_dir
    assert options.data_root == Path(f"{data}/eval")


def test_both_spellings_of_a_name(call: Call, tmp_path: Path) -> None:
    for name in ("heavy_compression", "heavy-compression"):
        second = recipes(call("train-heavy-compression.sh", python=TELL, NAME=name))[1]
        assert second.output_dir == "checkpoints/llava-v1.5-7b-heavy-compression"
    for folder, name in (("a_b", "a-b"), ("a-c", "a_c"), ("a_d", "a_d")):
        (tmp_path / f"weights/llava-v1.5-7b-{folder}").mkdir(parents=True)
        given = {"NAME": name, "ROOT_WEIGHT": "weights"}
        ((_, *words),) = commands(call("eval/4stage/gqa.sh", "--dry-run", python=":", **given))
        found = parse_arguments(words).checkpoint
        assert found == str(tmp_path / f"weights/llava-v1.5-7b-{folder}")


def test_names_that_cannot_be(call: Call) -> None:
    for name, message in (
        ("4stage", "error: NAME=4stage is another scheme: bash scripts/v1_5/train-4stage.sh"),
        ("light_compression", "train-light-compression.sh trains it"),
        ("a/b", "error: NAME=a/b is a path"),
    ):
        done = call("train-reproduce.sh", "--dry-run", python=":", NAME=name)
        assert done.returncode == 2 and message in done.stderr
        assert done.stderr.count("\n") == 1 and not done.stdout


def test_without_a_weight_root_debug_runs_stay_apart(call: Call) -> None:
    first, second = recipes(call("train-4stage.sh", "--debug", python=TELL))
    assert first.output_dir == "checkpoints/debug/llavolta/pretrain_4stage"
    assert second.output_dir == "checkpoints/debug/llavolta/finetune_4stage"


def test_from_within_the_folder(call: Call) -> None:
    for script in ("train-4stage.sh", "eval/light_compression/mme.sh"):
        path = PLACE / script
        whole = call(script, python=TELL)
        short = call(path.name, python=TELL, place=None, cwd=path.parent)
        assert whole.returncode == short.returncode == 0 and whole.stdout == short.stdout


def test_words_of_the_user_go_last(call: Call) -> None:
    def laid(script: str, *words: str) -> CompressionConfig:
        ((_, *asked),) = commands(call(script, "--dry-run", *words, python=":"))
        return lay_over(CompressionConfig(), read_options(parse_arguments(asked)))

    test_time = ("--compression.layer", "16", "--compression.stride=4")
    assert laid("eval/4stage/gqa.sh", *test_time) == CompressionConfig("avgpool1d", 16, 4)
    heavier = laid("eval/heavy_compression/gqa.sh", "--compression.stride", "16")
    assert heavier == CompressionConfig("avgpool1d", 2, 16, "drop", "half")
    off = laid("eval/heavy_compression/gqa.sh", "--compression.method", "none")
    assert off == CompressionConfig()


@pytest.mark.parametrize("script", ["train-4stage.sh", "eval/4stage/gqa.sh"])
def test_what_is_shown_is_also_written(call: Call, tmp_path: Path, script: str) -> None:
    python = "echo shown; echo told >&2; exit 7"
    done = call(script, python=python, ROOT_LOG="my logs")
    assert done.returncode == 7
    assert sorted((done.stdout + done.stderr).split()) == ["shown", "told"]
    (log,) = (tmp_path / "my logs").iterdir()
    assert log.name == {"t": "train-4stage.log", "e": "4stage-gqa.log"}[script[0]]
    assert log.read_text() == "shown\ntold\n"
    call(script, python="exit 0", ROOT_LOG="my logs")
    assert log.read_text() == "shown\ntold\n", "added to, never thrown away"
    assert call(script, python=python).returncode == 7


# --- what is behind them --------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_NAMES)
def test_tasks_without_data(task: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        main(["run", "anywhere", "--tasks", task, "--data-root", str(tmp_path)])
    text = str(caught.value)
    assert f"{find_task(task).name}: {tmp_path}" in text and "is missing; " in text
    assert "\n" not in text


def test_sets_of_llavolta() -> None:
    sets = recipe_sets()
    schemes = [*SCHEMES, "video-4stage"]
    assert {name for name in sets if name.startswith("llavolta/")} == {
        f"llavolta/{scheme.replace('-', '_')}" for scheme in schemes
    }
    for scheme in schemes:
        steps = make_plan(f"llavolta/{scheme}", []).steps
        assert steps == make_plan(f"llavolta/{scheme.replace('-', '_')}", []).steps
        assert [step.options for step in steps] == [[], []], "the recipes are linked"


def test_dry_run_of_the_other_launchers(tmp_path: Path) -> None:
    assert not make_plan("debug", []).dry and make_plan("debug", ["--dry-run"]).dry
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "NPROC": "2"}
    for shell in filter(shutil.which, ("dash", "bash")):
        for script, module in (("pretrain.sh", "llava_uhd.train"), ("eval.sh", "llava_uhd.eval")):
            words = ["a b", "--x", "it's $HOME", "--dry-run", ""]
            done = subprocess.run(
                [shell, str(ROOT / script), *words],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            asked = shlex.split(done.stdout)
            assert asked[4:9] == ["-m", "llava_uhd.launch", "--standalone", "--nproc_per_node", "2"]
            assert asked[9:11] == ["-m", module]
            assert [word for word in asked if word == "a b"] and asked[-3:] == [
                "--x",
                "it's $HOME",
                "",
            ]
