"""The report of the quickstart, and its steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fixtures_runs import FROM_NOTHING, run_here

from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.recipe import load_recipe
from llava_uhd.config.vdim import load_vdim_recipe
from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main as evaluate
from llava_uhd.quickstart import __main__ as quickstart
from llava_uhd.quickstart.report import Arm, write_report
from llava_uhd.quickstart.systems import SYSTEMS


@pytest.mark.slow
def test_report_of_a_debug_run(tmp_path: Path) -> None:
    folder = run_here(tmp_path, "debug/finetune", "run", *FROM_NOTHING)
    data = tmp_path / "playground" / "data" / "debug"
    words = ["run", str(folder), "--tasks", "synthetic", "--data-root", str(data)]
    assert evaluate([*words, "--device", "cpu"]) == 0
    arm = Arm(folder, "slices <native>", "as they are")
    html = write_report(folder, [arm], folder, {"finetune": 12.4}).read_text(encoding="utf-8")
    # What comes from outside is escaped, pictures are inside the file, nothing is fetched.
    assert "slices &lt;native&gt;" in html
    assert "slices <native>" not in html
    pictures = re.findall(r'<img src="data:image/png;base64,([A-Za-z0-9+/=]+)"', html)
    assert len(pictures) >= 5
    assert not re.search(r'(?:src|href)="https?:', html)
    items = (folder / "eval" / "synthetic" / "items.jsonl").read_text(encoding="utf-8")
    signs = [row for row in map(json.loads, items.splitlines()) if "sign_exact" in row["metrics"]]
    wrong = [row for row in signs if row["metrics"]["sign_exact"] == 0]
    assert html.count('class="card wrong"') == min(len(wrong), 6)
    assert ">12</td>" in html
    with quickstart.console.capture() as printed:
        quickstart.show_scores([arm])
    assert re.search(r"slices <native>.*\d\.\d{3}.*\d\.\d{3}.*\d\.\d{3}", printed.get())


@pytest.mark.parametrize("name", SYSTEMS.names())
def test_steps_are_commands_that_exist(name: str) -> None:
    system = SYSTEMS.get(name)
    for reading in (system.main, *system.controls):
        load_recipe(reading.recipe, ["--model.checkpoint", "x", *quickstart.SHORT])
    run = quickstart.Run(system, Path("out"), short=True, seed=3)
    module, recipe, *words = quickstart.train_command(run, system.pretrain, run.pretrained)
    assert module == "llava_uhd.train"
    resolved = load_recipe(recipe, words)
    assert describe_recipe(resolved).text_config.num_hidden_layers == {"llavolta": 4}.get(name, 2)
    assert resolved.trainer.arguments["seed"] == 3
    assert resolved.trainer.arguments["max_steps"] == 6
    assert resolved.output_dir == str(run.pretrained)
    if system.vdim is not None:
        module, recipe, *words = quickstart.train_command(run, system.vdim, run.vdim)
        assert module == "llava_uhd.train.vdim"
        upsampler = load_vdim_recipe(recipe, words)
        assert upsampler.output_dir == str(run.vdim)
        assert upsampler.trainer.arguments["max_steps"] == 6
        # The command line names it again; typed by itself the recipe finds it, too.
        recorded = load_recipe(system.pretrain).model.upsampler_file
        assert recorded == f"checkpoints/{system.vdim_folder}"


def test_unknown_system_and_arms_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in ((["uhd_v3"], "uhd_v1, uhd_v2"), (["uhd_v2", "--compare"], "no control")):
        monkeypatch.setattr("sys.argv", ["quickstart", *words])
        with pytest.raises(UserError, match=message):
            quickstart.parse()


def test_a_failed_step_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = quickstart.Run(SYSTEMS.get("uhd_v1"), tmp_path, short=True, seed=None)
    with pytest.raises(UserError, match=r"ended with status 2.*goes on from there"):
        quickstart.step(run, "eval", "Evaluate", ["llava_uhd.eval", "run", str(tmp_path / "none")])
    assert not run.times_file.exists()


def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert quickstart.environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert quickstart.environment()["OMP_WAIT_POLICY"] == "ACTIVE"
