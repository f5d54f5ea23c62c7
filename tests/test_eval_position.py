"""The position test: borders of plans, drawing, reading of answers, the picture of the results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_uhd.config.model import ImageConfig
from llava_uhd.data.drawing import COLOURS
from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.position_data import GRIDS, PositionConfig, draw, draw_grid, is_drawn
from llava_uhd.eval.scoring.positions import (
    CUT,
    FAR,
    NEAR,
    NEARNESS,
    WHOLE,
    nearness,
    region,
    slice_borders,
)
from llava_uhd.eval.task import Item, Scored
from llava_uhd.eval.tasks.position import HEAT_MAP, Position
from llava_uhd.images.geometry import plan_slices
from llava_uhd.images.strategies import plan_image


def test_borders_are_where_the_picture_is_cut() -> None:
    assert slice_borders(plan_slices(672, 448), (672, 448)) == ([336], [])
    assert slice_borders(plan_slices(1008, 672), (1008, 672)) == ([336, 672], [336])
    # Enlarged before it is cut: borders are told in pixels of the file.
    config = ImageConfig(long_side=1344)
    assert slice_borders(plan_image(config, 672, 448), (672, 448)) == ([224, 448], [224])
    assert slice_borders(plan_slices(336, 336), (336, 336)) == ([], [])
    # The picture is centred on a canvas of 2 x 2 tiles.
    tiles = ImageConfig(strategy="anyres", pinpoints=((672, 672),), layout="unpad")
    assert slice_borders(plan_image(tiles, 400, 100), (400, 100)) == ([200], [50])


def test_nearness_and_regions() -> None:
    box = (10, 10, 20, 20)
    assert nearness(box, [15], []) == nearness(box, [100], [19]) == CUT
    assert nearness(box, [20], []) == nearness(box, [29.9], [100]) == NEAR
    assert nearness(box, [30], [40]) == FAR and nearness(box, [], []) == WHOLE
    names = [[region(row, column, 5, 7) for column in (0, 3, 6)] for row in (0, 2, 4)]
    assert names == [
        ["top left", "top", "top right"],
        ["left", "middle", "right"],
        ["bottom left", "bottom", "bottom right"],
    ]


@pytest.mark.parametrize("size", list(GRIDS))
def test_pictures_show_what_the_questions_say(size: tuple[int, int], tmp_path: Path) -> None:
    scene = draw_grid(size, 0, 0)
    columns, rows = GRIDS[size]
    assert len(scene.marks) == columns * rows
    for index, mark in enumerate(scene.marks):
        row, column = divmod(index, columns)
        left, top, right, bottom = mark.box
        # Inside its own place, so that no shape touches another.
        assert column * size[0] / columns < left < right < (column + 1) * size[0] / columns
        assert row * size[1] / rows < top < bottom < (row + 1) * size[1] / rows


def drawn(root: Path) -> tuple[Position, list[Item]]:
    task = Position()
    task.config = PositionConfig(pictures=1)
    task.provide(root)
    return task, task.load(root)


def test_drawn_once_and_from_the_seed(tmp_path: Path) -> None:
    task, items = drawn(tmp_path / "a/position")
    again, other = tmp_path / "b", tmp_path / "c"
    draw(again, task.config)
    draw(other, PositionConfig(pictures=1, seed=1))
    files = [sorted(folder.rglob("*.png")) for folder in (tmp_path / "a/position", again, other)]
    assert len(files[0]) == len(GRIDS)
    contents = [[file.read_bytes() for file in each] for each in files]
    assert contents[0] == contents[1] != contents[2]
    changed = files[0][0].stat().st_mtime_ns
    task.provide(tmp_path / "a/position")
    assert files[0][0].stat().st_mtime_ns == changed
    # A test of other settings is replaced; something else is never touched.
    draw(other, task.config)
    assert is_drawn(other, task.config) and not list(tmp_path.glob(".c*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else than a position test"):
        draw(tmp_path / "mine", task.config)
    assert sum(columns * rows for columns, rows in GRIDS.values()) + 3 * len(GRIDS) == len(items)
    item = next(item for item in items if item.id == "672x448-0-2-3")
    pixels = np.asarray(Image.open(str(item.images[0])))
    left, top, right, bottom = item.extra["box"]
    colour = item.reference.split()[0]
    assert tuple(pixels[(top + bottom) // 2, (left + right) // 2]) == COLOURS[colour]
    counts = [int(item.reference) for item in items if item.groups["question"] == "count"][:3]
    assert sum(counts) == 16


def test_missing_until_it_is_named(tmp_path: Path) -> None:
    task = Position()
    message = task.missing(tmp_path / "position")
    assert message is not None and message.endswith("drawn when it is named: --tasks position")
    draw(tmp_path / "position", PositionConfig(pictures=1))
    assert task.missing(tmp_path / "position") == (
        f"position: {tmp_path / 'position'} is old; {task.source}"
    )


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Red circle.", "red circle"),
        ("The circle is red", "red circle"),
        ("A blue squares, not a red circle", "blue square"),
        ("redcircle", ""),
        ("green", "green"),
        ("", ""),
    ],
)
def test_answers_about_places(answer: str, read: str) -> None:
    item = Item("a", "?", reference="red circle", groups={"question": "place"})
    task = Position()
    assert task.parse(item, answer) == read
    scores = task.score(item, read)
    assert scores["position_exact"] == (read == "red circle")
    assert scores["colour_exact"] == ("red" in read)


@pytest.mark.parametrize(
    ("answer", "right"), [("12", 1), ("There are 12.", 1), ("012", 1), ("1", 0), ("twelve", 0)]
)
def test_answers_about_numbers(answer: str, right: int) -> None:
    item = Item("a", "?", reference="12", groups={"question": "count"})
    task = Position()
    assert task.score(item, task.parse(item, answer))["count_exact"] == right
    small = Item("a", "?", reference="3", groups={"question": "count"})
    assert task.parse(small, "Three circles") == "3"


def test_a_model_that_fails_at_borders_is_found_out(tmp_path: Path) -> None:
    task, items = drawn(tmp_path / "position")
    image = ImageConfig()
    known = task.with_settings({f"image.{name}": value for name, value in vars(image).items()})
    assert isinstance(known, Position) and known.image == image and task.image is None

    def answer(item: Item) -> str:
        if item.groups["question"] == "count":
            return "none"
        size = tuple(item.extra["size"])
        xs, ys = slice_borders(plan_image(image, *size), size)
        return "?" if nearness(tuple(item.extra["box"]), xs, ys) == CUT else item.reference

    scored = []
    for item in items:
        parsed = known.parse(item, answer(item))
        scored.append(Scored(item, answer(item), parsed, known.score(item, parsed)))
    tables = known.breakdown(scored)
    found = {name: row["position_exact"] for name, row in tables["slice border"].items()}
    assert found == {CUT: 0, NEAR: 100, FAR: 100, WHOLE: 100}
    assert tuple(found) == NEARNESS
    counts = {name: row["items"] for name, row in tables["slice border"].items()}
    assert min(counts.values()) >= 16 and sum(counts.values()) == len(items) - 3 * len(GRIDS)
    assert 0 < known.aggregate(scored)["position_exact"] < 100
    assert known.aggregate(scored)["count_exact"] == 0
    assert set(tables) == {"question", "size", "region", "slice border"}
    assert set(task.breakdown(scored)) == {"question", "size", "region"}
    ((name, content),) = known.pictures(scored)
    picture = Image.open(io.BytesIO(content))
    assert name == HEAT_MAP and picture.format == "PNG" and min(picture.size) > 400
    # Borders are drawn only where they are known.
    red = []
    for each in (content, task.pictures(scored)[0][1]):
        pixels = np.asarray(Image.open(io.BytesIO(each)).convert("RGB"))
        red.append(int((pixels == (255, 0, 0)).all(-1).sum()))
    assert red[0] > 1000 and red[1] == 0


def test_whole_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["run", str(tiny_checkpoint), "--tasks", "position", "--data-root", str(tmp_path)]
    assert (
        main([*words, "--limit", "20", "--max-new-tokens", "2", "--output", str(tmp_path / "o")])
        == 0
    )
    folder = tmp_path / "o/position"
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    assert scores["items"] == 20 and "slice border" in scores["breakdown"]
    assert (folder / HEAT_MAP).stat().st_size > 1000
    assert main(["score", str(tmp_path / "o")]) == 0
    assert json.loads((folder / "scores.json").read_text("utf-8")) == scores
