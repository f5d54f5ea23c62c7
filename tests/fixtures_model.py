"""A tiny checkpoint on disk, its embedded questions, and commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def save_tiny(folder: Path, **options: Any) -> Path:
    """Writes a tiny model as a finished checkpoint."""
    # Imported here: every test run reads this file, few need the model.
    from fixtures_tiny import tiny_parts

    from llava_uhd.checkpoint.manifest import write_manifest

    model, processor = tiny_parts(**options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_manifest(folder, kind="model", finished=True)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with random weights; tests must not write into it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedded data with 8 questions about 4 pictures; tests must not write into it."""
    from llava_uhd.data.synthetic import SyntheticConfig, generate

    folder = tmp_path_factory.mktemp("questions")
    generate(folder, SyntheticConfig(tiles=1, train=1, eval=4))
    return folder


def environment(**more: str) -> dict[str, str]:
    """Of a command: the package is found, one thread, no network."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def start(*words: str | Path, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts ``python -m WORDS``."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def call(*words: str | Path, cwd: Path, text: str | None = None) -> tuple[int, str, str]:
    """Runs ``python -m WORDS``: status, stdout, stderr."""
    process = start(*words, cwd=cwd, stdin=subprocess.PIPE)
    out, error = process.communicate(text, timeout=300)
    return process.returncode, out, error
