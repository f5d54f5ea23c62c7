"""The embedded data: deterministic, legible, held out, cut as planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_uhd.config.recipe import load_recipe
from llava_uhd.data import synthetic
from llava_uhd.data.drawing import CELL, COLOURS, PITCH, Mark, Scene, Sign, glyph, render
from llava_uhd.data.reading import read_records
from llava_uhd.data.synthetic import (
    EVAL_SIZES,
    TRAIN_SIZES,
    SyntheticConfig,
    caption,
    embedded_split,
    finetune_turns,
    generate,
    is_held_out,
    large_scene,
    sign_cut,
    tile_scene,
)
from llava_uhd.data.synthetic_mixed import turning_sign
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import plan_slices

SMALL = SyntheticConfig(tiles=5, train=7, eval=4, seed=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_files(tmp_path: Path) -> None:
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", SMALL)
    generate(tmp_path / "c", SyntheticConfig(tiles=5, train=7, eval=4, seed=4))
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == 5 + 7 + 4 + 4
    pictures = [name for name in first if name.endswith(".png")]
    assert all(first[name] != third[name] for name in pictures)


def test_what_exists_is_kept_and_what_is_unfinished_redrawn(tmp_path: Path) -> None:
    assert generate(tmp_path, SMALL)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert not generate(tmp_path, SMALL)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    # As after an interruption: no stamp, a picture missing.
    (tmp_path / "synthetic.json").unlink()
    (tmp_path / "images/finetune/000/000003.png").unlink()
    assert generate(tmp_path, SMALL)
    assert contents(tmp_path) == before
    # Other parameters are not what is there.
    assert generate(tmp_path, SyntheticConfig(tiles=5, train=7, eval=4, seed=5))
    assert contents(tmp_path) != before


def read_digits(pixels: np.ndarray, box: list[int]) -> str:
    """Reads a sign by comparing each cell with every glyph, from the pixels alone."""
    text = ""
    for left in range(box[0], box[2], PITCH):
        cell = pixels[box[1] : box[3], left : left + CELL[0]].astype(np.float64).mean(2)
        dark = (cell.max() - cell) / max(cell.max() - cell.min(), 1)
        errors = [np.abs(dark - glyph(str(digit))).sum() for digit in range(10)]
        text += str(int(np.argmin(errors)))
    return text


def test_answers_stand_on_the_pictures(tmp_path: Path) -> None:
    generate(tmp_path, SyntheticConfig(tiles=1, train=1, eval=40, seed=1))
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    signs = [row for row in rows if row["category"] == "sign"]
    for row in signs:
        pixels = np.asarray(Image.open(tmp_path / "images" / row["image"]))
        assert read_digits(pixels, row["sign_box"]) == row["answer"], row
    assert {row["category"] for row in rows} == {"sign", "colour", "shape"}
    for row in rows:
        if row["category"] == "colour":
            pixels = np.asarray(Image.open(tmp_path / "images" / row["image"])).reshape(-1, 3)
            found = {
                name: int((pixels == np.array(rgb)).all(1).sum()) for name, rgb in COLOURS.items()
            }
            assert max(found, key=lambda name: found[name]) == row["answer"], row


def test_held_out_strings_are_a_balanced_tenth() -> None:
    held_out = [text for text in (f"{number:03d}" for number in range(1000)) if is_held_out(text)]
    assert len(held_out) == 100
    for place in range(3):
        counts = [sum(text[place] == str(digit) for text in held_out) for digit in range(10)]
        assert counts == [10] * 10


def test_training_never_shows_a_held_out_string() -> None:
    train = [large_scene(0, index, "finetune").signs[0].text for index in range(60)]
    tiles = [sign.text for index in range(60) for sign in tile_scene(0, index).signs]
    assert any(len(text) == 3 for text in tiles) and any(len(text) == 1 for text in tiles)
    assert not any(is_held_out(text) for text in train + tiles if len(text) == 3)
    evaluated = [large_scene(0, index, "eval").signs[0].text for index in range(30)]
    assert all(is_held_out(text) for text in evaluated)


@pytest.mark.parametrize("size", sorted({*TRAIN_SIZES, *EVAL_SIZES}))
def test_sizes_are_sliced_at_native_resolution(size: tuple[int, int]) -> None:
    plan = plan_slices(*size, 7, 64, 8, bounded=True)
    assert plan.num_slices >= 2 and plan.refine_size is not None
    for refined, original in zip(plan.refine_size, size, strict=True):
        assert 1 <= refined / original <= 1.05
    # The overview shrinks the text below legibility in every evaluation size.
    if size in EVAL_SIZES:
        assert max(plan.overview_size[0] / size[0], plan.overview_size[1] / size[1]) < 0.5


def test_nothing_covers_the_signs() -> None:
    for index in range(40):
        scene = large_scene(2, index, "finetune")
        alone = Scene(scene.size, scene.background, scene.ink, scene.signs)
        left, top, right, bottom = scene.signs[0].box
        box = (slice(top, bottom), slice(left, right))
        assert (render(scene)[box] == render(alone)[box]).all()
        assert 0 <= left and right <= scene.size[0] and 0 <= top and bottom <= scene.size[1]


def test_captions_and_turns() -> None:
    signs = [Sign("347", 1, 2), Sign("12", 1, 30)]
    mark = Mark("circle", "red", (30, 40, 50, 60))
    scene = Scene((64, 64), signs=signs, marks=[mark])
    assert caption(scene) == "347,12 red circle"
    assert caption(Scene((64, 64), signs=signs)) == "347,12"
    indices = range(10)
    answers = [[turn["value"] for turn in finetune_turns(scene, k)[1::2]] for k in indices]
    assert answers[1] == ["347"] and answers[0] == ["red", "347"]
    assert answers[2] == ["circle", "347"] and answers[4] == ["347", "red"]
    assert answers[6] == ["347", "circle"]
    assert finetune_turns(scene, 2)[0]["value"].startswith("<image>\n")
    assert not any("<image>" in turn["value"] for turn in finetune_turns(scene, 2)[1:])


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (70, 20, "whole"),
        (52, 20, "between"),  # digits at 52-61 and 68-77: column 64 runs between them
        (60, 20, "through"),  # 60-69
        (70, 58, "through"),  # rows 58-68 meet row 64
        (70, 64, "whole"),
    ],
)
def test_sign_cut(left: int, top: int, expected: str) -> None:
    assert sign_cut(Scene((192, 128), signs=[Sign("123", left, top)])) == expected


def test_records_are_valid_llava_json(tmp_path: Path) -> None:
    split = embedded_split("debug", "finetune", tmp_path)
    records = read_records([str(split.file)], str(split.image_folder))
    assert len(records) == 16
    record = records[0]
    assert record.images[0].is_file()
    assert record.turns[0].text.startswith("<image>")
    first = embedded_split("debug", "pretrain", tmp_path)
    assert len(read_records([str(first.file)], str(first.image_folder))) == 16


def test_mixed_records_have_sets_of_their_own(tmp_path: Path) -> None:
    """Sets drawn before there were mixed ones are not drawn again."""
    generate(tmp_path / "plain", SyntheticConfig(1, 1, 1))
    stamp = json.loads((tmp_path / "plain/synthetic.json").read_text())
    assert set(stamp) == {"format", "tiles", "train", "eval", "seed"}
    mixed = SyntheticConfig(1, 4, 1, mixed=True)
    assert generate(tmp_path / "mixed", mixed) and not generate(tmp_path / "mixed", mixed)
    records = json.loads((tmp_path / "mixed/finetune.json").read_text())
    assert [record["id"] for record in records] == [f"mixed-{index}" for index in range(4)]


def test_a_video_of_a_turning_sign() -> None:
    scene = large_scene(0, 0, "finetune")
    texts = [frame.signs[0].text for frame in turning_sign(scene)]
    first = scene.signs[0].text
    assert texts[0] == texts[3] == first and texts[1] == first[1:] + first[0]
    assert {frame.size for frame in turning_sign(scene)} == {scene.size}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.embedded 'quickstarts'.*debug, debug_mixed, quickstart"
    ):
        embedded_split("quickstarts", "finetune", tmp_path)
    with pytest.raises(UserError, match="no part 'anneal'"):
        embedded_split("debug", "anneal", tmp_path)
    with pytest.raises(UserError, match="train must be at least 1, got 0"):
        SyntheticConfig(train=0)
    assert not list(tmp_path.iterdir())


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--out", str(tmp_path / "d"), "--train", "2", "--tiles", "2", "--eval", "1"]
    monkeypatch.setattr("sys.argv", ["synthetic", *words])
    synthetic.main()
    assert "written" in capsys.readouterr().out
    synthetic.main()
    assert "nothing to do" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "d/finetune.json").read_text())) == 2


def test_control_recipes_differ_in_the_image_only() -> None:
    ours = load_recipe("quickstart/finetune")
    for name, key, value in (
        ("squeeze", "strategy", "squeeze"),
        ("blurred", "detail_side", 64),
    ):
        control = load_recipe(f"quickstart/finetune_{name}")
        assert getattr(control.model.image, key) == value != getattr(ours.model.image, key)
        assert control.data == ours.data and control.stage == ours.stage
        assert control.trainer.arguments == ours.trainer.arguments
        model = dataclasses.replace(control.model, image=ours.model.image)
        assert model == ours.model
