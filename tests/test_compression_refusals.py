"""What compression refuses from Python, in one line that names the field, and what it takes."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_tiny import LLAMA, picture, tiny_parts
from test_mixed_visuals import Parts

from llava_uhd.config.compression import parse_schedule
from llava_uhd.config.model import CompressionConfig
from llava_uhd.errors import UserError
from llava_uhd.train.compression import RunLength, check_length, spans

SOME = CompressionConfig("avgpool1d", 1, 4)
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return tiny_parts({**LLAMA, "num_hidden_layers": 3}, seed=5, image={"layout": "slices"})


@pytest.fixture(scope="module")
def inputs(parts: Parts) -> Any:
    return parts[1](text="<image>\na a a b a a c a b", images=[picture(96, 50)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 2.5}, "compression.stride must be a whole number, got 2.5: write for"),
        ({"stride": True}, "compression.stride must be a whole number, got True"),
        ({"layer": "16", "stride": 8}, "compression.layer must be a whole number, got '16'"),
        ({"method": None}, "compression.method must be a name, got None: write 'avgpool1d' or"),
        ({"schedule": 3}, 'compression.schedule must be a text such as "2/8 2/2 16/2 off", got 3'),
    ],
)
def test_values_of_another_kind(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        CompressionConfig(**values)


def test_numbers_of_other_libraries_are_numbers() -> None:
    config = CompressionConfig(layer=np.int64(2), stride=np.int32(8))  # type: ignore[arg-type]
    assert json.loads(json.dumps(dataclasses.asdict(config)))["stride"] == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "avgpool1d", "layer": 1}, "compression must be a CompressionConfig, got {'met"),
        (
            "1/4",
            "compression must be a CompressionConfig, got '1/4': write for example Compression",
        ),
        (CompressionConfig("averag", 1, 4), "compression.method: unknown compressor 'averag'"),
        (CompressionConfig("averag", 9, 1), "compression.method: unknown compressor 'averag'"),
        (CompressionConfig(schedule="heavy"), "compression.schedule 'heavy' belongs to a training"),
    ],
)
def test_arguments_of_a_pass(parts: Parts, inputs: Any, given: Any, message: str) -> None:
    """As an argument, in generation, and as the model's configuration."""
    model, _ = parts
    for call in (model, model.generate):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            call(**inputs, compression=given)
        assert "\n" not in str(caught.value)
    model.config.compression = given
    try:
        with pytest.raises(UserError, match=re.escape(message)):
            model(**inputs)
    finally:
        model.config.compression = CompressionConfig()


def test_fields_that_are_set_later(parts: Parts, inputs: Any) -> None:
    later = CompressionConfig("avgpool1d", 1, 4)
    later.stride = 2.5  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"compression\.stride must be a whole number, got 2\.5"):
        parts[0](**inputs, compression=later)


def test_runs_that_are_none(parts: Parts, inputs: Any) -> None:
    model, _ = parts
    embeds = model.embed(inputs["input_ids"], inputs["pixel_values"], inputs["view_grids"])
    runs = model.get_visual_runs(inputs["input_ids"], inputs["view_grids"])
    behind = runs.clone()
    behind[0, -1, 0] = embeds.shape[1] - 1
    twice = runs.clone()
    twice[0, 1, 0] -= 2
    for wrong, message in (
        (runs[0], r"visual_runs must be \(1, runs, 3\) for this batch, got \(7, 3\)"),
        (runs.repeat(2, 1, 1), r"must be \(1, runs, 3\) for this batch, got \(2, 7, 3\)"),
        (behind, r"in row 0 of \d+ tokens, which are not there or in another run"),
        (twice, r"in row 0 of \d+ tokens, which are not there or in another run"),
        (-runs, "which are not there or in another run"),
    ):
        with pytest.raises(ValueError, match=message):
            model(inputs_embeds=embeds, visual_runs=wrong, compression=SOME)
    # Rows with fewer runs are filled up with zeros, at the end.
    filled = torch.cat([runs, torch.zeros_like(runs[:, :2])], 1)
    found = [
        model(inputs_embeds=embeds, visual_runs=each, compression=SOME).logits
        for each in (runs, filled)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_speculation_is_greedy(
    parts: Parts, inputs: Any, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected candidates are taken out of layers of different lengths."""
    from transformers import DynamicCache

    model, _ = parts
    cut: list[int] = []
    original = DynamicCache.crop

    def crop(self: DynamicCache, count: int) -> None:
        cut.append(count)
        original(self, count)

    monkeypatch.setattr(DynamicCache, "crop", crop)
    for stride in (2, 4):
        options = {**GREEDY, "compression": CompressionConfig("avgpool1d", layer, stride)}
        plain = model.generate(**inputs, **options)
        looked = model.generate(
            **inputs, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1
        )
        assert torch.equal(plain, looked)
    assert min(cut) < 0, "some were rejected"


@pytest.mark.parametrize("method", ["avgpool1d", "avgpool2d", "random_drop", "fastv"])
@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_strides_longer_than_any_run(
    parts: Parts, inputs: Any, method: str, remainder: Any
) -> None:
    """One token of each view remains, or none."""
    model, _ = parts
    runs = model.get_visual_runs(inputs["input_ids"], inputs["view_grids"])
    huge = CompressionConfig(method, 1, 10**8, remainder)
    length = inputs["input_ids"].shape[1] - int(runs[..., 1].sum())
    length += runs.shape[1] if remainder == "keep" else 0
    assert model(**inputs, compression=huge).logits.shape[1] == length
    options = {**GREEDY, "max_new_tokens": 4, "compression": huge}
    cached, plain = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("layer", [3, 4, 100])
def test_layers_behind_the_last_change_nothing(parts: Parts, inputs: Any, layer: int) -> None:
    model, _ = parts
    with torch.no_grad():
        found = model(**inputs, compression=CompressionConfig("avgpool1d", layer, 4)).logits
        assert torch.equal(found, model(**inputs).logits)


def test_several_answers_to_a_prompt(parts: Parts) -> None:
    """Sampled ones, and beams: as many rows as asked for, runs and images repeated with them."""
    model, processor = parts
    texts = ["How many?", "<image>\nWhat?", "<image> or <image>?"]
    images = [[], [picture(96, 50)], [picture(20, 30, 1), picture(64, 32, 2)]]
    inputs = processor(text=texts, images=images)
    options: dict[str, Any] = {"compression": SOME, "max_new_tokens": 4, "num_return_sequences": 2}
    assert len(model.generate(**inputs, **options, do_sample=True)) == 6
    beams = model.generate(**inputs, **options, num_beams=3)
    best = model.generate(**inputs, **{**options, "num_return_sequences": 1}, num_beams=3)
    assert torch.equal(beams[::2], best)


def test_a_run_may_end_together_with_its_counts() -> None:
    """Six micro-batches: three of the first stage, three of the second; a seventh has none."""
    config = CompressionConfig(schedule="1/8@2 1/4@5")
    check_length(config, RunLength(6, 6, 1))
    check_length(config, RunLength(3, 6, 2))
    parts_of = spans(parse_schedule("1/8@2 1/4@5"), RunLength(6, 6, 1))
    assert [(span.first, span.stop) for span in parts_of] == [(0, 3), (3, 6)]
    with pytest.raises(UserError, match="no stage after micro-batch 6, but the run has 7"):
        check_length(config, RunLength(7, 7, 1))
