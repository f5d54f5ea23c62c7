"""Charts of an evaluation as SVG text: bars of categories, and a radar of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from llava_uhd.page import COLOURS, legend, short

WIDTH, NAME, VALUE, ROW = 520, 170, 92, 20
MOST_BARS = 40
LONGEST = 26  # letters of a name
SIDE, REACH = 700, 170  # of the radar, pixels
RINGS = (0.25, 0.5, 0.75, 1.0)


class Bar(NamedTuple):
    """A bar: its name, its length, and how many items it stands for."""

    name: str
    value: float
    items: int | None = None


class Shape(NamedTuple):
    """A line around the radar: its name, and a value for each axis, None where there is none."""

    name: str
    values: Sequence[float | None]


def cut(text: str, longest: int = LONGEST) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def full_length(values: Sequence[float]) -> float:
    """What a bar of full length stands for: 1 for shares, 100 for percentages, else the largest.

    Example: ``[0.2, 0.9]`` gives 1, ``[3, 62.5]`` gives 100, ``[125, 180]`` gives 180.
    """
    most = max(values, default=0.0)
    return next((full for full in (1.0, 100.0) if most <= full), most)


def bar_chart(label: str, bars: Sequence[Bar], full: float) -> str:
    """Bars from left to right, at most `MOST_BARS`; empty without any.

    Args:
        label: what is drawn.
        bars: from top to bottom; values that are no numbers are left out.
        full: value of a bar of full length.
    """
    shown = [bar for bar in bars if math.isfinite(bar.value)][:MOST_BARS]
    if not shown:
        return ""
    height, reach = ROW * len(shown) + 4, WIDTH - NAME - VALUE

    def right(value: float) -> float:
        return NAME + reach * min(max(value / (full or 1), 0), 1)

    parts = []
    for number, bar in enumerate(shown):
        top, end = 2 + ROW * number, right(bar.value)
        middle = top + ROW / 2
        many = "" if bar.items is None else f" ({bar.items})"
        parts.append(
            f"<g><title>{escape(bar.name)}: {bar.value:.4g}{many}</title>"
            f'<text x="{NAME - 8}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(cut(bar.name))}</text>"
            f'<rect x="{NAME}" y="{top + 3}" width="{reach}" height="{ROW - 6}" class="rail"/>'
            f'<rect x="{NAME}" y="{top + 3}" width="{end - NAME:.1f}" height="{ROW - 6}" '
            f'fill="{COLOURS[0]}"/>'
            f'<text x="{WIDTH - VALUE + 6}" y="{middle + 4:.1f}">{bar.value:.4g}{many}</text></g>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def radar(label: str, axes: Sequence[str], shapes: Sequence[Shape]) -> str:
    """Each axis reaches from 0 to the best value on it; empty with fewer than three axes.

    A shape is drawn from value to value; where it has none its line is open.

    Args:
        label: what is drawn.
        axes: names.
        shapes: the first is drawn last, over the others.
    """
    if len(axes) < 3:
        return ""
    best = [max((s.values[n] or 0.0 for s in shapes), default=0.0) or 1.0 for n in range(len(axes))]
    middle, height = SIDE / 2, 2 * REACH + 60

    def place(axis: int, share: float) -> str:
        angle = 2 * math.pi * axis / len(axes)
        x, y = (
            middle + REACH * share * math.sin(angle),
            height / 2 - REACH * share * math.cos(angle),
        )
        return f"{x:.1f},{y:.1f}"

    parts = []
    for ring in RINGS:
        corners = " ".join(place(axis, ring) for axis in range(len(axes)))
        parts.append(f'<polygon points="{corners}" class="ring"/>')
    for axis, name in enumerate(axes):
        end, word = place(axis, 1).split(","), place(axis, 1.09).split(",")
        side = math.sin(2 * math.pi * axis / len(axes))
        anchor = "middle" if abs(side) < 0.2 else "start" if side > 0 else "end"
        parts.append(
            f'<line x1="{middle}" y1="{height / 2}" x2="{end[0]}" y2="{end[1]}" class="grid"/>'
            f'<text x="{word[0]}" y="{word[1]}" text-anchor="{anchor}"><title>{escape(name)}'
            f"</title>{escape(cut(name, 20))} {short(best[axis])}</text>"
        )
    for number, shape in reversed(list(enumerate(shapes))):
        parts += _shape(
            shape, best, place, COLOURS[number % len(COLOURS)], 2.6 - 1.2 * (number > 0)
        )
    names = [(shape.name, COLOURS[n % len(COLOURS)]) for n, shape in enumerate(shapes)]
    return (
        f'<svg viewBox="0 0 {SIDE} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>" + legend(names)
    )


def _shape(
    shape: Shape,
    best: Sequence[float],
    place: Callable[[int, float], str],
    colour: str,
    width: float,
) -> list[str]:
    """Lines between neighbours that both have a value, and a dot at each value."""
    points = [
        None if value is None else place(axis, max(value, 0.0) / best[axis])
        for axis, value in enumerate(shape.values)
    ]
    parts = []
    for first, second in zip(points, [*points[1:], points[0]]):
        if first is not None and second is not None:
            (x1, y1), (x2, y2) = first.split(","), second.split(",")
            parts.append(
                f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" '
                f'stroke-width="{width:.1f}"/>'
            )
    for point in filter(None, points):
        x, y = point.split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
    return parts
