"""What docs/interfaces.md promises exists, and what exists is promised."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llava_uhd
from llava_uhd.config import model as model_config
from llava_uhd.config import training
from llava_uhd.config.aliases import ALIASES
from llava_uhd.config.recipe import list_recipes, recipes_root
from llava_uhd.images.strategies import IMAGE_STRATEGIES
from llava_uhd.projectors import PROJECTORS
from llava_uhd.text.templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/interfaces.md").read_text(encoding="utf-8")

SECTIONS = {
    "model": training.ModelSection,
    "model.projector": model_config.ProjectorConfig,
    "model.image": model_config.ImageConfig,
    "data": training.DataConfig,
    "stage": training.StageConfig,
    "trainer": training.TrainerConfig,
    "compression": model_config.CompressionConfig,
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


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_command_explains_itself(module: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout.lower()


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
    assert set(table("Recipes")) == files == set(list_recipes())


def shown(field: dataclasses.Field[Any]) -> str:
    """A default as the page writes it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value in (model_config.CLIP_MEAN, model_config.CLIP_STD):
        return "CLIP's"
    return "-" if value == {} else json.dumps(value).strip('"')


@pytest.mark.parametrize(("section", "kind"), SECTIONS.items())
def test_keys_and_defaults(section: str, kind: type) -> None:
    fields = {
        f"{section}.{field.name}": field
        for field in dataclasses.fields(kind)
        if f"{section}.{field.name}" not in SECTIONS and "open_keys" not in field.metadata
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
    for section in ("projector", "image"):
        keys = {key.rpartition(".")[2] for key in table(f"model.{section}")}
        assert set(values[section]) == keys
    assert {"vision_config", "text_config", "template", "select_layer"} < set(values)


def test_registered_names() -> None:
    documented = {(cells[0], name) for name, cells in table("Registered names").items()}
    found = {("image strategy", name) for name in IMAGE_STRATEGIES}
    found |= {("projector", name) for name in PROJECTORS}
    found |= {("template", name) for name in TEMPLATES}
    assert documented == found


def test_published_flags() -> None:
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    documented = table("Published flags", page)
    assert set(documented) == {f"--{name}" for name in ALIASES}
    for name, (meaning, *_) in documented.items():
        alias = ALIASES.get(name.removeprefix("--"))
        assert alias.key is None or meaning.startswith(f"`--{alias.key}`")
        assert alias.inert is None or meaning.startswith("no effect")
