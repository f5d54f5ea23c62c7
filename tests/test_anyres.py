"""Tiles of LLaVA-NeXT and OneVision: published tables, and counts against a model's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_tiny import picture, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_uhd.config.model import ImageConfig, VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images.anyres import expand_pinpoints, plan_anyres, select_canvas
from llava_uhd.images.cost import image_cost
from llava_uhd.images.geometry import SlicePlan
from llava_uhd.images.maps import TokenMap, image_maps, video_maps
from llava_uhd.images.pixels import cut_views
from llava_uhd.images.strategies import plan_frame, plan_image
from llava_uhd.model.packing import merge_views

Case = dict[str, Any]
# (file, variant) -> tile side, tokens per side of a tile, limit of tiles.
TABLES = {
    ("anyres_max_9", None): (384, 27, 9),
    ("anyres_max_k", "anyres_max_1"): (384, 27, 1),
    ("anyres_max_k", "anyres_max_2"): (384, 27, 2),
    ("anyres_max_k", "anyres_max_4"): (384, 27, 4),
    ("anyres_next_336", None): (336, 24, None),
}
RANGE = "(1x1),...,(6x6)"


def read(golden: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(
        (golden / f"llava_onevision/anyres/{name}.json").read_text()
    )
    return values


def plan_and_maps(
    size: tuple[int, int], pinpoints: str, tile: int, side: int, limit: int | None
) -> tuple[SlicePlan, list[TokenMap]]:
    config = ImageConfig(
        strategy="anyres",
        layout="unpad",
        pinpoints=pinpoints,
        max_tiles=limit,
        scale_resolution=tile,
    )
    plan = plan_image(config, *size)
    return plan, image_maps(config, plan, [(side, side)] * plan.num_views)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table[1] or table[0])
def test_published_tables(golden: Path, table: tuple[str, str | None]) -> None:
    tile, side, limit = TABLES[table]
    values = read(golden, table[0])
    cases: list[Case] = values["variants"][table[1]] if table[1] else values["cases"]
    assert len(cases) >= 20
    for case in cases:
        size = (case["size_wh"][0], case["size_wh"][1])
        plan, maps = plan_and_maps(size, values["grid_pinpoints"], tile, side, limit)
        overview, joined = maps
        assert plan.refine_size == tuple(case["best_resolution_wh"])
        assert plan.grid == tuple(case["grid_wh"]) and plan.num_slices == case["tiles"]
        assert plan.num_views == case["crops_including_overview"]
        assert [plan.grid[1] * side, plan.grid[0] * side] == case["canvas_tokens_hw"]
        assert [joined.height, joined.width] == case["unpadded_hw"]
        if case["unpadded_tokens"]:
            assert [joined.out_height, joined.out_width] == case["final_hw"]
        assert overview.tokens == side * side
        assert overview.tokens + joined.tokens == case["total_tokens"]
        if "paste_box_xyxy" in case:
            assert plan.slices_on is not None
            (left, top), (width, height) = plan.slices_on.offset, plan.slices_on.scaled
            assert [left, top, left + width, top + height] == case["paste_box_xyxy"]


def coded_views(count: int, side: int) -> torch.Tensor:
    """Tokens that say where they come from: (view, row, column)."""
    places = torch.cartesian_prod(torch.arange(count), torch.arange(side), torch.arange(side))
    return places.float()


def test_published_merging(golden: Path) -> None:
    """The sequence itself, bilinear shrinking included."""
    pinpoints = read(golden, "anyres_max_9")["grid_pinpoints"]
    with np.load(golden / "llava_onevision/anyres/merged_features_every7th.npz") as found:
        assert len(found.files) == 8
        for name in found.files:
            width, height = (int(each) for each in name.split("x"))
            plan, maps = plan_and_maps((width, height), pinpoints, 384, 27, 9)
            tokens = coded_views(plan.num_views, 27)
            merged = merge_views(
                tokens, [(27, 27)] * plan.num_views, torch.tensor(maps), torch.full((3,), -1.0)
            )
            assert len(merged) == sum(each.tokens for each in maps)
            expected = torch.from_numpy(found[name])
            torch.testing.assert_close(merged[::7], expected, atol=1e-4, rtol=1e-4, msg=name)


def test_published_layouts(golden: Path) -> None:
    counts = read(golden, "layouts")
    image = ImageConfig(strategy="anyres", layout="unpad", several="pad", scale_resolution=384)
    for name, count in counts.items():
        words = name.split("_")
        if words[0] == "video":
            video = VideoConfig(pool_stride=2, newline="_".join(words[2:]))  # type: ignore[arg-type]
            maps = video_maps(image, video, [(27, 27)] * int(words[1][1:]))
        else:
            flat = words[-2:] == ["flat", "merge"]
            layout = ImageConfig(layout="flat") if flat else image
            plan = plan_image(image, 640, 480, several=True)
            number = int(words[2]) if words[0] == "multi" else 1
            maps = image_maps(layout, plan, [(27, 27)]) * number
        assert sum(each.tokens for each in maps) == count, name


def test_published_video_sequences(golden: Path) -> None:
    image = ImageConfig(layout="unpad")
    with np.load(golden / "llava_onevision/anyres/video_layouts.npz") as found:
        for name in found.files:
            words = name.split("_")
            frames = int(words[1][1:])
            video = VideoConfig(pool_stride=2, newline="_".join(words[2:]))  # type: ignore[arg-type]
            maps = video_maps(image, video, [(27, 27)] * frames)
            tokens, newline = coded_views(frames, 27), torch.full((3,), -1.0)
            merged = merge_views(tokens, [(27, 27)] * frames, torch.tensor(maps), newline)
            torch.testing.assert_close(merged, torch.from_numpy(found[name]), msg=name)


@pytest.mark.parametrize("mode", ["average", "max"])
def test_other_poolings(mode: str) -> None:
    """Incomplete squares at the border are left out: 27x27 gives 13x13."""
    video = VideoConfig(pool_stride=2, pool_mode=mode)  # type: ignore[arg-type]
    maps = video_maps(ImageConfig(layout="flat"), video, [(27, 27)] * 2)
    assert [each.tokens for each in maps] == [169, 169]
    tokens = torch.randn(2 * 729, 5, generator=torch.Generator().manual_seed(0))
    merged = merge_views(tokens, [(27, 27)] * 2, torch.tensor(maps)).reshape(2, 13, 13, 5)
    squares = tokens.reshape(2, 27, 27, 5)[:, 8:10, 4:6].flatten(1, 2)
    expected = squares.mean(1) if mode == "average" else squares.amax(1)
    torch.testing.assert_close(merged[:, 4, 2], expected)


# --- canvases -------------------------------------------------------------------------------------


def test_pinpoint_notations() -> None:
    assert expand_pinpoints(RANGE, 384) == tuple(
        (384 * column, 384 * row) for column in range(1, 7) for row in range(1, 7)
    )
    listed = ((336, 672), (672, 336))
    assert expand_pinpoints("[(336, 672), (672, 336)]", 336) == listed
    assert expand_pinpoints([[336, 672], [672, 336]], 336) == listed
    assert expand_pinpoints("(2x1),(1x1),(3x2)", 384)[0] == (768, 384), "first and last item count"
    for value in (None, [], "", "(x)", "nonsense", "[1, 2]", [[336, 672, 3]], "(1x1"):
        with pytest.raises(UserError, match="image.pinpoints"):
            expand_pinpoints(value, 336)
    with pytest.raises(UserError, match="340 x 336 is no multiple of image.scale_resolution 336"):
        expand_pinpoints([[340, 336]], 336)


def test_missing_pinpoints_are_no_fault_of_an_image() -> None:
    """A mistake of the configuration is told when the processor is made."""
    with pytest.raises(UserError, match="^image.pinpoints is empty"):
        tiny_parts(image={"strategy": "anyres", "layout": "unpad"})


@given(size=st.tuples(st.integers(1, 6000), st.integers(1, 6000)))
def test_the_canvas_against_a_search(size: tuple[int, int]) -> None:
    """Most pixels kept, then least waste, then first."""
    sizes = expand_pinpoints(RANGE, 384)

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, -(canvas[0] * canvas[1] - kept)

    best = max(merit(each) for each in sizes)
    wanted = next(each for each in sizes if merit(each) == best)
    found = select_canvas(*size, sizes)
    # Nothing is ever kept of an image so thin that it vanishes: then the first canvas stands.
    assert found == (wanted if best[0] else sizes[0])


def test_pictures_on_their_canvas() -> None:
    """Overview and tiles of a red picture: black padding, no red lost."""
    image = Image.new("RGB", (640, 480), (255, 0, 0))
    plan = plan_anyres(640, 480, expand_pinpoints(RANGE, 384), 384, 14)
    views = cut_views(image, plan)
    assert [view.size for view in views] == [(384, 384)] * 5
    assert views[0].getextrema() == ((255, 255), (0, 0), (0, 0)), "squeezed, not padded"
    joined = Image.new("RGB", (768, 768))
    for index, view in enumerate(views[1:]):
        joined.paste(view, (384 * (index % 2), 384 * (index // 2)))
    assert joined.getbbox() == (0, 96, 768, 672)
    assert joined.crop((0, 96, 768, 672)).getextrema() == ((255, 255), (0, 0), (0, 0))


@pytest.mark.parametrize("size", [(200, 120), (90, 160), (150, 150), (1, 7), (33, 32)])
def test_square_views(size: tuple[int, int]) -> None:
    """ "square" cuts the middle out, "pad" keeps everything, "squeeze" ignores the shape."""
    image, side = picture(*size), 32
    config = ImageConfig(scale_resolution=side, patch_size=8)
    mean = (0.5, 0.25, 0.75)
    views = {}
    for name in ("square", "pad", "squeeze"):
        plan = plan_image(ImageConfig(strategy=name, scale_resolution=side, patch_size=8), *size)
        (views[name],) = cut_views(image, plan, mean)
        assert views[name].size == (side, side) and plan.view_grids == [(4, 4)]
    assert config.strategy == "slices"
    assert views["squeeze"] == image.resize((side, side), Image.Resampling.BICUBIC)
    long_side = max(size)
    canvas = Image.new("RGB", (long_side, long_side), (127, 63, 191))
    canvas.paste(image, ((long_side - size[0]) // 2, (long_side - size[1]) // 2))
    assert views["pad"] == canvas.resize((side, side), Image.Resampling.BICUBIC)
    short = min(size)
    scaled = tuple(side if each == short else int(side * each / short) for each in size)
    left, top = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    middle = image.resize(scaled, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    assert views["square"] == middle.crop((left, top, left + side, top + side))


# --- the whole house ------------------------------------------------------------------------------

TILES = {
    "strategy": "anyres",
    "layout": "unpad",
    "pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32]],
    "max_tiles": 2,
    "several": "pad",
}
MIXES = [
    {"projector": {"type": "mlp2x_gelu"}, "image": TILES},
    {"projector": {"type": "pixel_unshuffle_mlp"}, "image": TILES},
    {"projector": {"type": "spatial_resampler"}, "image": TILES},
    {"projector": {"type": "hiwin", "scales": [1, 2]}, "image": {**TILES, "layout": "spatial"}},
    {"projector": {"type": "linear"}, "image": {**TILES, "layout": "flat"}},
    {"projector": {"type": "mlp1x_gelu"}, "image": {**TILES, "layout": "slices"}},
    {"projector": {"type": "spatial_resampler"}, "image": {**TILES, "layout": "rows"}},
    {"projector": {"type": "mlp2x_gelu"}, "image": {"strategy": "pad", "layout": "flat"}},
    {"projector": {"type": "mlp2x_gelu"}, "image": {"strategy": "slices", "layout": "unpad"}},
    {"projector": {"type": "pixel_unshuffle_mlp", "unshuffle": 4}, "image": {"layout": "slices"}},
]
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48}
SIGLIP |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 36, "patch_size": 8}


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: f"{m['projector']['type']}-{m['image']}"[:60])
@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    other=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_counts_equal_the_rows(
    mix: dict[str, Any], size: tuple[int, int], other: tuple[int, int]
) -> None:
    model, processor = tiny_parts(**{key: dict(value) for key, value in mix.items()})
    for sizes in ([size], [size, other]):
        images = [picture(*each) for each in sizes]
        inputs = processor(text="<image> " * len(sizes), images=images)
        several = len(sizes) > 1
        expected = sum(processor.num_image_tokens(*each, several=several) for each in sizes)
        text = processor(text=" ".join(" " for _ in sizes))["input_ids"].shape[1]
        assert expected <= inputs["input_ids"].shape[1] <= expected + text + 4 * len(sizes)
        with torch.no_grad():
            vision = {key: inputs[key] for key in inputs if key in VISION_KEYS}
            tokens = model.get_image_features(**vision)
        assert len(tokens) == int((inputs["input_ids"] == processor.image_token_id).sum())
    cost = image_cost(model.config, processor.plan(*size))
    assert cost.positions == processor.num_image_tokens(*size)


VISION_KEYS = ("pixel_values", "view_grids", "token_maps")


def test_a_rest_of_the_view_is_not_read() -> None:
    """384 / 14 leaves 6 pixels: SigLIP's patches begin at the left and top."""
    model, processor = tiny_parts(
        vision=SIGLIP,
        projector={"type": "linear"},
        image={"strategy": "squeeze", "layout": "flat", "scale_resolution": 36},
    )
    image = picture(36, 36)
    inputs = processor(text="<image>", images=[image])
    assert inputs["view_grids"].tolist() == [[4, 4]]
    changed = image.copy()
    changed.paste((0, 0, 0), (32, 0, 36, 36))
    again = processor(text="<image>", images=[changed])
    assert torch.equal(inputs["pixel_values"], again["pixel_values"])
    changed.paste((0, 0, 0), (31, 0, 32, 1))
    moved = processor(text="<image>", images=[changed])
    assert not torch.equal(inputs["pixel_values"], moved["pixel_values"])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_frames_are_one_view() -> None:
    video = VideoConfig()
    for name, size in (("slices", (56, 14)), ("pad", (28, 28)), ("anyres", (28, 28))):
        config = ImageConfig(
            strategy=name,
            scale_resolution=28,
            pinpoints=[(28, 56)],  # type: ignore[arg-type]
        )
        plan = plan_frame(config, video, 400, 100)
        assert plan.num_slices == 0 and plan.overview_size == size, name
    squeezed = plan_frame(ImageConfig(strategy="pad"), VideoConfig(strategy="squeeze"), 400, 100)
    assert squeezed.overview_on is None
    with pytest.raises(UserError, match="unknown image strategy 'crop'"):
        plan_frame(ImageConfig(), VideoConfig(strategy="crop"), 400, 100)
