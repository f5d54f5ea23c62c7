"""Slice plans: the original's own cases, worked numbers, and what must hold for every size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_uhd.config.model import ImageConfig, ProjectorConfig
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import (
    MAX_ASPECT_RATIO,
    SlicePlan,
    choose_grid,
    fit_area,
    fit_long_side,
    floor_to_patches,
    num_image_positions,
    num_schema_tokens,
    plan_slices,
    pool_bins,
    six_slice_size,
)
from llava_uhd.images.strategies import plan_image, prepared_size
from llava_uhd.images.tokens import view_token_counts

sides = st.integers(1, 6000)


def slicing(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "uhd_v1/slicing.json").read_text())


def check_case(plan: SlicePlan, case: dict[str, Any]) -> None:
    assert plan.grid == (tuple(case["grid"]) if case["grid"] else None)
    assert list(plan.overview_size) == case["overview_size"]
    assert plan.num_slices == case["num_slices"]
    for name in ("refine_size", "slice_size"):
        size = getattr(plan, name)
        assert (list(size) if size else None) == case[name], name
    assert [list(box) for box in plan.crop_boxes] == case["crop_boxes"]
    assert num_schema_tokens(plan) == len(case["ind_tokens"])
    assert num_image_positions(plan, 144) == case["visual_tokens"]
    if plan.grid is not None:
        row = [29892] * (plan.grid[0] - 1) + [13]
        assert case["ind_tokens"] == row * plan.grid[1]


def test_published_cases(golden: Path) -> None:
    data = slicing(golden)
    assert len(data["cases"]) >= 75
    for case in data["cases"]:
        width, height = case["image_size"]
        check_case(plan_slices(width, height), case)


def test_published_cases_with_other_arguments(golden: Path) -> None:
    data = slicing(golden)
    for case in data["cases_other_args"]:
        values = {**data["defaults"], **case["args"]}
        plan = plan_slices(
            *case["image_size"],
            max_slices=values["max_slice_nums"],
            scale_resolution=values["scale_resolution"],
            never_split=values["never_split"],
        )
        check_case(plan, case)


def test_published_pre_resizes(golden: Path) -> None:
    data = slicing(golden)
    refused = 0
    for case in data["cases"]:
        expected = case["eval_keep_ratio_1024"]
        if isinstance(expected, str):
            refused += 1
            with pytest.raises(ValueError, match="height and width must be > 0"):
                fit_long_side(*case["image_size"], 1024)
        else:
            assert list(fit_long_side(*case["image_size"], 1024)) == expected
    assert refused
    for case in data["train_aug_grid6"]:
        assert list(six_slice_size(*case["image_size"])) == case["resized"]


def test_worked_numbers() -> None:
    plan = plan_slices(672, 1088)
    assert (plan.overview_size, plan.refine_size) == ((252, 420), (644, 1008))
    assert (plan.slice_size, plan.grid) == ((322, 336), (2, 3))
    # The height is truncated first, so a transposed image is not cut into transposed slices.
    assert plan_slices(672, 448).overview_size == (406, 266)
    assert plan_slices(448, 672).overview_size == (266, 406)
    assert plan_slices(1920, 1080).overview_size == (448, 252)
    assert plan_slices(1920, 1080).slice_size == (364, 308)
    assert plan_slices(1080, 1920).slice_size == (294, 364)
    # Small images are enlarged, thin ones are not cut.
    assert plan_slices(1, 1) == SlicePlan((1, 1), (336, 336))
    assert plan_slices(5, 4000).overview_size == (14, 9492)
    assert plan_slices(336, 1).overview_size == (6048, 14)
    assert plan_slices(200000, 1).overview_size[1] == 14
    assert plan_slices(200, 2000).grid == (1, 5)
    assert plan_slices(3, 60000).view_sizes[0] == (14, 27426)
    assert plan_slices(1, 200000).view_sizes[0] == (14, 86744)
    assert num_image_positions(plan_slices(672, 1008), 144) == 7 * 144 + 6
    assert fit_long_side(823, 823, 1024) == (1023, 1024)
    assert six_slice_size(672, 448) == (1008, 672)


def test_bounds_extreme_shapes() -> None:
    plan = plan_slices(1, 200000, bounded=True)
    assert max(rows * columns for rows, columns in plan.view_grids) <= 24 * 24
    assert plan_slices(1, 200000) != plan


def test_grid_ties_are_decided_by_rounding_then_order() -> None:
    assert choose_grid(0.0, 6, 7) == (3, 2)  # |log(3/2)| is one unit below |log(2/3)|
    assert choose_grid(0.0, 2, 7) == (1, 2)  # an exact tie: the first candidate
    assert choose_grid(0.0, 4, 7) == (2, 2)
    for count in range(2, 8):
        columns, rows = choose_grid(math.log(1.7), count, 7)
        assert columns * rows in (count - 1, count, count + 1)


@example(1, 1, False)
@example(6000, 1, True)
@example(823, 823, False)
@given(sides, sides, st.booleans())
def test_every_plan_is_sound(width: int, height: int, bounded: bool) -> None:
    plan = plan_slices(width, height, bounded=bounded)
    assert plan.num_slices <= 7 and plan.num_slices != 1
    assert len(plan.view_sizes) == plan.num_views == len(plan.view_grids) == plan.num_slices + 1
    for (view_width, view_height), (rows, columns) in zip(plan.view_sizes, plan.view_grids):
        assert (view_width, view_height) == (columns * 14, rows * 14)
        assert min(rows, columns) >= 1
        if bounded:
            assert rows * columns <= 24 * 24
    if plan.grid is None:
        assert plan.num_slices == 0 and not plan.crop_boxes and plan.refine_size is None
        return
    columns, rows = plan.grid
    assert plan.refine_size is not None and plan.slice_size is not None
    assert columns * rows == plan.num_slices
    assert plan.refine_size == (plan.slice_size[0] * columns, plan.slice_size[1] * rows)
    covered = sum((r - left) * (b - top) for left, top, r, b in plan.crop_boxes)
    assert covered == plan.refine_size[0] * plan.refine_size[1]
    assert plan.crop_boxes == sorted(plan.crop_boxes, key=lambda box: (box[1], box[0]))
    assert num_image_positions(plan, 144) == 145 * plan.num_slices + 144


@given(sides, sides)
def test_bounded_equals_published_in_the_normal_range(width: int, height: int) -> None:
    published = plan_slices(width, height)
    bounded = plan_slices(width, height, bounded=True)
    cells = [published.image_size]
    if published.grid is not None:
        cells.append((max(width // published.grid[0], 1), max(height // published.grid[1], 1)))
    if all(max(w / h, h / w) <= MAX_ASPECT_RATIO for w, h in cells):
        assert bounded == published
    assert bounded.grid == published.grid


@given(sides, sides, st.integers(1, 12), st.sampled_from([(64, 8), (224, 16), (448, 14)]))
def test_other_scales(width: int, height: int, most: int, scale: tuple[int, int]) -> None:
    resolution, patch = scale
    plan = plan_slices(width, height, most, resolution, patch)
    assert plan.num_slices <= most
    assert all(side % patch == 0 and side > 0 for size in plan.view_sizes for side in size)
    if width * height <= resolution * resolution or most == 1:
        assert plan.grid is None


@given(sides, sides)
def test_area_is_about_the_scale(width: int, height: int) -> None:
    size = fit_area((width, height), 336, 14, upscale=True)
    assert size[0] * size[1] <= 336 * 336 or 14 in size
    assert floor_to_patches(size[0], 14) == size[0]


@given(sides, sides, st.booleans(), st.sampled_from([None, 1024]))
def test_strategies(width: int, height: int, overview_only: bool, long_side: int | None) -> None:
    config = ImageConfig(bounded=False, long_side=long_side)
    try:
        size = prepared_size(config, width, height)
    except ValueError:
        assert long_side is not None and max(width, height) / min(width, height) > 1024
        return
    plan = plan_image(config, width, height, overview_only)
    full = plan_slices(*size)
    assert plan.overview_size == full.overview_size
    assert plan.num_slices == (0 if overview_only else full.num_slices)
    assert plan.image_size == size
    square = plan_image(ImageConfig(strategy="squeeze"), width, height)
    assert square.view_grids == [(24, 24)]


def test_token_counts() -> None:
    grids = [(24, 24), (1, 60)]
    assert view_token_counts(ProjectorConfig(num_queries=64), grids) == [64, 64]
    assert view_token_counts(ProjectorConfig(type="mlp2x_gelu"), grids) == [576, 60]
    with pytest.raises(UserError, match="square number"):
        view_token_counts(ProjectorConfig(num_queries=150), grids)


@pytest.mark.parametrize(
    ("ratio", "bins"),
    # Thresholds of width / height as published: rows x columns.
    [
        *[(0.57, (4, 2)), (0.7, (3, 2)), (0.86, (4, 3)), (1.0, (3, 3)), (1.15, (3, 3))],
        *[(1.16, (3, 4)), (1.41, (3, 4)), (1.42, (2, 3)), (1.73, (2, 3)), (1.74, (2, 4))],
    ],
)
def test_pool_bins(ratio: float, bins: tuple[int, int]) -> None:
    assert pool_bins(1000, round(1000 * ratio)) == bins


def test_refuses_nonsense() -> None:
    for size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="image size must be positive"):
            plan_slices(*size)
    with pytest.raises(ValueError, match="max_slices"):
        plan_slices(5, 5, max_slices=0)
    with pytest.raises(ValueError, match="scale_resolution"):
        plan_slices(5, 5, scale_resolution=8)
    with pytest.raises(UserError, match="did you mean 'slices'"):
        plan_image(ImageConfig(strategy="slcies"), 5, 5)
