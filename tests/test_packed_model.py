"""Packed rows through the model: losses, gradients and logits of every sample as in other batches.

The tower works on the views of a batch side by side in any case; here the language model does too.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fixtures_flash import PLAIN_FLASH
from fixtures_tiny import LLAMA, picture, tiny_parts
from test_mixed_visuals import MODELS, PROMPTS, Parts, film
from torch import nn

from llava_uhd.config.model import CompressionConfig
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import BrokenSample
from llava_uhd.language.by_sample import BY_SAMPLE
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.text.templates import Turn
from llava_uhd.train.counting import facts_of

BOUND = 1e-5
KINDS: dict[str, dict[str, Any]] = {
    **{name: MODELS[name] for name in ("llava_1_5", "onevision", "uhd")},
    "uhd_v2": {"text": LLAMA, "projector": {"type": "hiwin", "scales": [1, 4], "num_heads": 4}},
}
COMPRESSIONS = {
    "whole": None,
    "input": CompressionConfig("avgpool1d", -1, 3),
    "layer_1": CompressionConfig("avgpool1d", 1, 4, "drop"),
}
Samples = list[dict[str, Any]]


@functools.cache
def build(kind: str) -> Parts:
    options = {key: dict(value) for key, value in KINDS[kind].items()}
    model, processor = tiny_parts(seed=5, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):  # of the upsampler: differs in each pass
            module.p = 0.0
    if kind == "uhd_v2":
        # Weights that large leave little of float32 in the gradients behind the upsampler.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and not name.startswith("language_model."):
                    parameter.mul_(0.5)
    return model.train(), processor


@functools.cache
def samples_of(kind: str) -> Samples:
    """No, one and two images, videos, both; two rounds in one of them."""
    _, processor = build(kind)
    answers = [[Turn("gpt", f"A red sign, {number}.")] for number in range(len(PROMPTS))]
    answers[1] += [Turn("human", "And then?"), Turn("gpt", "Nothing else.")]
    return [
        processor.encode_conversation([Turn("human", text), *rest], images, videos)
        for (text, images, videos), rest in zip(PROMPTS, answers, strict=True)
    ]


def only(batch: dict[str, torch.Tensor], sample: int) -> dict[str, torch.Tensor]:
    """The batch with the labels of one sample left."""
    if "attention_mask" in batch:
        mine = torch.arange(len(batch["labels"]))[:, None] == sample
    else:
        mine = (batch["position_ids"] == 0).cumsum(1) == sample + 1
    return {**batch, "labels": batch["labels"].masked_fill(~mine, IGNORE_INDEX)}


def learn(
    model: LlavaUHDForConditionalGeneration, batch: dict[str, torch.Tensor], **options: Any
) -> tuple[float, torch.Tensor]:
    """Loss, and the gradients of all parameters as one vector."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1, **options).loss
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return float(loss.detach()), torch.cat([each.flatten() for each in gradients])


def assert_like(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=BOUND)
    difference = (found[1] - expected[1]).norm()
    assert float(difference) <= BOUND * float(expected[1].norm())


BACKENDS = [
    (kind, backend)
    for kind in KINDS
    for backend in ("sdpa", "eager", BY_SAMPLE, PLAIN_FLASH)
    if backend != PLAIN_FLASH or kind == "uhd"
]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
def test_each_sample_learns_alike_packed_padded_and_alone(
    kind: str, compression: str, backend: str
) -> None:
    model, _ = build(kind)
    model.get_decoder().config._attn_implementation = backend
    samples, options = samples_of(kind), {"compression": COMPRESSIONS[compression]}
    packed, padded = Collator(0, packed=True)(samples), Collator(0)(samples)
    for number, sample in enumerate(samples):
        mine = learn(model, only(packed, number), **options)
        assert_like(mine, learn(model, Collator(0)([sample]), **options))
        assert_like(mine, learn(model, only(padded, number), **options))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_batch_learns_alike(kind: str) -> None:
    model, _ = build(kind)
    model.get_decoder().config._attn_implementation = "sdpa"
    samples = samples_of(kind)
    packed, padded = Collator(0, packed=True)(samples), Collator(0)(samples)
    assert int((packed["labels"] != IGNORE_INDEX).sum()) == int(
        (padded["labels"] != IGNORE_INDEX).sum()
    )
    assert_like(learn(model, packed), learn(model, padded))
    row = Collator(0, packed=True)(samples[1:2])
    assert_like(learn(model, row), learn(model, Collator(0)(samples[1:2])))
    # Two passes, with the number of learned tokens of both: as the trainer accumulates them.
    halves = [Collator(0, packed=True)(part) for part in (samples[:2], samples[2:])]
    parts = [learn(model, half) for half in halves]
    total = (parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    assert_like(total, learn(model, packed))


def logits_of(kind: str, samples: Samples, compression: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a packed row, and the number of the sample that each position belongs to."""
    model, _ = build(kind)
    batch = Collator(0, packed=True)(samples)
    with torch.no_grad():
        output = model(**batch, compression=COMPRESSIONS[compression], logits_to_keep=0)
    return output.logits[0], (batch["position_ids"] == 0).cumsum(1)[0] - 1


@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
def test_a_sample_never_sees_another(kind: str, backend: str) -> None:
    """Another sample's text and pixels change; to the last bit nothing changes here."""
    model, _ = build(kind)
    model.get_decoder().config._attn_implementation = backend
    samples = samples_of(kind)
    before, owner = logits_of(kind, samples, "whole")
    for changed in range(len(samples)):
        sample = dict(samples[changed])
        ids = sample["input_ids"].clone()
        ids[:3] += 5
        sample["input_ids"] = ids
        if "pixel_values" in sample:
            sample["pixel_values"] = sample["pixel_values"].flip(0) * 0.5
        after, _ = logits_of(kind, [*samples[:changed], sample, *samples[changed + 1 :]], "whole")
        others = owner != changed
        assert torch.equal(before[others], after[others])
        assert float((before[~others] - after[~others]).abs().max()) > 1e-3


@pytest.mark.parametrize("compression", ["input", "layer_1"])
def test_under_compression_the_loss_of_a_sample_never_sees_another(compression: str) -> None:
    """The order of the samples changes, and with it everything that stands before each of them."""
    model, _ = build("uhd")
    model.get_decoder().config._attn_implementation = "sdpa"
    samples, options = samples_of("uhd"), {"compression": COMPRESSIONS[compression]}
    forwards, backwards = (
        Collator(0, packed=True)(order) for order in (samples, list(reversed(samples)))
    )
    for number in range(len(samples)):
        mirrored = only(backwards, len(samples) - 1 - number)
        assert_like(
            learn(model, mirrored, **options), learn(model, only(forwards, number), **options)
        )


def test_the_row_tells_where_samples_begin() -> None:
    samples = samples_of("onevision")
    broken = BrokenSample("x", "y")
    batch = Collator(7, packed=True)([[samples[0], broken, samples[3]], [samples[1]]])
    kept = [samples[index] for index in (0, 3, 1)]
    lengths = [len(each["input_ids"]) for each in kept]
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert batch["position_ids"][0].tolist() == [n for length in lengths for n in range(length)]
    assert torch.equal(batch["input_ids"][0], torch.cat([each["input_ids"] for each in kept]))
    for key in ("pixel_values", "view_grids", "token_maps"):
        assert torch.equal(batch[key], torch.cat([each[key] for each in kept if key in each]))
    padded = Collator(7)(kept)
    config = build("onevision")[0].config
    for each in (batch, padded):
        assert facts_of(each, config).lengths == tuple(lengths)
    learned = [labels[labels != IGNORE_INDEX] for labels in (batch["labels"], padded["labels"])]
    assert torch.equal(*learned)


def test_first_tokens_are_never_learned() -> None:
    sample = {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([4, 5])}
    batch = Collator(0, packed=True)([sample, sample])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 5, IGNORE_INDEX, 5]]


@pytest.mark.parametrize("row", [[], [[]], [[BrokenSample("x", "y")] * 2]])
def test_an_empty_row_teaches_nothing(row: list[Any]) -> None:
    """Every device takes part in the step, with zero gradients."""
    model, _ = build("uhd")
    batch = Collator(0, packed=True)(row)
    assert facts_of(batch, model.config).lengths == (2,)
    assert (batch["labels"] == IGNORE_INDEX).all()
    loss, gradients = learn(model, batch)
    assert loss == 0.0 and not gradients.any()


def test_views_of_one_shape_come_from_several_samples() -> None:
    """The same picture in two samples, and a film between them."""
    model, processor = build("uhd")
    image = picture(96, 50)
    turns = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A sign.")]
    shown = [Turn("human", "<video>\nWhat is it?"), Turn("gpt", "A sign.")]
    first = processor.encode_conversation(turns, [image])
    clip = processor.encode_conversation(shown, [], [film(2, 3)])
    batch = Collator(0, packed=True)([first, clip, first])
    one, _, other = (learn(model, only(batch, number)) for number in range(3))
    assert_like(one, other)
