"""The shipped demonstration tower, and the command that makes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from llava_uhd.checkpoint.parts import read_tower, read_tower_config
from llava_uhd.data.drawing import Mark
from llava_uhd.train.demo_tower import (
    MARGIN,
    NO_LABEL,
    PATCH,
    TILE_SIZES,
    DemoTowerConfig,
    draw_batch,
    draw_tile,
    patch_labels,
    save_tower,
    train_tower,
)
from llava_uhd.vision.towers import VisionTower

SHIPPED = Path(__file__).resolve().parents[1] / "llava_uhd/assets/demo_tower"
TINY = DemoTowerConfig(seed=7, steps=2, batch_size=2, width=24, depth=2, heads=2)


def load(folder: Path) -> VisionTower:
    config = read_tower_config(folder)
    tower = VisionTower(config, -2)
    state = read_tower(folder, config, -2)
    tower.load_state_dict({key.removeprefix("vision_tower."): x for key, x in state.items()})
    return tower.requires_grad_(False).eval()


def test_labels_by_hand() -> None:
    glyphs = [("7", 40, 40), ("3", 20, 40), ("0", 94, 40)]
    whole, cut = Mark("square", "blue", (64, 64, 84, 84)), Mark("circle", "red", (24, 60, 44, 80))
    labels = patch_labels((64, 64), (32, 32), glyphs, [whole, cut])
    # Centre of the 7: (44, 45) on the canvas, (12, 13) on the tile: row 1, column 1. That of the 3
    # lies left of the tile, that of the 0 right of it.
    assert labels[0].nonzero()[0].tolist() == [1] and labels[0, 1, 1] == 1 + 7
    # Patch centres 66 to 82 are inside the square: 68 and 76.
    assert set(zip(*(axis.tolist() for axis in (labels[1] == 3).nonzero()), strict=True)) == {
        (4, 4), (4, 5), (5, 4), (5, 5),
    }  # fmt: skip
    assert (labels[2][labels[1] == 3] == 2).all()
    # The circle is cut by the left border: its colour counts, its shape is not asked.
    assert (labels[1] == 1).any() and (labels[2][labels[1] == 1] == NO_LABEL).all()


@pytest.mark.parametrize("size", sorted(set(TILE_SIZES)))
def test_tiles_have_the_size_and_labels_asked(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        picture, labels = draw_tile(rng, size)
        assert picture.size == size and picture.mode == "RGB"
        assert labels.shape == (3, size[1] // PATCH, size[0] // PATCH)
        assert labels.min() >= NO_LABEL and labels[0].max() <= 10
    assert MARGIN % PATCH == 0


def test_same_seed_same_file(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        config = DemoTowerConfig(**{**vars(TINY), "seed": seed})
        save_tower(tmp_path / name, *(lambda made: (made[0], config, made[1]))(train_tower(config)))
    first, second, third = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != third


def test_folder_is_a_clip_tower(tmp_path: Path) -> None:
    tower, measured = train_tower(TINY)
    save_tower(tmp_path, tower, TINY, measured)
    library = CLIPVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = library(pixels, output_hidden_states=True).hidden_states
        packed = pixels.reshape(2, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(128, 192)
        ours = load(tmp_path)(packed, torch.tensor([[8, 8], [8, 8]]))
    expected = states[-2][:, 1:].reshape(128, -1)
    assert (ours - expected).abs().max() < 1e-5
    # The stored last layer adds nothing.
    assert torch.equal(states[-1], states[-2])


def test_shipped_file_is_small_and_says_how_it_was_made() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 4_000_000
    made_by = json.loads((SHIPPED / "config.json").read_text())["made_by"]
    assert made_by["seed"] == 0
    assert made_by["command"].startswith("python -m llava_uhd.train.demo_tower --out DIR --seed 0")


def test_shipped_tower_reads_digits() -> None:
    """A linear map fitted on few tiles names the digits on others: they are in the features."""
    tower = load(SHIPPED)
    features, digits = [], []
    for seed in (1, 2):
        pixel_values, grids, labels = draw_batch(np.random.default_rng([77, seed]), 96)
        features.append(torch.nn.functional.layer_norm(tower(pixel_values, grids), (96,)).double())
        digits.append(labels[0])
    rows = [torch.cat([x, torch.ones(len(x), 1).double()], 1) for x in features]
    targets = torch.nn.functional.one_hot(digits[0], 11).double()
    gram = rows[0].T @ rows[0] + 1.0 * torch.eye(97).double()
    weight = torch.linalg.solve(gram, rows[0].T @ targets)
    guess = (rows[1] @ weight)[:, 1:].argmax(1) + 1
    seen = digits[1] > 0
    assert (guess == digits[1])[seen].float().mean() > 0.93
