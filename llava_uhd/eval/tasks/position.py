"""The position test: shapes on a grid across the borders of slices, drawn on first use.

A model that loses something where slices meet is worse on shapes that a border cuts; a model that
does not know how its slices lie is worse away from the first of them. Neither shows in benchmarks
whose pictures carry few objects.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.config.model import ImageConfig
from llava_uhd.data.drawing import COLOURS, SHAPES
from llava_uhd.eval.heat_map import Panel, heat_map
from llava_uhd.eval.metrics import grouped, mean, percent_of_each
from llava_uhd.eval.position_data import GRIDS, QUESTIONS_FILE, PositionConfig, draw, is_drawn
from llava_uhd.eval.published import iterate_rows
from llava_uhd.eval.scoring.positions import NEARNESS, nearness, region, slice_borders
from llava_uhd.eval.task import Item, Scored, Task
from llava_uhd.eval.tasks.question_file import image_path
from llava_uhd.images.geometry import Size
from llava_uhd.images.strategies import plan_image

HEAT_MAP = "position.png"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Position(Task):
    """What stands in a row and column, and how many shapes there are.

    ``position_exact`` wants colour and shape of a place, ``count_exact`` the number.

    Attributes:
        config: of the pictures.
        image: how the model cuts pictures; None as long as that is not known.
    """

    name = "position"
    title = "Position test"
    folder = "position"
    source = "it is drawn when it is named: --tasks position"
    main_metric = "position_exact"
    max_new_tokens = 16
    config = PositionConfig()
    image: ImageConfig | None = None

    def files(self, root: Path) -> list[Path]:
        """Questions and pictures."""
        return [root / QUESTIONS_FILE, root / "images"]

    def provide(self, root: Path) -> None:
        """Draws the pictures if they are not there."""
        draw(root, self.config)

    def missing(self, root: Path, gold: bool = False) -> str | None:
        """Also pictures of another format are missing."""
        return super().missing(root, gold) or (
            None if is_drawn(root, self.config) else f"{self.name}: {root} is old; {self.source}"
        )

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of the questions."""
        file = root / QUESTIONS_FILE
        for row in iterate_rows(file, "question_id", "image", "text", "answer", "category"):
            image = image_path(root / "images", row["image"], file)
            width, height = row["size"]
            groups = {"question": row["category"], "size": f"{width}x{height}"}
            if row["category"] == "place":
                columns, rows = row["grid"]
                groups["region"] = region(row["row"], row["column"], rows, columns)
            yield Item(
                row["question_id"], row["text"], (image,), row["answer"], groups=groups, extra=row
            )

    def with_settings(self, settings: Mapping[str, Any]) -> Task:
        """The task that knows how the model of a run cuts pictures."""
        names = {each.name for each in dataclasses.fields(ImageConfig)}
        known = {key.removeprefix("image."): value for key, value in settings.items()}
        other = copy.copy(self)
        if "image.strategy" in settings:
            other.image = ImageConfig(**{key: known[key] for key in names & known.keys()})
        return other

    def parse(self, item: Item, answer: str) -> str:
        """The first colour and the first shape, or the first number, in words that are known."""
        words = re.findall(r"[a-z]+|\d+", answer.lower())
        if item.groups["question"] == "count":
            numbers = [str(_WORDS.index(word)) if word in _WORDS else word for word in words]
            return next((str(int(word)) for word in numbers if word.isdigit()), "")
        colour = next((word for word in words if word in COLOURS), "")
        singular = [word.removesuffix("s") for word in words]
        return f"{colour} {next((word for word in singular if word in SHAPES), '')}".strip()

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether all is right, and for places also colour and shape alone."""
        if item.groups["question"] == "count":
            return {"count_exact": float(parsed == item.reference)}
        colour, shape = item.reference.split()
        words = parsed.split()
        return {
            "position_exact": float(parsed == item.reference),
            "colour_exact": float(colour in words),
            "shape_exact": float(shape in words),
        }

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Means in percent."""
        return percent_of_each([each.metrics for each in scored])

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """By question, size and region; and by the nearest border of the model's own slices."""
        tables = super().breakdown(scored)
        if self.image is None:
            return tables
        parts = grouped(_places(scored), lambda each: self._nearness(each.item))
        tables["slice border"] = {
            name: {**self.aggregate(parts[name]), "items": len(parts[name])}
            for name in NEARNESS
            if name in parts
        }
        return tables

    def _borders(self, size: Size) -> tuple[list[float], list[float]]:
        if self.image is None:
            return [], []
        return slice_borders(plan_image(self.image, *size), size)

    def _nearness(self, item: Item) -> str:
        left, top, right, bottom = item.extra["box"]
        size = item.extra["size"]
        return nearness((left, top, right, bottom), *self._borders((size[0], size[1])))

    def pictures(self, scored: Sequence[Scored]) -> list[tuple[str, bytes]]:
        """Accuracy by place, a panel for each size, with the borders between slices."""
        panels = []
        for size, grid in GRIDS.items():
            places: dict[tuple[int, int], list[float]] = {}
            for each in _places(scored):
                about = each.item.extra
                if tuple(about["size"]) == size:
                    right = each.metrics[self.main_metric]
                    places.setdefault((about["row"], about["column"]), []).append(right)
            if places:
                values = {place: 100 * mean(found) for place, found in places.items()}
                panels.append(Panel(size, grid, values, *self._borders(size)))
        title = "colour and shape right, in percent"
        return [(HEAT_MAP, heat_map(panels, title))] if panels else []


def _places(scored: Sequence[Scored]) -> list[Scored]:
    return [each for each in scored if each.item.groups["question"] == "place"]
