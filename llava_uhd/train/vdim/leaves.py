"""Dead leaves: pictures of things in front of each other, drawn from a seed.

Opaque shapes of all sizes laid over one another at random have edges, occlusions and areas as
photographs have them. An upsampler that saw only drawn signs would not know what to do with a
photograph; one that also saw leaves does.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

COUNT = 60  # shapes of a picture
FINE = 2  # drawn this many times larger, then averaged: smooth edges


def draw_leaves(seed: int, index: int, side: int) -> Image.Image:
    """One picture.

    Args:
        seed: of the set.
        index: of the picture.
        side: in pixels.

    Returns:
        RGB (side, side).
    """
    rng = np.random.default_rng([seed, 4, index])
    full = side * FINE
    canvas = Image.new("RGB", (full, full), (128, 128, 128))
    pen = ImageDraw.Draw(canvas)
    for _ in range(COUNT):
        # Radii fall off as in nature: ten times smaller shapes are a hundred times as frequent.
        radius = full * 0.07 / (1 - rng.random() * 0.99) ** 0.5
        x, y = rng.uniform(-0.1 * full, 1.1 * full, 2)
        shade = rng.integers(20, 236) + rng.normal(0, 35, 3)  # mostly greyish, as in nature
        colour = tuple(int(value) for value in np.clip(shade, 0, 255))
        stretch = rng.uniform(0.4, 1.0)
        if rng.random() < 0.5:
            pen.ellipse(
                [x - radius, y - stretch * radius, x + radius, y + stretch * radius], colour
            )
        else:
            corners = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
            across, down = x + radius * np.cos(corners), y + stretch * radius * np.sin(corners)
            pen.polygon(list(zip(across.tolist(), down.tolist(), strict=True)), colour)
    pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    # Light that changes across the picture, and grain.
    slope = rng.normal(0, 0.35, 2)
    grid = np.linspace(-0.5, 0.5, side)
    light = 1 + slope[0] * grid[:, None] + slope[1] * grid[None, :]
    grain = rng.normal(0, rng.uniform(0, 10), (side, side, 1))
    return Image.fromarray(np.clip(pixels * light[..., None] + grain, 0, 255).astype(np.uint8))
