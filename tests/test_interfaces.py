"""What docs/interfaces.md promises exists, and what exists is promised."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llava_uhd
from llava_uhd.config import model as model_config
from llava_uhd.config import training
from llava_uhd.config.aliases import ALIASES
from llava_uhd.config.compression import SCHEDULES
from llava_uhd.config.recipe import list_recipes, recipes_root
from llava_uhd.eval.tasks import TASKS
from llava_uhd.images.strategies import IMAGE_STRATEGIES
from llava_uhd.projectors import PROJECTORS
from llava_uhd.text.templates import TEMPLATES
from llava_uhd.vision.towers import TOWERS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/interfaces.md").read_text(encoding="utf-8")

SECTIONS = {
    "model": training.ModelSection,
    "model.projector": model_config.ProjectorConfig,
    "model.image": model_config.ImageConfig,
    "model.video": model_config.VideoConfig,
    "data": training.DataConfig,
    "stage": training.StageConfig,
    "trainer": training.TrainerConfig,
    "compression": model_config.CompressionConfig,
    "lora": training.LoraSection,
}


def table(heading: str, page: str = PAGE) -> dict[str, list[str]]:
    """First column (its first code word) -> the other columns of the table under a heading."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert match, f"no heading '{heading}'"
    rows = {}
    for line in match.group(1).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = re.match(r"`([^`]+)`", cells[0]) if cells else None
        if name:
            assert name.group(1) not in rows, f"{name.group(1)} stands twice"
            rows[name.group(1)] = cells[1:]
    assert rows, f"no table under '{heading}'"
    return rows


MODULES = [name.removeprefix("python -m ") for name in table("Commands")]


@pytest.mark.parametrize("script", table("Scripts"))
def test_script_exists_and_is_posix(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True)


def test_no_script_is_undocumented() -> None:
    found = {path.name for path in ROOT.glob("*.sh")}
    found |= {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("[!_]*.sh")}
    assert found == set(table("Scripts"))


@pytest.mark.parametrize("module", MODULES)
def test_command_exists(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__")


@pytest.mark.parametrize("module", MODULES)
def test_command_explains_itself(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert leaving.value.code in (0, None)
    assert f"python -m {module}" in capsys.readouterr().out


def test_environment_variables_are_read() -> None:
    files = [ROOT / "install.sh", *(ROOT / "scripts").glob("*.sh"), ROOT / "tests/conftest.py"]
    files += (ROOT / "llava_uhd").rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for name in table("Environment variables"):
        assert re.search(rf"(\${{?|['\"]){name}\b", text), name


def test_public_names() -> None:
    documented = {name.removeprefix("llava_uhd.") for name in table("Python names")}
    assert documented == set(llava_uhd.__all__) - {"__version__"}
    for name in documented:
        assert callable(getattr(llava_uhd, name))


def test_recipes_are_the_files() -> None:
    files = {
        path.relative_to(recipes_root()).with_suffix("").as_posix()
        for path in recipes_root().rglob("*.yaml")
        if not path.relative_to(recipes_root()).as_posix().startswith("_")
    }
    assert set(table("Recipes")) == files == {*list_recipes(), *list_recipes("vdim/")}


def shown(field: dataclasses.Field[Any]) -> str:
    """A default as the page writes it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return "-" if value == {} else json.dumps(value).strip('"')


@pytest.mark.parametrize(("section", "kind"), SECTIONS.items())
def test_keys_and_defaults(section: str, kind: type) -> None:
    fields = {
        f"{section}.{field.name}": field
        for field in dataclasses.fields(kind)
        if field.init
        and f"{section}.{field.name}" not in SECTIONS
        and "open_keys" not in field.metadata
    }
    documented = table(section)
    assert set(documented) == set(fields)
    assert {key: cells[0] for key, cells in documented.items()} == {
        key: shown(field) for key, field in fields.items()
    }


def test_no_recipe_key_is_undocumented() -> None:
    documented = set(table("top level")) - {"base"}
    documented |= {key for section in SECTIONS for key in table(section)}
    fields = {f"trainer.{name}" for name in training.training_argument_types()}
    assert documented == set(training.recipe_keys()) - fields


def test_model_configuration_keys() -> None:
    values = llava_uhd.LlavaUHDConfig().to_dict()
    for section in ("projector", "image", "video"):
        keys = {key.rpartition(".")[2] for key in table(f"model.{section}")}
        assert set(values[section]) == keys
    assert {"vision_config", "text_config", "template", "select_layer"} < set(values)


def test_registered_names() -> None:
    documented = {(cells[0], name) for name, cells in table("Registered names").items()}
    found = {("image strategy", name) for name in IMAGE_STRATEGIES}
    found |= {("projector", name) for name in PROJECTORS}
    found |= {("template", name) for name in TEMPLATES}
    found |= {("vision tower", name) for name in TOWERS}
    found |= {("schedule", name) for name in SCHEDULES}
    found |= {("task", name) for name in TASKS}
    assert documented == found


def test_published_flags() -> None:
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    documented = table("Published flags", page)
    assert set(documented) == {f"--{name}" for name in ALIASES}
    for name, (meaning, *_) in documented.items():
        alias = ALIASES.get(name.removeprefix("--"))
        assert alias.key is None or meaning.startswith(f"`--{alias.key}`")
        assert alias.inert is None or meaning.startswith("no effect")


def run_module(*words: str) -> None:
    """Runs a command of the page."""
    run = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_output_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ["--trainer.output_dir", str(folder), "--trainer.max_steps", "2"]
    run_module("llava_uhd.train", "debug/pretrain", *overrides)
    documented = set(table("of a training run"))
    found = {re.sub(r"-\d+$", "-N", path.name) for path in folder.iterdir()}
    assert found == documented - {"projector.safetensors", "heldout.jsonl", "heldout.html"}
    data = str(tmp_path / "data")
    run_module(
        "llava_uhd.data.synthetic", "--out", data, "--train", "2", "--tiles", "2", "--eval", "2"
    )
    run_module("llava_uhd.eval", "run", str(folder), "--tasks", "synthetic", "--data-root", data)
    documented = set(table("of an evaluation"))
    files = [path for path in (folder / "eval").rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder / "eval")).removeprefix("synthetic/") for path in files}
    # Logs of single processes are joined into one file; there is no file of failures without one.
    found = {name for name in found if not name.startswith("log.rank")}
    assert found == documented - {"failures.jsonl", "submission/"}


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))],
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """Files and headings."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if heading:
            lines = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]
            assert heading in names, f"{target}#{heading}"
