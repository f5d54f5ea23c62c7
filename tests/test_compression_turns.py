"""Chats that go on from the cache of an earlier turn, compressed or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, picture, tiny_parts
from test_mixed_visuals import MODELS, Parts

from llava_uhd.config.model import CompressionConfig

OFF = CompressionConfig()
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
MORE = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module", params=["uhd", "onevision"])
def parts(request: pytest.FixtureRequest) -> Parts:
    options = {key: dict(value) for key, value in MODELS[request.param].items()}
    options["text"] |= {"num_hidden_layers": 3}
    return tiny_parts(seed=5, **options)


def options_of(layer: int | None) -> dict[str, Any]:
    chosen = OFF if layer is None else CompressionConfig("avgpool1d", layer, 4)
    return {**GREEDY, "compression": chosen}


@pytest.mark.parametrize("layer", [None, -1, 0, 1, 2])
def test_three_turns(parts: Parts, layer: int | None) -> None:
    """With the images passed again, and with their runs alone: each as without a cache."""
    model, processor = parts
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    ids, options = inputs["input_ids"], options_of(layer)
    maps = inputs.get("token_maps")
    cache = None
    for turn in range(3):
        asked = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = model.generate(**asked, **options)
        if turn:
            runs = model.get_visual_runs(ids, inputs["view_grids"], maps)
            kept = copy.deepcopy(cache)
            by_runs = model.generate(ids, past_key_values=kept, visual_runs=runs, **options)
            assert torch.equal(by_runs, whole)
        given = {} if cache is None else {"past_key_values": cache}
        output = model.generate(**asked, **given, **options, return_dict_in_generate=True)
        assert torch.equal(output.sequences, whole), turn
        cache = output.past_key_values
        ids = torch.cat([whole, MORE], 1)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_padded_rows_go_on(parts: Parts, layer: int) -> None:
    model, processor = parts
    images = [[picture(96, 50)], [picture(20, 30, 1), picture(64, 32, 2)]]
    inputs = processor(text=["<image>\nWhat?", "<image> or <image>?"], images=images)
    options = options_of(layer)
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, MORE.expand(2, -1)], 1)
    longer = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], longer], 1)
    asked = {**inputs, "input_ids": ids, "attention_mask": mask}
    second = model.generate(**asked, past_key_values=first.past_key_values, **options)
    assert torch.equal(second, model.generate(**asked, **options))


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_a_turn_that_does_not_name_its_images_is_refused(parts: Parts, layer: int) -> None:
    model, processor = parts
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    options = options_of(layer)
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, MORE], 1)
    with pytest.raises(ValueError, match="pass the compression and the visual_runs of the whole"):
        model.generate(ids, past_key_values=first.past_key_values, **options)


@pytest.mark.parametrize("layer", [None, -1, 0, 1])
def test_a_new_image_in_the_second_turn(layer: int | None) -> None:
    """Uncompressed it is right; compressed it is refused, as documented."""
    model, processor = tiny_parts({**LLAMA, "num_hidden_layers": 3}, seed=5)
    pictures, options = [picture(96, 50), picture(40, 80, 3)], options_of(layer)
    inputs = processor(text="<image>\nWhat?", images=pictures[:1])
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    new = processor(text="<image>\nAnd this?", images=pictures[1:])
    both = {
        "input_ids": torch.cat([first.sequences, new["input_ids"]], 1),
        "pixel_values": torch.cat([inputs["pixel_values"], new["pixel_values"]]),
        "view_grids": torch.cat([inputs["view_grids"], new["view_grids"]]),
    }
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    if layer is None:
        second = model.generate(**both, past_key_values=first.past_key_values, **options)
        assert torch.equal(second, model.generate(**both, **options))
        return
    with pytest.raises(ValueError, match="behind a cache cannot be shortened"):
        model.generate(**both, past_key_values=first.past_key_values, **options)
