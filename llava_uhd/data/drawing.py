"""Pictures of the embedded data: fine text, coloured marks and lines, drawn from explicit seeds.

Text is set in Pillow's own font at 14 pixels, one digit every `PITCH` pixels; a digit is about
7 x 10 pixels. It is legible at native size and lost when a large picture is shrunk to one small
view. Marks are large enough to survive that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 14
PITCH = 16  # pixels from one digit to the next in a sign
CELL = (9, 10)  # (width, height) in pixels of a glyph bitmap

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 214),
    "orange": (240, 150, 30),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sign:
    """Digits in one line.

    Attributes:
        text: the digits.
        left: of the first glyph cell, in pixels.
        top: of the glyph cells.
    """

    text: str
    left: int
    top: int

    @property
    def box(self) -> Box:
        """(left, top, right, bottom) of all glyph cells."""
        right = self.left + PITCH * (len(self.text) - 1) + CELL[0]
        return self.left, self.top, right, self.top + CELL[1]

    @property
    def glyph_boxes(self) -> list[Box]:
        """Box of each digit."""
        return [
            (x, self.top, x + CELL[0], self.top + CELL[1])
            for x in range(self.left, self.left + PITCH * len(self.text), PITCH)
        ]


@dataclass(frozen=True)
class Mark:
    """A filled shape.

    Attributes:
        shape: one of `SHAPES`.
        colour: name in `COLOURS`.
        box: (left, top, right, bottom) in pixels.
    """

    shape: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """Everything in one picture.

    Attributes:
        size: (width, height).
        background: RGB.
        ink: RGB of the digits.
        signs: lines of digits.
        marks: coloured shapes.
        lines: (x0, y0, x1, y1, grey level) of distracting strokes, drawn below all else.
    """

    size: tuple[int, int]
    background: tuple[int, int, int] = (255, 255, 255)
    ink: tuple[int, int, int] = (0, 0, 0)
    signs: list[Sign] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    lines: list[tuple[int, int, int, int, int]] = field(default_factory=list)


@lru_cache(maxsize=16)
def glyph(character: str) -> np.ndarray:
    """Coverage of one character, float32 (height, width) of `CELL` in [0, 1]; not to be written."""
    font = ImageFont.load_default(FONT_SIZE)
    left, top, _, _ = font.getbbox("0")
    canvas = Image.new("L", CELL, 0)
    ImageDraw.Draw(canvas).text((-left, -top), character, font=font, fill=255)
    return np.asarray(canvas, np.float32) / np.float32(255)


def overlaps(one: Box, other: Box, margin: int = 0) -> bool:
    """Whether two boxes come closer than ``margin`` pixels on both axes."""
    return (
        one[0] < other[2] + margin
        and other[0] < one[2] + margin
        and one[1] < other[3] + margin
        and other[1] < one[3] + margin
    )


def render(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Returns:
        uint8 (height, width, 3).
    """
    canvas = Image.new("RGB", scene.size, scene.background)
    draw = ImageDraw.Draw(canvas)
    for x0, y0, x1, y1, grey in scene.lines:
        draw.line((x0, y0, x1, y1), fill=(grey, grey, grey))
    for mark in scene.marks:
        left, top, right, bottom = mark.box
        colour = COLOURS[mark.colour]
        if mark.shape == "circle":
            draw.ellipse(mark.box, fill=colour)
        elif mark.shape == "square":
            draw.rectangle(mark.box, fill=colour)
        else:
            draw.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=colour)
    pixels = np.array(canvas)
    for sign in scene.signs:
        for character, box in zip(sign.text, sign.glyph_boxes, strict=True):
            paste_glyph(pixels, character, box[0], box[1], scene.ink)
    return pixels


def paste_glyph(
    pixels: np.ndarray, character: str, left: int, top: int, ink: tuple[int, int, int]
) -> None:
    """Lays one glyph over ``pixels`` (height, width, 3) uint8; it must lie inside."""
    area = pixels[top : top + CELL[1], left : left + CELL[0]]
    cover = glyph(character)[:, :, None]
    blended = area * (1 - cover) + np.asarray(ink, np.float32) * cover
    area[:] = np.rint(blended).astype(np.uint8)


def draw_background(
    rng: np.random.Generator,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A light background and a dark ink, RGB each."""
    light = rng.integers(215, 256, 3)
    dark = rng.integers(0, 70, 3)
    return (int(light[0]), int(light[1]), int(light[2])), (int(dark[0]), int(dark[1]), int(dark[2]))


def draw_mark(rng: np.random.Generator, size: tuple[int, int], avoid: list[Box]) -> Mark | None:
    """A mark of 14 to 24 pixels that stays clear of the boxes, or None if 20 tries fail."""
    width, height = size
    for _ in range(20):
        side = int(rng.integers(14, 25))
        if side >= min(width, height):
            continue
        left = int(rng.integers(0, width - side))
        top = int(rng.integers(0, height - side))
        box = (left, top, left + side, top + side)
        if not any(overlaps(box, other, 3) for other in avoid):
            names = list(COLOURS)
            return Mark(
                SHAPES[int(rng.integers(len(SHAPES)))], names[int(rng.integers(len(names)))], box
            )
    return None


def draw_lines(
    rng: np.random.Generator, size: tuple[int, int], count: int, avoid: list[Box]
) -> list[tuple[int, int, int, int, int]]:
    """Up to ``count`` grey strokes whose bounding boxes stay clear of the text."""
    width, height = size
    lines = []
    for _ in range(count):
        x0, x1 = (int(value) for value in rng.integers(0, width, 2))
        y0, y1 = (int(value) for value in rng.integers(0, height, 2))
        box = (min(x0, x1), min(y0, y1), max(x0, x1) + 1, max(y0, y1) + 1)
        if not any(overlaps(box, other, 2) for other in avoid):
            lines.append((x0, y0, x1, y1, int(rng.integers(120, 200))))
    return lines
