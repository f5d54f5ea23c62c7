"""Pictures of a VDIM pre-training: where they come from, what is done to them, what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_runs import ROOT
from fixtures_tiny import picture
from PIL import Image

from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.vdim import (
    IMAGENET,
    PictureConfig,
    TowerSection,
    VdimConfig,
    VdimRecipe,
    load_vdim_recipe,
)
from llava_uhd.errors import UserError
from llava_uhd.train.vdim.data import (
    Pictures,
    Transform,
    batches,
    folder_files,
    open_pictures,
    photographs,
    square,
)

CALM: dict[str, Any] = {"photographs": False}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """The published layout with three training pictures and two held-out ones."""
    for split, name, ids in (
        ("train2017", "Coco164kFull_Stuff_Coarse", ("a1", "a2", "a3")),
        ("val2017", "coco_validation50", ("b1", "b2")),
    ):
        lists, images = (tmp_path / "cocostuff" / part / split for part in ("curated", "images"))
        lists.mkdir(parents=True)
        images.mkdir(parents=True)
        (lists / f"{name}.txt").write_text("".join(f"{each}\n" for each in ids))
        for seed, each in enumerate(ids):
            picture(60, 40, seed).save(images / f"{each}.jpg")
    return tmp_path


def test_coco_layout(coco: Path) -> None:
    found = open_pictures(PictureConfig(root=str(coco), res=32, **CALM))
    assert [source.name for source in found.train] == ["a1.jpg", "a2.jpg", "a3.jpg"]
    assert {name: len(group) for name, group in found.held_out.items()} == {"held out": 2}
    assert found.train[0].open().size == (60, 40)


def test_coco_subsets_have_published_names(coco: Path) -> None:
    lists = coco / "cocostuff/curated/train2017"
    (lists / "Coco164kFew_Stuff_6.txt").write_text("a3\n")
    found = open_pictures(PictureConfig(root=str(coco), list="6", **CALM))
    assert [source.name for source in found.train] == ["a3.jpg"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "cocostuff/images/train2017/a2.jpg").unlink(), r"1 of.*a2\.jpg"),
        (lambda root: (root / "cocostuff/curated/train2017/Coco164kFull_Stuff_Coarse.txt")
         .write_text("\n"), "is empty: it should have one picture id per line"),
        (lambda root: (root / "cocostuff").rename(root / "else"), "data.root must hold cocostuff/"),
    ],
)  # fmt: skip
def test_coco_mistakes(coco: Path, spoil: Any, message: str) -> None:
    spoil(coco)
    with pytest.raises(UserError, match=message) as caught:
        open_pictures(PictureConfig(root=str(coco), **CALM))
    assert "\n" not in str(caught.value)


def test_any_folder(tmp_path: Path) -> None:
    for index in range(45):
        folder = tmp_path / ("x" if index % 2 else "y/z")
        folder.mkdir(parents=True, exist_ok=True)
        picture(20, 20, index).save(folder / f"{index:02d}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = open_pictures(PictureConfig(folder=str(tmp_path), **CALM))
    train, held_out = found.train, found.held_out["held out"]
    assert (len(train), len(held_out)) == (43, 2)
    assert not {source.name for source in train} & {source.name for source in held_out}
    other = open_pictures(
        PictureConfig(folder=str(tmp_path / "x"), held_out_folder=str(tmp_path / "y"), **CALM)
    )
    assert (len(other.train), len(other.held_out["held out"])) == (22, 23)
    few = PictureConfig(folder=str(tmp_path), held_out=1, **CALM)
    assert len(open_pictures(few).held_out["held out"]) == 1


def test_folder_mistakes(tmp_path: Path) -> None:
    def mistake(folder: Path, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            open_pictures(PictureConfig(folder=str(folder), **CALM, **more))
        return str(caught.value)

    assert "data.folder" in mistake(tmp_path / "gone") and "not exist" in mistake(tmp_path / "gone")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no pictures" in mistake(empty)
    (tmp_path / "file").write_text("x")
    assert "is a file" in mistake(tmp_path / "file")
    one = tmp_path / "one"
    one.mkdir()
    picture(8, 8).save(one / "a.png")
    assert "only one picture" in mistake(one)
    assert "data.held_out_folder" in mistake(one, held_out_folder=str(empty))
    outside = tmp_path / "outside.png"
    picture(8, 8, 1).save(outside)
    (one / "b.png").symlink_to(outside)
    assert "is a link out of the folder" in mistake(one)
    assert len(folder_files(one, "data.folder", follow_links=True)) == 2


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    for index in range(3):
        picture(40, 40, index).save(tmp_path / f"{index}.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    data = PictureConfig(folder=str(tmp_path), res=16, **CALM)
    pictures = Pictures(open_pictures(data).train, Transform(data, *IMAGENET))
    with pytest.raises(UserError, match=r"1\.jpg"):
        [pictures[index] for index in range(len(pictures))]


def test_broken_pictures_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(4):
        picture(40, 40, index).save(tmp_path / f"{index}.png")
    data = PictureConfig(folder=str(tmp_path), res=16, on_broken_picture="skip", **CALM)
    sources = open_pictures(data).train
    whole = Pictures(sources, Transform(data, *IMAGENET))
    kept = [whole[index]["pictures"] for index in range(len(whole))]
    broken = tmp_path / Path(sources[0].name).name
    broken.write_bytes(broken.read_bytes()[:60])
    again = [whole[index]["pictures"] for index in range(len(whole))]
    assert torch.equal(again[0], kept[1])
    assert all(torch.equal(a, b) for a, b in zip(again[1:], kept[1:], strict=True))
    assert broken.name in caplog.text
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures"):
        whole[0]


def test_embedded_pictures_are_drawn_and_kept_apart() -> None:
    data = PictureConfig(embedded="debug", held_out=5, **CALM)
    found = open_pictures(data)
    assert len(found.train) == 2 * 16
    assert {name: len(group) for name, group in found.held_out.items()} == {"tiles": 5, "leaves": 5}
    sources = [*found.train, *found.held_out["tiles"], *found.held_out["leaves"]]
    tiles = [np.asarray(source.open()) for source in sources]
    assert all(tile.shape == (64, 64, 3) for tile in tiles)
    assert len({tile.tobytes() for tile in tiles}) == len(tiles)
    assert np.array_equal(tiles[3], np.asarray(open_pictures(data).train[3].open()))
    with pytest.raises(UserError, match="'none' is not one of debug, debug_mixed, quickstart"):
        open_pictures(PictureConfig(embedded="none", **CALM))
    pickle.dumps(found.train)  # loader processes may be started anew


def test_photographs() -> None:
    pytest.importorskip("sklearn")
    parts = photographs()
    assert len(parts) == 12
    assert all(part.open().size == (213, 213) for part in parts)
    assert {part.name.split(" ")[0] for part in parts} == {"china", "flower"}
    found = open_pictures(PictureConfig(embedded="debug", held_out=2))
    assert set(found.held_out) == {"tiles", "leaves", "photographs"}


@pytest.mark.parametrize(
    ("size", "cut"), [((96, 48), (24, 0, 72, 48)), ((48, 97), (0, 24, 48, 72)), ((48, 48), None)]
)
def test_square_cuts_the_middle(size: tuple[int, int], cut: tuple[int, ...] | None) -> None:
    image = picture(*size)
    expected = image if cut is None else image.crop(cut)
    assert np.array_equal(np.asarray(square(image, 48, "bilinear")), np.asarray(expected))


@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
def test_square_brings_the_shorter_side_to_size(resize: str) -> None:
    image = picture(200, 131)
    whole = image.resize((int(64 * 200 / 131), 64), Image.Resampling[resize.upper()])
    left = round((whole.width - 64) / 2)
    expected = whole.crop((left, 0, left + 64, 64))
    assert np.array_equal(np.asarray(square(image, 64, resize)), np.asarray(expected))
    assert square(picture(1000, 3), 16, resize).size == (16, 16)


def test_random_cuts_follow_from_seed_epoch_and_index() -> None:
    data = PictureConfig(embedded="debug", res=64, crop="random", **CALM)
    sources = open_pictures(data).train
    sources = [type(sources[0])("wide", lambda: picture(300, 64))] * 2
    pictures = Pictures(sources, Transform(data, *IMAGENET), seed=1)
    first = pictures[0]["pictures"]
    assert torch.equal(first, pictures[0]["pictures"])
    assert not torch.equal(first, pictures[1]["pictures"])
    pictures.set_epoch(1)
    assert not torch.equal(first, pictures[0]["pictures"])
    cuts = {square(picture(300, 64), 64, "bicubic", random.Random(s)).tobytes() for s in range(20)}
    assert len(cuts) > 10


def test_normalisation_and_back() -> None:
    data = PictureConfig(embedded="debug", res=32, resize="nearest", **CALM)
    transform = Transform(data, *IMAGENET)
    image = picture(32, 32)
    pixels = transform(image)
    by_hand = (np.asarray(image)[5, 7] / 255 - IMAGENET[0]) / IMAGENET[1]
    torch.testing.assert_close(
        pixels[:, 5, 7].double(), torch.from_numpy(by_hand), atol=1e-6, rtol=0
    )
    assert np.array_equal(np.asarray(transform.picture(pixels)), np.asarray(image))
    sources = open_pictures(data).train
    shapes = [batch.shape[0] for batch in batches(sources[:5], transform, 2)]
    assert shapes == [2, 2, 1]


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes("vdim/"))
@pytest.mark.parametrize("debug", [False, True])
def test_every_recipe_loads_and_round_trips(name: str, debug: bool, tmp_path: Path) -> None:
    recipe = load_vdim_recipe(name, [], debug=debug)
    assert recipe.name == name
    assert VdimRecipe.from_dict(recipe.to_dict()) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_vdim_recipe(str(file), []) == recipe
    if debug and name != "vdim/debug":
        assert recipe.output_dir != load_vdim_recipe(name, []).output_dir


def test_published_values() -> None:
    recipe = load_vdim_recipe("vdim/published", [])
    data, vdim, arguments = recipe.data, recipe.vdim, recipe.trainer.arguments
    assert (data.res, data.resize, data.crop, data.normalisation) == (
        336, "nearest", "center", "imagenet",
    )  # fmt: skip
    assert (vdim.scale, vdim.downsampler, vdim.detach) == (4, "attention", True)
    assert (vdim.max_pad, vdim.max_zoom, vdim.n_jitters) == (30, 2, 2)
    assert (vdim.random_projection, vdim.crf_weight) == (30, 0.001)
    assert (vdim.tv_weight, vdim.filter_ent_weight) == (0, 0)
    assert (vdim.crf_points, vdim.crf_jittered, vdim.reuse_maps) == (1000, False, False)
    assert (vdim.clip_steps, vdim.clip_norm, vdim.control) == (10, 1e-4, False)
    assert (vdim.blur, vdim.dropout, vdim.predicted_uncertainty) == (True, 0.2, True)
    assert (arguments["learning_rate"], arguments["lr_scheduler_type"]) == (1e-3, "constant")
    assert (arguments["num_train_epochs"], arguments["seed"], arguments["save_steps"]) == (
        1,
        0,
        500,
    )
    assert arguments["max_grad_norm"] == 0 and not arguments.get("bf16")
    assert recipe.trainer.batch_plan(8) == (2, 1)
    better = load_vdim_recipe("vdim/better", [])
    assert (better.data.resize, better.data.normalisation) == ("bicubic", "tower")
    assert (better.vdim.detach, better.vdim.crf_jittered, better.vdim.control) == (
        False, True, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vdim.max_padd", "3"], r"did you mean 'vdim.max_pad'"),
        (["--model.template", "v1"], "unknown key 'model.template'"),
        (["--vdim.scale", "3"], "vdim.scale must be 2, 4 or 8"),
        (["--vdim.max_pad", "64", "--data.res", "64"], "must be smaller than data.res 64"),
        (["--vdim.filter_ent_weight", "1"], "needs vdim.downsampler simple"),
        (["--data.resize", "area"], "data.resize must be nearest or bilinear or bicubic"),
        (["--data.folder", "a", "--data.embedded", "debug"], "exclude each other"),
        (["--data.root", "null"], "data.root is missing"),
        (["--tower.path", "null"], "tower.path is missing"),
        (["--trainer.fp16", "true"], "use trainer.bf16"),
        (["--trainer.optim", "adamw_torch"], "adamw_torch: the upsampler is always trained with"),
        (["--mm_projector_type", "x"], "mm_projector_type"),
        (["--vdim.n_jitters", "0"], "vdim.n_jitters must be at least 1"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_vdim_recipe("vdim/published", words)
    assert "\n" not in str(caught.value)


def test_kinds_of_recipes_are_kept_apart() -> None:
    assert not [name for name in list_recipes() if name.startswith("vdim/")]
    with pytest.raises(UserError, match=r"recipe 'vdim/better' is not for this command.*vdim-pre"):
        load_recipe("vdim/better")
    with pytest.raises(UserError, match=r"'debug/pretrain' is not for this command.*pretrain\.sh"):
        load_vdim_recipe("debug/pretrain", [])
    with pytest.raises(UserError, match=r"unknown recipe 'vdim/beter'; did you mean 'vdim/better'"):
        load_vdim_recipe("vdim/beter", [])


def test_later_data_replace_earlier_ones() -> None:
    recipe = load_vdim_recipe("vdim/better", ["--data.folder", "mine"])
    assert (recipe.data.root, recipe.data.folder) == (None, "mine")
    assert load_vdim_recipe("vdim/better", ["--data.embedded", "debug"]).data.root is None


def test_documented_keys() -> None:
    """docs/vdim.md has every key of the three sections of its own, with its default."""
    page = (ROOT / "docs/vdim.md").read_text(encoding="utf-8")
    kinds = {"tower": TowerSection, "data": PictureConfig, "vdim": VdimConfig}
    expected = {
        f"{section}.{item.name}": json.dumps(item.default).strip('"')
        for section, kind in kinds.items()
        for item in dataclasses.fields(kind)
    }
    rows = re.findall(r"^\| `((?:tower|data|vdim)\.\w+)` \| (\S+) \| \S", page, re.MULTILINE)
    assert dict(rows) == expected and len(rows) == len(expected)
