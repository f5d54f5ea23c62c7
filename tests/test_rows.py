"""The layout "rows": the token maps of all slices as one map, through the whole house."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import QWEN2, picture, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_generation import IMAGES, TEXTS, all_at_once, by_hand, one_by_one

from llava_uhd.config.model import ImageConfig
from llava_uhd.data.collator import Collator
from llava_uhd.errors import UserError
from llava_uhd.images.cost import image_cost
from llava_uhd.images.geometry import (
    SlicePlan,
    map_side,
    num_image_positions,
    num_schema_tokens,
    plan_slices,
)
from llava_uhd.images.maps import TokenMap, image_maps, whole_map
from llava_uhd.inspect import token_layout
from llava_uhd.model.packing import merge_views
from llava_uhd.text.layout import image_ids
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn

Parts = tuple[Any, LlavaUHDProcessor]
IMAGE, COMMA, NEWLINE = -1, 7, 13
ROWS = {"image": {"layout": "rows"}}
HIWIN = {"type": "hiwin", "scales": [1, 2, 4]}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts(seed=3, **ROWS)


@pytest.fixture(scope="module")
def processor(parts: Parts) -> LlavaUHDProcessor:
    return parts[1]


# --- integers -------------------------------------------------------------------------------------


def row_order(columns: int, rows: int, side: int) -> list[int]:
    """The published rule, position by position: place in the sequence -> token slice by slice."""
    return [
        ((row * columns + column) * side + line) * side + place
        for row in range(rows)
        for line in range(side)
        for column in range(columns)
        for place in range(side)
    ]


@given(columns=st.integers(1, 7), rows=st.integers(1, 7), side=st.integers(1, 6))
def test_the_joined_map_is_read_row_by_row(columns: int, rows: int, side: int) -> None:
    count = columns * rows * side * side
    tokens = torch.arange(count)[:, None]
    joined = torch.tensor([whole_map((side, side), columns, rows)])
    merged = merge_views(tokens, [(side, side)] * (columns * rows), joined)
    assert merged[:, 0].tolist() == row_order(columns, rows, side)


def plan_of(columns: int, rows: int) -> SlicePlan:
    cut = columns * rows > 1
    return SlicePlan(
        image_size=(1, 1),
        overview_size=(14, 14),
        grid=(columns, rows) if cut else None,
        slice_size=(14, 14) if cut else None,
        num_slices=columns * rows if cut else 0,
    )


@given(columns=st.integers(1, 7), rows=st.integers(1, 7), side=st.integers(1, 12))
def test_ids_follow_the_published_rule(columns: int, rows: int, side: int) -> None:
    plan, count = plan_of(columns, rows), side * side
    config = ImageConfig(layout="rows", image_token_id=IMAGE, comma_id=COMMA, newline_id=NEWLINE)
    maps = image_maps(config, plan, [(side, side)] * plan.num_views)
    ids = image_ids(plan, maps, config)
    assert len(ids) == num_image_positions(plan, count, "rows")
    assert ids.count(IMAGE) == plan.num_views * count
    assert len(ids) - ids.count(IMAGE) == num_schema_tokens(plan, "rows", count)
    if plan.grid is None:
        assert ids == [IMAGE] * count
        return
    assert len(ids) == rows * side * (columns * side + 1) + 1 + count
    for line in range(rows * side):
        start = line * (columns * side + 1)
        assert ids[start : start + columns * side + 1] == [IMAGE] * columns * side + [NEWLINE]
    # With one column already the first slice ends its row, so the divider is a newline too.
    assert ids[-count - 1] == (NEWLINE if columns == 1 else COMMA)


def test_published_lengths(golden: Path) -> None:
    file = golden / "uhd_v2/full_llama_old/cases.json"
    cases = json.loads(file.read_text())["cases"]
    slices = json.loads((golden / "uhd_v2/full_llama/cases.json").read_text())["cases"]
    assert [case["grid"] for case in cases] == [None, [2, 1], [1, 2], [2, 2]]
    for case, other in zip(cases, slices, strict=True):
        plan = plan_slices(*Image.open(golden / "uhd_v2" / case["image"]).size, max_slices=9)
        assert plan.grid == (tuple(case["grid"]) if case["grid"] else None)
        text = len(case["input_ids"]) - 1
        assert text + num_image_positions(plan, 144, "rows") == case["sequence_length"]
        assert text + num_image_positions(plan, 144) == other["sequence_length"]


def test_the_order_of_a_batch() -> None:
    shape = (2, 2)
    one, wide, tall = whole_map(shape), whole_map(shape, 2, 1), whole_map(shape, 1, 2)
    maps = torch.tensor([one, wide, one, one, tall, one])
    order = merge_views(torch.arange(32)[:, None], [shape] * 8, maps)[:, 0]
    assert sorted(order.tolist()) == list(range(32))
    assert order[:4].tolist() == [0, 1, 2, 3]
    assert order[4:12].tolist() == [4, 5, 8, 9, 6, 7, 10, 11]
    assert order[12:].tolist() == list(range(12, 32)), "one column reads as it stands"
    with pytest.raises(ValueError, match="mean 8 views, but view_grids has 7"):
        merge_views(torch.zeros(28, 1), [shape] * 7, maps)


# --- refusals -------------------------------------------------------------------------------------


def test_a_projector_without_square_maps_is_refused(processor: LlavaUHDProcessor) -> None:
    with pytest.raises(UserError, match="'rows' joins square token maps.* 20, 21 tokens"):
        LlavaUHDProcessor(processor.tokenizer, {"layout": "rows"}, {"type": "mlp2x_gelu"}, "v1")
    for counts in ([144, 143], [8], [0]):
        with pytest.raises(UserError, match="image.layout to 'slices'"):
            map_side(counts)
    with pytest.raises(UserError, match="image_config.layout must be slices"):
        LlavaUHDProcessor(processor.tokenizer, {"layout": "columns"}, {}, "v1")


def test_missing_maps_are_named(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text="<image>", images=[picture(96, 64)])
    maps = inputs.pop("token_maps")
    with pytest.raises(ValueError, match="needs token_maps"):
        model(**inputs)
    with pytest.raises(ValueError, match="needs token_maps"):
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(ValueError, match="mean 1 views"):
        model(**inputs, token_maps=maps[1:])


# --- processor, data ------------------------------------------------------------------------------


@settings(max_examples=40)
@given(size=st.tuples(st.integers(1, 150), st.integers(1, 150)))
def test_counts_equal_the_encoding_and_the_rows(size: tuple[int, int]) -> None:
    model, processor = tiny_parts(**ROWS)
    inputs = processor(text="<image>", images=[picture(*size)], add_special_tokens=False)
    ids = inputs["input_ids"][0]
    assert len(ids) == processor.num_image_tokens(*size)
    plan = processor.plan(*size)
    maps = [TokenMap(*row) for row in inputs["token_maps"].tolist()]
    assert [(each.columns, each.rows) for each in maps] == [
        *([plan.grid] if plan.grid else []),
        (1, 1),
    ]
    assert len(ids) == image_cost(model.config, plan).positions
    with torch.no_grad():
        tokens = model.get_image_features(
            inputs["pixel_values"], inputs["view_grids"], inputs["token_maps"]
        )
    assert len(tokens) == (ids == processor.image_token_id).sum()


def test_other_layouts_have_no_maps() -> None:
    _, slices = tiny_parts()
    assert "token_maps" not in slices(text="<image>", images=[picture(96, 64)])
    assert "token_maps" not in slices.model_input_names


def test_every_cut_keeps_whole_images(processor: LlavaUHDProcessor) -> None:
    turns = [Turn("human", "<image>\nOne? <image> two?"), Turn("gpt", "Yes.")]
    images = [picture(96, 64), picture(30, 90)]
    whole = processor.encode_conversation(turns, images)
    assert whole["token_maps"][:, :2].tolist() == [[3, 2], [1, 1], [1, 3], [1, 1]]
    longest = {}
    for length in range(1, len(whole["input_ids"]) + 1):
        cut = processor.encode_conversation(turns, images, max_length=length, overlong="drop")
        kept = 2 - cut["dropped_images"]
        assert len(cut["input_ids"]) <= length
        placeholders = int((cut["input_ids"] == processor.image_token_id).sum())
        assert placeholders == cut["num_visual_tokens"] == (0, 7 * 4, 7 * 4 + 4 * 4)[kept]
        assert len(cut.get("token_maps", ())) == 2 * kept
        longest[kept] = length
    assert list(longest) == [0, 1, 2]
    with pytest.raises(UserError, match="would lose 1 of 2 images"):
        processor.encode_conversation(turns, images, max_length=longest[1])


def sample(processor: LlavaUHDProcessor, question: str, *images: Any) -> dict[str, Any]:
    turns = [Turn("human", question), Turn("gpt", "A sign.")]
    return processor.encode_conversation(turns, images)


@pytest.fixture(scope="module")
def samples(processor: LlavaUHDProcessor) -> list[dict[str, Any]]:
    return [
        sample(processor, "<image>\nWhat is it?", picture(96, 64)),
        sample(processor, "Only text?"),
        sample(processor, "<image> or <image>?", picture(20, 20, 1), picture(64, 33, 2)),
    ]


@pytest.mark.parametrize("projector", [{}, HIWIN], ids=["resampler", "hiwin"])
def test_a_batch_equals_its_rows(projector: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    model, _ = tiny_parts(**ROWS, projector=projector)
    batch = Collator(0)(samples)
    assert batch["token_maps"][:, :2].tolist() == [[3, 2], *[[1, 1]] * 2, [2, 1], [1, 1]]
    with torch.no_grad():
        together = model(**batch, logits_to_keep=0).logits
        for row, one in enumerate(samples):
            alone = model(**Collator(0)([one]), logits_to_keep=0).logits[0]
            assert (together[row, : len(alone)] - alone).abs().max() <= 1e-4


def test_packed_samples_equal_padded_ones(samples: list[dict[str, Any]]) -> None:
    model, _ = tiny_parts(QWEN2, **ROWS)
    batch = Collator(0)(samples)
    batch.pop("labels")
    packed = {
        "input_ids": torch.cat([one["input_ids"] for one in samples])[None],
        "position_ids": torch.cat([torch.arange(len(one["input_ids"])) for one in samples])[None],
        **{key: batch[key] for key in ("pixel_values", "view_grids", "token_maps")},
    }
    with torch.no_grad():
        separate, one_row = model(**batch), model(**packed, use_cache=False)
    start = 0
    for row, one in enumerate(samples):
        length = len(one["input_ids"])
        found = one_row.logits[0, start : start + length]
        assert (found - separate.logits[row, :length]).abs().max() <= 1e-4
        start += length


# --- model ----------------------------------------------------------------------------------------


def test_the_model_writes_the_joined_map(parts: Parts) -> None:
    """Sequence order against the projector's own order, slice by slice."""
    model, processor = parts
    inputs = processor(text="<image>", images=[picture(96, 64)])
    with torch.no_grad():
        tokens = model.get_image_features(
            inputs["pixel_values"], inputs["view_grids"], inputs["token_maps"]
        )
        features = model.vision_tower(inputs["pixel_values"], inputs["view_grids"])
        own = model.projector(features, inputs["view_grids"], inputs["pixel_values"])
    maps = own.view(7, 2, 2, -1)
    joined = torch.cat([torch.cat(list(maps[row * 3 : row * 3 + 3]), 1) for row in range(2)])
    assert torch.equal(tokens, torch.cat([joined.flatten(0, 1), maps[6].flatten(0, 1)]))
    assert not torch.equal(tokens, own)


def test_the_layouts_are_different_sequences() -> None:
    answers = []
    for layout in ("slices", "rows"):
        model, processor = tiny_parts(image={"layout": layout})
        with torch.no_grad():
            inputs = processor(text="<image>\nWhat?", images=[picture(96, 64)])
            answers.append(model(**inputs).logits[0, -1])
    assert (answers[0] - answers[1]).abs().max() > 1e-3


@pytest.mark.parametrize("projector", [{}, HIWIN], ids=["resampler", "hiwin"])
def test_gradients_reach_every_parameter(
    projector: dict[str, Any], samples: list[dict[str, Any]]
) -> None:
    model, _ = tiny_parts(**ROWS, projector=projector)
    model.train()
    for batch in (samples, [samples[1]]):
        model.zero_grad(set_to_none=True)
        model(**Collator(0)(batch)).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_in_batches_and_beams(parts: Parts, beams: int) -> None:
    expected = one_by_one(parts, num_beams=beams)
    assert all_at_once(parts, num_beams=beams) == expected
    if beams == 1:
        assert expected == [
            by_hand(parts, text, images) for text, images in zip(TEXTS, IMAGES, strict=True)
        ]


def test_save_and_load(parts: Parts, tmp_path: Path) -> None:
    from llava_uhd.checkpoint.load import load_pretrained

    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = load_pretrained(tmp_path)
    assert other.image_config.layout == again.config.image.layout == "rows"
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 64)])
    found = other(text="<image>\nWhat?", images=[picture(96, 64)])
    assert all(torch.equal(inputs[key], found[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**found).logits)


def test_inspect_shows_the_rows() -> None:
    plan = plan_slices(672, 1008)
    assert token_layout(plan, [144] * 7, "rows") == [
        *["12 rows of [1: 12] [2: 12] \\n", "12 rows of [3: 12] [4: 12] \\n"],
        *["12 rows of [5: 12] [6: 12] \\n", ",", "[overview: 144]"],
    ]
