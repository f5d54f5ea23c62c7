"""The tutorial is clean, complete and in step with the package; CI runs it on a real checkpoint."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

TOPICS = ("Load", "One image", "Several images", "Video", "Many prompts", "Fine-tune", "Convert")


@pytest.fixture(scope="module")
def cells(root: Path) -> list[dict[str, Any]]:
    notebook = json.loads((root / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = notebook["cells"]
    return found


def sources(cells: list[dict[str, Any]], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_every_topic_has_its_heading(cells: list[dict[str, Any]]) -> None:
    text = "\n".join(sources(cells, "markdown"))
    for topic in TOPICS:
        assert f"\n## {topic}" in text or text.startswith(f"## {topic}"), topic


def test_no_outputs_are_stored(cells: list[dict[str, Any]]) -> None:
    """They would hold the paths of somebody's machine, and grow old."""
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_imported_names_exist(cells: list[dict[str, Any]]) -> None:
    imported = 0
    for source in sources(cells, "code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llava_uhd"):
                module = __import__(str(node.module), fromlist=["_"])
                for name in node.names:
                    assert hasattr(module, name.name), (node.module, name.name)
                    imported += 1
    assert imported >= 4


def test_ci_runs_it(root: Path) -> None:
    assert "docs/tutorial.ipynb" in (root / ".ci/run").read_text(encoding="utf-8")
