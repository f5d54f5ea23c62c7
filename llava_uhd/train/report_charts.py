"""Charts of a report as SVG text inside its page: no pictures beside it, no scripts, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from llava_uhd.page import COLOURS, legend, short, ticks

Point = tuple[float, float]

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 34
# More points than pixels are averaged.
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the legend; empty: not there.
        points: (x, y), rising in x.
        colour: of the line.
        faint: a thin, pale line behind the others.
        dots: mark every point.
    """

    name: str
    points: Sequence[Point]
    colour: str = COLOURS[0]
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word at its top.

    Attributes:
        x: where; None: no line, the word alone.
        middle: of the word.
        label: the word.
    """

    x: float | None
    middle: float
    label: str


@dataclass
class Axes:
    """From values to places in the picture.

    Attributes:
        x: smallest and largest value.
        y: the same, from bottom to top.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    parts: list[str] = field(default_factory=list)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        right = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + width * right, HEIGHT - BOTTOM - height * min(max(up, 0), 1)

    def path(self, points: Sequence[Point]) -> str:
        """Points as the numbers of a polyline."""
        placed = (self.place(*point) for point in points)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)

    def text(self, x: float, y: float, word: str, anchor: str, kind: str = "tick") -> None:
        """Writes a word."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(word)}</text>"
        )

    def draw(self, percent: bool) -> None:
        """Draws grid, ticks and the name of the horizontal axis."""
        for value in ticks(*self.y):
            _, y = self.place(self.x[0], value)
            self.parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            )
            self.text(LEFT - 6, y + 4, f"{100 * value:g} %" if percent else short(value), "end")
        for value in ticks(*self.x):
            if value == int(value):
                x, _ = self.place(value, self.y[0])
                self.text(x, HEIGHT - BOTTOM + 16, f"{value:,.0f}", "middle")
        self.text((WIDTH + LEFT) / 2, HEIGHT - 4, "optimizer step", "middle", "axis")

    def mark(self, marks: Sequence[Mark]) -> None:
        """Draws borders; words that stand close go below each other."""
        before, row = -math.inf, 0
        for each in marks:
            if each.x is not None:
                x, _ = self.place(each.x, self.y[0])
                ends = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
                self.parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} class="border"/>')
            middle, _ = self.place(each.middle, self.y[0])
            row = row + 1 if middle - before < 40 else 0
            before = middle
            self.text(middle, TOP + 10 + 12 * row, each.label, "middle", "mark")

    def svg(self, label: str) -> str:
        """The whole picture."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
            f"{''.join(self.parts)}</svg>"
        )


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points, each the mean of its neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def line_chart(
    label: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    percent: bool = False,
    from_zero: bool = True,
) -> str:
    """Lines over the optimizer steps; empty if there is nothing to draw.

    Args:
        label: what is drawn.
        series: the lines; values that are no numbers are left out.
        marks: borders of stages.
        percent: write values as percentages.
        from_zero: the vertical axis begins at 0.
    """
    shown = []
    for each in series:
        points = [p for p in each.points if math.isfinite(p[1])]
        if points:
            shown.append((each, thin(points)))
    if not shown:
        return ""
    values = [y for _, points in shown for _, y in points]
    low, high = min(values), max(values)
    low = min(0.0, low) if from_zero else low
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    steps = [x for _, points in shown for x, _ in points]
    axes = Axes((min(steps), max(steps)), (low, high + margin * (4 if marks else 1)))
    axes.draw(percent)
    for each, points in sorted(shown, key=lambda pair: not pair[0].faint):
        kind = "faint" if each.faint else "line"
        axes.parts.append(
            f'<polyline points="{axes.path(points)}" class="{kind}" stroke="{each.colour}"/>'
        )
        if each.dots or len(points) == 1:
            for x, y in (axes.place(*point) for point in points):
                axes.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{each.colour}"/>')
    axes.mark(marks)
    return axes.svg(label) + legend([(each.name, each.colour) for each, _ in shown])


def area_chart(
    label: str, steps: Sequence[float], layers: Sequence[tuple[str, list[float]]]
) -> str:
    """Layers upon each other over the optimizer steps; empty if there is nothing to draw.

    Args:
        label: what is drawn.
        steps: (N,) horizontal values.
        layers: name and (N,) heights, from the lowest.
    """
    if not steps or not layers:
        return ""
    if len(steps) == 1:
        steps, layers = [steps[0], steps[0] + 1], [(name, 2 * heights) for name, heights in layers]
    thinned = [(name, thin(list(zip(steps, heights)))) for name, heights in layers]
    below = [0.0] * len(thinned[0][1])
    tops = []
    for name, points in thinned:
        above = [low + y for low, (_, y) in zip(below, points)]
        tops.append((name, [x for x, _ in points], below, above))
        below = above
    axes = Axes((min(steps), max(steps)), (0.0, max(below) * 1.05 or 1.0))
    axes.draw(percent=False)
    names = []
    for number, (name, places, low, high) in enumerate(tops):
        colour = COLOURS[number % len(COLOURS)]
        outline = [*zip(places, high), *reversed(list(zip(places, low)))]
        axes.parts.append(f'<polygon points="{axes.path(outline)}" fill="{colour}"/>')
        names.append((name, colour))
    return axes.svg(label) + legend(names)
