r"""Trains the small vision tower of the embedded demonstration, which stands in for CLIP.

The tower is a CLIP vision transformer of 96 channels whose patches learn, from pictures drawn on
the fly, which digit has its centre in them and which mark covers them. This dense supervision is
what an image-text pre-training would teach it with far more data; a tower that starts from nothing
inside the short demonstration learns to read nothing at all.

::

    python -m llava_uhd.train.demo_tower --out DIR [--seed S] [--steps N]

The same command gives the same file on the same machine and library versions: one thread, one
random stream. A tenth of the pictures are shrunk and blown up again with their labels kept, so that
what a model cannot read in low resolution is not for want of such pictures in its tower's training.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig

from llava_uhd.config.model import CLIP_MEAN, CLIP_STD
from llava_uhd.data.drawing import (
    CELL,
    COLOURS,
    SHAPES,
    Box,
    Mark,
    Scene,
    draw_background,
    draw_lines,
    draw_mark,
    overlaps,
    paste_glyph,
    render,
)
from llava_uhd.errors import UserError, command, make_folder
from llava_uhd.images.pixels import pack_patches
from llava_uhd.vision.towers import VisionTower

logger = logging.getLogger(__name__)

PATCH = 8
# (width, height) of the tiles: mostly square, and the shapes that odd pictures are cut into.
TILE_SIZES = ((64, 64),) * 6 + (
    (56, 64), (64, 56), (72, 56), (56, 72), (80, 48), (48, 80), (72, 48), (48, 72),
)  # fmt: skip
MARGIN = 32  # drawn around a tile and cut off, so that borders run through digits and marks
NO_LABEL = -100
NUM_CLASSES = (1 + 10, 1 + len(COLOURS), 1 + len(SHAPES))  # nothing, or which digit, colour, shape


@dataclass(frozen=True)
class DemoTowerConfig:
    """What is trained and how long.

    Attributes:
        seed: of weights and pictures.
        steps: optimizer steps.
        batch_size: tiles per step.
        learning_rate: highest of the AdamW steps.
        width: channels of the tower.
        depth: layers that are used (one more is stored, see `save_tower`).
        heads: attention heads.
    """

    seed: int = 0
    steps: int = 1600
    batch_size: int = 48
    learning_rate: float = 2e-3
    width: int = 96
    depth: int = 3
    heads: int = 4

    @property
    def vision_config(self) -> CLIPVisionConfig:
        """Of the tower as it is stored."""
        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.depth + 1,
            num_attention_heads=self.heads,
            image_size=64,
            patch_size=PATCH,
            projection_dim=self.width,
        )


Glyph = tuple[str, int, int]  # digit, left, top


def draw_glyphs(rng: np.random.Generator, size: tuple[int, int]) -> list[Glyph]:
    """Rows of random digits at a random pitch and density; none on one canvas in seven."""
    glyphs: list[Glyph] = []
    if rng.random() > 0.85:
        return glyphs
    pitch_x, pitch_y = int(rng.integers(10, 20)), int(rng.integers(11, 20))
    density = (0.25, 0.6, 0.9)[int(rng.integers(3))]
    for top in range(int(rng.integers(0, pitch_y)), size[1] - CELL[1] + 1, pitch_y):
        for left in range(int(rng.integers(0, pitch_x)), size[0] - CELL[0] + 1, pitch_x):
            if rng.random() < density:
                glyphs.append((str(rng.integers(10)), left, top))
    return glyphs


def glyph_box(glyph: Glyph) -> Box:
    """(left, top, right, bottom) in pixels."""
    return glyph[1], glyph[2], glyph[1] + CELL[0], glyph[2] + CELL[1]


def draw_tile(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    """One training picture and the labels of its patches.

    Args:
        rng: the only source of randomness.
        size: (width, height) in pixels, multiples of the patch.

    Returns:
        RGB picture; int64 (3, rows, columns): digit, colour and shape per patch, 0 for nothing.
    """
    canvas = (size[0] + 2 * MARGIN, size[1] + 2 * MARGIN)
    background, ink = draw_background(rng)
    glyphs = draw_glyphs(rng, canvas)
    marks: list[Mark] = []
    for _ in range(int(rng.integers(0, 5))):
        mark = draw_mark(rng, canvas, [other.box for other in marks])
        if mark is not None:
            marks.append(mark)
    glyphs = [
        glyph
        for glyph in glyphs
        if not any(overlaps(glyph_box(glyph), mark.box, 1) for mark in marks)
    ]
    boxes = [glyph_box(glyph) for glyph in glyphs]
    lines = draw_lines(rng, canvas, int(rng.integers(0, 3)), boxes[:6])
    pixels = render(Scene(canvas, background, ink, [], marks, lines))
    for character, left, top in glyphs:
        paste_glyph(pixels, character, left, top, ink)
    x, y = (int(value) for value in rng.integers(0, 2 * MARGIN + 1, 2))
    picture = Image.fromarray(pixels).crop((x, y, x + size[0], y + size[1]))
    if rng.random() < 0.1:
        factor = rng.uniform(0.35, 0.9)
        small = (max(round(size[0] * factor), 1), max(round(size[1] * factor), 1))
        picture = picture.resize(small, Image.Resampling.BICUBIC)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture, patch_labels(size, (x, y), glyphs, marks)


def patch_labels(
    size: tuple[int, int], origin: tuple[int, int], glyphs: list[Glyph], marks: list[Mark]
) -> np.ndarray:
    """What each patch should know, (3, rows, columns) int64; see `draw_tile`.

    A digit belongs to the patch that holds its centre; a mark to all patches whose centre it
    covers. The shape of a mark that the tile's border cuts is not asked for.
    """
    rows, columns = size[1] // PATCH, size[0] // PATCH
    labels = np.zeros((3, rows, columns), np.int64)
    for character, left, top in glyphs:
        row = (top + CELL[1] // 2 - origin[1]) // PATCH
        column = (left + CELL[0] // 2 - origin[0]) // PATCH
        if 0 <= row < rows and 0 <= column < columns:
            labels[0, row, column] = 1 + int(character)
    centres_x = np.arange(columns) * PATCH + PATCH // 2 + origin[0]
    centres_y = np.arange(rows) * PATCH + PATCH // 2 + origin[1]
    for mark in marks:
        left, top, right, bottom = mark.box
        inside_x = (centres_x >= left + 2) & (centres_x <= right - 2)
        inside_y = (centres_y >= top + 2) & (centres_y <= bottom - 2)
        covered = inside_y[:, None] & inside_x[None, :]
        whole = (
            left >= origin[0]
            and top >= origin[1]
            and right < origin[0] + size[0]
            and bottom < origin[1] + size[1]
        )
        labels[1][covered] = 1 + list(COLOURS).index(mark.colour)
        labels[2][covered] = 1 + SHAPES.index(mark.shape) if whole else NO_LABEL
    return labels


def draw_batch(
    rng: np.random.Generator, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed tiles.

    Returns:
        ``pixel_values`` float32 (P, 3 * p * p), ``view_grids`` int64 (count, 2), labels int64
        (3, P).
    """
    pixels, grids, labels = [], [], []
    for _ in range(count):
        picture, label = draw_tile(rng, TILE_SIZES[int(rng.integers(len(TILE_SIZES)))])
        pixels.append(pack_patches(picture, PATCH, CLIP_MEAN, CLIP_STD))
        grids.append(label.shape[1:])
        labels.append(torch.from_numpy(label.reshape(3, -1)))
    return torch.cat(pixels), torch.tensor(grids), torch.cat(labels, dim=1)


def init_tower(tower: VisionTower) -> None:
    """Weights of variance 1 / fan-in, small positions, zero biases; for a tower this small."""
    for name, parameter in tower.named_parameters():
        if "position" in name or "class_embedding" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def tower_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Digits count most; patches without a digit, the most frequent, count less."""
    digits, colours, shapes = logits.split(NUM_CLASSES, dim=1)
    weight = torch.ones(NUM_CLASSES[0])
    weight[0] = 0.3
    return (
        4.0 * F.cross_entropy(digits, labels[0], weight=weight)
        + F.cross_entropy(colours, labels[1])
        + 0.5 * F.cross_entropy(shapes, labels[2], ignore_index=NO_LABEL)
    )


@torch.no_grad()
def measure(
    tower: VisionTower, head: nn.Linear, count: int = 128, seed: int = 999
) -> dict[str, float]:
    """Shares of patches named rightly on fresh tiles: with a digit, without one, on marks."""
    pixel_values, grids, labels = draw_batch(np.random.default_rng(seed), count)
    guesses = [part.argmax(-1) for part in head(tower(pixel_values, grids)).split(NUM_CLASSES, 1)]
    right = [guess == label for guess, label in zip(guesses, labels, strict=True)]
    names = ("digits", "colours", "shapes")
    result = {name: right[k][labels[k] > 0].float().mean().item() for k, name in enumerate(names)}
    result["no_digit"] = right[0][labels[0] == 0].float().mean().item()
    return {name: round(value, 4) for name, value in result.items()}


def train_tower(config: DemoTowerConfig) -> tuple[VisionTower, dict[str, float]]:
    """Trains a tower.

    Returns:
        The tower, and what `measure` says of it.
    """
    torch.manual_seed(config.seed)
    tower = VisionTower(config.vision_config, select_layer=-2)
    init_tower(tower)
    head = nn.Linear(config.width, sum(NUM_CLASSES))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )

    def rate(step: int) -> float:
        # Warm-up over 60 steps, then constant, then down to nothing over the second half.
        left = (config.steps - step) / max(0.5 * config.steps, 1)
        return min(1.0, (step + 1) / 60) * min(1.0, max(0.02, left))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = np.random.default_rng([config.seed, 1])
    start = time.process_time()
    for step in range(config.steps):
        pixel_values, grids, labels = draw_batch(rng, config.batch_size)
        loss = tower_loss(head(tower(pixel_values, grids)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            spent = time.process_time() - start
            logger.info("step %d: loss %.3f, %.0f CPU-s", step + 1, loss.item(), spent)
    return tower, measure(tower, head)


def stored_tensors(tower: VisionTower, config: CLIPVisionConfig) -> dict[str, torch.Tensor]:
    """Weights under transformers' names.

    One layer more than the tower has is stored, because the layer that a CLIP tower is read from
    is the last but one. It adds nothing to its input (its output projections are zero), so the
    folder is also a valid `CLIPVisionModel` whose last hidden state equals the one in use.
    """
    tensors = {}
    for name, tensor in tower.state_dict().items():
        prefix = "encoder." if name.startswith("layers.") else ""
        tensors[f"vision_model.{prefix}{name}"] = tensor.contiguous()
    last = config.num_hidden_layers - 1
    pattern = f"vision_model.encoder.layers.{last - 1}."
    for name in [name for name in tensors if name.startswith(pattern)]:
        empty = torch.zeros_like(tensors[name])
        if "layer_norm" in name and name.endswith("weight"):
            empty = torch.ones_like(empty)
        tensors[name.replace(pattern, f"vision_model.encoder.layers.{last}.")] = empty
    tensors["vision_model.post_layernorm.weight"] = torch.ones(config.hidden_size)
    tensors["vision_model.post_layernorm.bias"] = torch.zeros(config.hidden_size)
    return tensors


def save_tower(
    out: Path, tower: VisionTower, config: DemoTowerConfig, measured: dict[str, float]
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` as transformers reads them."""
    make_folder(out, "output folder")
    vision = config.vision_config
    save_file(stored_tensors(tower, vision), out / "model.safetensors", {"format": "pt"})
    values = {
        "architectures": ["CLIPVisionModel"],
        "model_type": vision.model_type,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": vision.projection_dim,
        "hidden_act": vision.hidden_act,
        "layer_norm_eps": vision.layer_norm_eps,
        "dtype": "float32",
        "made_by": {
            "command": f"python -m llava_uhd.train.demo_tower --out DIR --seed {config.seed} "
            f"--steps {config.steps}",
            "torch": torch.__version__.split("+")[0],
            "measured": measured,
            **asdict(config),
        },
    }
    text = json.dumps(values, indent=2)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Command line, see the module's first lines."""
    default = DemoTowerConfig()
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.train.demo_tower",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--steps", type=int, default=default.steps)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Several threads add in an order of their own: one gives the same file every time.
    torch.set_num_threads(1)
    if given.steps < 1:
        raise UserError(f"--steps must be at least 1, got {given.steps}")
    make_folder(given.out, "output folder")
    config = DemoTowerConfig(seed=given.seed, steps=given.steps)
    tower, measured = train_tower(config)
    save_tower(given.out, tower, config, measured)
    print(f"{given.out}: {measured}")


if __name__ == "__main__":
    command(main)
