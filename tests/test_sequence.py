"""Both stages and the evaluation in a row: what is run, what is left out, what is linked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_runs import ROOT, run_here

from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.data.synthetic import embedded_split
from llava_uhd.errors import UserError
from llava_uhd.train import sequence
from llava_uhd.train.sequence import Plan, make_plan, recipe_sets, run

SCRIPTS = Path("scripts")
DEBUG = ("--debug", "--trainer.max_steps", "1")


def plan_of(text: str) -> Plan:
    name, *words = text.split()
    return make_plan(name, words)


def test_sets_are_pairs_of_recipes() -> None:
    sets = recipe_sets()
    assert sets["uhd_v2/vicuna7b"] == ("uhd_v2/pretrain_vicuna7b", "uhd_v2/finetune_vicuna7b")
    assert sets["debug"] == ("debug/pretrain", "debug/finetune")
    assert {"uhd_v1/vicuna13b", "uhd_v2/qwen2_7b", "quickstart"} <= set(sets)
    assert "quickstart/blurred" not in sets, "it has no first stage of its own"
    assert {"llava_1_5/vicuna7b", "llava_1_5/vicuna13b"} <= set(sets)
    stages = ("stage1", "stage1_5", "stage2_si", "stage2_ov")
    for size in ("0_5b", "7b", "72b"):
        expected = tuple(f"onevision/{stage}_qwen2_{size}" for stage in stages)
        assert sets[f"onevision/qwen2_{size}"] == expected
    assert not any("lora" in name or "task" in name for name in sets)


def test_a_set_without_options_is_its_recipes() -> None:
    plan = plan_of("uhd_v2/vicuna7b")
    assert [step.options for step in plan.steps] == [[], []]
    assert plan.evaluate is None
    assert plan_of("uhd_v1/vicuna7b --evaluate").evaluate == []
    # The second stage of this one goes on from a whole checkpoint.
    assert plan_of("quickstart").steps[1].options == []


def test_options_go_where_they_belong() -> None:
    first, second = plan_of(
        "uhd_v2/vicuna7b --data.max_length=2048 --pretrain.learning_rate 1e-4 --feature_mode uhd_v1"
        " --finetune.data.path a.json b.json --bf16"
    ).steps
    shared = ["--data.max_length", "2048", "--feature_mode", "uhd_v1", "--bf16"]
    assert first.options == [*shared[:2], "--learning_rate", "1e-4", *shared[2:]]
    assert second.options == [*shared[:4], "--data.path", "a.json", "b.json", "--bf16"]
    assert second.recipe.model.projector_file == first.recipe.output_dir
    for words in ("--output_dir out/", "--trainer.output_dir=out"):
        plan = plan_of(f"uhd_v1/vicuna7b {words}")
        assert [step.recipe.output_dir for step in plan.steps] == ["out-pretrain", "out"]
        assert plan.steps[1].recipe.model.projector_file == "out-pretrain"


def test_the_second_stage_reads_the_first() -> None:
    for name in ("uhd_v2/qwen2_7b", "uhd_v1/vicuna7b", "debug"):
        first, second = plan_of(f"{name} --debug").steps
        assert second.recipe.model.projector_file == first.recipe.output_dir
    moved = plan_of("quickstart --pretrain.output_dir elsewhere").steps[1]
    assert moved.options == ["--model.checkpoint", "elsewhere"]
    for flag in ("model.projector_file", "pretrain_mm_mlp_adapter"):
        given = plan_of(f"uhd_v1/vicuna7b --finetune.{flag} mine").steps[1]
        assert given.recipe.model.projector_file == "mine"


def test_four_stages_in_a_row() -> None:
    plan = plan_of("onevision/qwen2_7b")
    assert [step.options for step in plan.steps] == [[], [], [], []], "the recipes are linked"
    words = "--stage2_si.learning_rate 1e-6 --stage1.data.path a.json --output_dir out --bf16"
    plan = plan_of(f"onevision/qwen2_0_5b {words}")
    recipes = [step.recipe for step in plan.steps]
    folders = ["out-stage1", "out-stage1_5", "out-stage2_si", "out"]
    assert [recipe.output_dir for recipe in recipes] == folders
    assert [recipe.trainer.arguments["learning_rate"] for recipe in recipes] == [
        1e-3,
        1e-5,
        1e-6,
        1e-5,
    ]
    assert recipes[0].data.path == "a.json" != recipes[1].data.path
    assert recipes[1].model.projector_file == "out-stage1"
    assert [recipe.model.checkpoint for recipe in recipes[2:]] == folders[1:3]
    assert recipes[2].model.image.max_tiles == 9, "what the recipe sets beside it stays"
    moved = plan_of("onevision/qwen2_7b --stage1_5.output_dir elsewhere").steps
    assert moved[1].recipe.output_dir == moved[2].recipe.model.checkpoint == "elsewhere"
    assert moved[3].options == []


def test_four_stages_at_debug_size() -> None:
    recipes = [step.recipe for step in plan_of("onevision/qwen2_7b --debug").steps]
    folders = [recipe.output_dir for recipe in recipes]
    assert all(folder.startswith("checkpoints/debug/onevision/") for folder in folders)
    assert recipes[1].model.projector_file == folders[0] and recipes[1].model.checkpoint is None
    assert [recipe.model.checkpoint for recipe in recipes[2:]] == folders[1:3]


def test_the_evaluation() -> None:
    words = "--evaluate a,b --evaluate.limit 5"
    assert plan_of(f"uhd_v2/vicuna7b {words}").evaluate == ["--tasks", "a,b", "--limit", "5"]
    again = plan_of("uhd_v2/vicuna7b --evaluate a --evaluate")
    assert again.evaluate == ["--tasks", "a"], "as model-train.sh adds it"
    embedded = plan_of("uhd_v2/vicuna7b --debug --evaluate")
    assert embedded.evaluate == ["--tasks", "synthetic", "--data-root", "playground/data/debug"]
    named = plan_of("uhd_v2/vicuna7b --debug --evaluate synthetic").evaluate
    assert named == embedded.evaluate
    other = plan_of("debug --evaluate --evaluate.data-root here").evaluate
    assert other == ["--tasks", "synthetic", "--data-root", "here"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uhd_v2/vicuna_7b", "unknown recipe set .* did you mean 'uhd_v2/vicuna7b'"),
        ("uhd_v2/pretrain_vicuna7b", "unknown recipe set"),
        ("debug stray", "'stray' belongs to no option"),
        ("debug --evaluate.limit 5", "--evaluate.limit needs --evaluate"),
        ("debug --learning_rte 1", "unknown option '--learning_rte'"),
        ("debug --finetune.lerning_rate 1", "unknown option '--lerning_rate'"),
        ("onevision/qwen2_7b --finetune.learning_rate 1", "unknown key 'finetune.learning_rate'"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_of(text)
    assert "\n" not in str(caught.value)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None], list[tuple[str, ...]]]:
    """Runs the stages in this process; the script named is the one that fails."""
    embedded_split("debug", "pretrain", tmp_path / "playground/data")
    monkeypatch.chdir(tmp_path)

    def run_all(failing: str | None = None) -> list[tuple[str, ...]]:
        seen = []

        def call(script: Path, *words: str) -> int:
            seen.append((script.name, *words))
            if script.name == failing:
                return 7
            if script.name != "eval.sh":
                folder = "out" if script.name == "finetune.sh" else "out-pretrain"
                run_here(tmp_path, words[0], folder, *words[1:])
            return 0

        monkeypatch.setattr(sequence, "call", call)
        words = (*DEBUG, "--output_dir", "out", "--disable_tqdm", "true", "--evaluate", "a")
        status = run(make_plan("uhd_v1/vicuna7b", words), SCRIPTS)
        assert status == (7 if failing else 0)
        return seen

    return run_all


def test_what_is_finished_is_not_done_again(
    calls: Callable[..., list[tuple[str, ...]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = calls("finetune.sh")
    assert [each[:2] for each in broken] == [
        ("pretrain.sh", "uhd_v1/pretrain_vicuna7b"),
        ("finetune.sh", "uhd_v1/finetune_vicuna7b"),
    ]
    before = (tmp_path / "out-pretrain/log.jsonl").read_bytes()
    capsys.readouterr()
    again = calls()
    assert [each[0] for each in again] == ["finetune.sh", "eval.sh"]
    assert again[1] == ("eval.sh", "out", "--tasks", "a")
    told = capsys.readouterr().out
    assert "uhd_v1/pretrain_vicuna7b: finished (out-pretrain), not trained again" in told
    assert (tmp_path / "out-pretrain/log.jsonl").read_bytes() == before
    assert read_manifest(tmp_path / "out")["finished"]
    # A recipe written before a key existed is the same run as one with the key's default.
    file = tmp_path / "out/recipe.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "textvqa_only_enlarge" not in line))
    assert len(file.read_text().splitlines()) == len(lines) - 1
    # The second stage is enough: the first one's folder may be gone.
    (tmp_path / "out-pretrain").rename(tmp_path / "gone")
    assert calls() == [("eval.sh", "out", "--tasks", "a")]
    assert capsys.readouterr().out.count("not trained again") == 2


def test_a_failure_ends_the_sequence(calls: Callable[..., list[tuple[str, ...]]]) -> None:
    assert [each[0] for each in calls("pretrain.sh")] == ["pretrain.sh"]


def test_status_of_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    for text, status in (("exit 0", 0), ("exit 2", 2), ("kill -9 $$", 137)):
        script.write_text(text)
        assert sequence.call(script) == status


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    words = ["sh", "model-train.sh", "uhd_v2/qwen2_7b", *DEBUG, "--evaluate.limit", "2"]
    words += ["--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    for trained in (True, False):
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("not trained again") == (0 if trained else 2)
        assert (tmp_path / "out/eval/results.md").is_file()
    assert (tmp_path / "out-pretrain/llava_uhd.json").is_file()
