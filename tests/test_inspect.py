"""``python -m llava_uhd.inspect``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_uhd import inspect
from llava_uhd.checkpoint.shapes import known_model
from llava_uhd.config.model import ImageConfig
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import plan_slices


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (672, 1008), (90, 120, 200)).save(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: object) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, words)])
    inspect.main()


def test_numbers_and_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photo: Path
) -> None:
    run(monkeypatch, photo.parent, photo)
    printed = capsys.readouterr().out
    for line in (
        "image      672 x 1008 pixels",
        "grid       2 x 3 (columns x rows)",
        "slices     6 of 336 x 336 (24 x 24 patches), 144 tokens each, cut from 672 x 1008",
        "overview   266 x 406 (19 x 29 patches), 144 tokens",
        "[1: 144] , [2: 144] \\n",
        "[5: 144] , [6: 144] \\n",
        "[overview: 144]",
        "tokens     1008 visual + 6 separators = 1014 positions",
        "FLOP = 2 multiply-adds",
    ):
        assert line in printed, line
    with Image.open(photo.parent / "photo_slices.png") as picture:
        assert picture.width > 900 and picture.height > 300


def test_first_stage_sees_the_overview_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photo: Path
) -> None:
    output = photo.parent / "new/folder/views.webp"
    run(
        monkeypatch,
        photo.parent,
        photo,
        "--recipe",
        "uhd_v1/pretrain_vicuna13b",
        "--output",
        output,
    )
    printed = capsys.readouterr().out
    assert "grid       none" in printed and "144 visual + 0 separators" in printed
    assert "overview   266 x 406" in printed
    assert output.is_file()


def test_layout_is_what_the_processor_writes() -> None:
    plan = plan_slices(1280, 400)
    assert plan.grid == (4, 1)
    rows = inspect.token_layout(plan, [9] * 5)
    assert rows == ["[1: 9] , [2: 9] , [3: 9] , [4: 9] \\n", "[overview: 9]"]
    assert inspect.token_layout(plan_slices(30, 30), [9]) == ["[overview: 9]"]


def test_pre_resize_of_the_configuration() -> None:
    config = known_model("vicuna-7b-v1.5", 144)
    config.image = ImageConfig(long_side=1024)
    image, plan = inspect.prepare(Image.new("RGB", (640, 480)), config)
    assert image.size == plan.image_size == (1024, 768)
    assert plan.grid == (3, 2)


def test_bad_input(monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    folder = photo.parent
    cut = folder / "cut.jpg"
    cut.write_bytes(photo.read_bytes()[:900])
    before = photo.read_bytes()
    for words, message in (
        (("none.png",), "none.png does not exist"),
        ((cut,), "damaged or truncated"),
        ((photo, "--recipe", "uhd_v1/finetune"), "did you mean"),
        ((photo, "--output", photo), "is the image itself"),
        ((photo, "--output", "views.txt"), "must end in .png"),
        ((photo, "--output", f"{photo}/views.png"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, folder, *words)
    assert photo.read_bytes() == before


def test_as_typed(root: Path, tmp_path: Path) -> None:
    """A mistake is one line and status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "llava_uhd.inspect", "missing.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: image missing.png does not exist"]
