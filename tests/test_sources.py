"""Which folder a user means by a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llava_uhd.checkpoint.manifest import write_manifest
from llava_uhd.checkpoint.sources import find_checkpoint
from llava_uhd.errors import UserError


def copy(checkpoint: Path, folder: Path, age: int, kind: str = "model") -> None:
    """A checkpoint whose weights were written ``age`` seconds ago (from a fixed moment)."""
    shutil.copytree(checkpoint, folder)
    write_manifest(folder, kind=kind)
    os.utime(folder / "model.safetensors", (2_000_000_000 - age, 2_000_000_000 - age))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_newest_finished_model(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no finished model.*bash scripts/quickstart.sh"):
        find_checkpoint()
    root = Path("checkpoints")
    copy(tiny_checkpoint, root / "old", 100)
    assert find_checkpoint() == root / "old"
    copy(tiny_checkpoint, root / "deep/er/new", 50)
    copy(tiny_checkpoint, root / "running/checkpoint-7", 10)
    copy(tiny_checkpoint, root / "projector", 9, kind="projector")
    copy(tiny_checkpoint, root / "cut", 8)
    (root / "cut/config.json").write_text('{"model_ty')
    copy(tiny_checkpoint, root / "tower", 7)
    (root / "tower/config.json").write_text('{"model_type": "clip_vision_model"}')
    copy(tiny_checkpoint, root / "weightless", 6)
    (root / "weightless/model.safetensors").unlink()
    assert find_checkpoint() == root / "deep/er/new"


def test_published_layouts_count_too(golden: Path) -> None:
    shutil.copytree(golden / "uhd_v1/tiny_checkpoint", "checkpoints/published")
    assert find_checkpoint() == Path("checkpoints/published")


def test_names(here: Path) -> None:
    for folder in ("checkpoints/a", "checkpoints_new/a", "checkpoints_new/b", "b/c"):
        Path(folder).mkdir(parents=True)
    assert find_checkpoint("a") == Path("checkpoints/a")
    assert find_checkpoint("b") == Path("b")  # what is here comes first
    assert find_checkpoint("b/c") == Path("b/c")
    shutil.rmtree("b")
    assert find_checkpoint("b") == Path("checkpoints_new/b")
    assert find_checkpoint(here / "checkpoints/a") == here / "checkpoints/a"
    assert find_checkpoint("someone/model-7b") == "someone/model-7b"  # a hub id


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/there", "a/b/c"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        UserError, match=r"does not exist.*checkpoints, checkpoints_new.*quickstart"
    ):
        find_checkpoint(name)
