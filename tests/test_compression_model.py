"""The whole model under compression: losses, gradients, packing, attention backends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fixtures_flash import PLAIN_FLASH
from fixtures_tiny import LLAMA, QWEN2, picture, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixed_visuals import MODELS, PROMPTS, Parts
from torch import nn

from llava_uhd.config.model import CompressionConfig
from llava_uhd.data.collator import Collator
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.templates import Turn

LAYERS = 3
OPTIONS = {
    "input": CompressionConfig("avgpool1d", -1, 3),
    "layer_0": CompressionConfig("avgpool1d", 0, 4),
    "layer_2": CompressionConfig("avgpool1d", 2, 8, "drop", "half"),
    "squares": CompressionConfig("avgpool2d", 1, 4),
    "fastv": CompressionConfig("fastv", 1, 2),
}
# Every kind of model, LLaVA-UHD v2 as well.
KINDS: dict[str, dict[str, Any]] = {
    **MODELS,
    "uhd_v2": {"text": LLAMA, "projector": {"type": "hiwin", "scales": [1, 4], "num_heads": 4}},
}


def build(kind: str) -> Parts:
    options = {key: dict(value) for key, value in KINDS[kind].items()}
    options["text"] |= {"num_hidden_layers": LAYERS}
    return tiny_parts(seed=5, **options)


@pytest.fixture(scope="module", params=KINDS)
def parts(request: pytest.FixtureRequest) -> Parts:
    return build(request.param)


def batches_of(parts: Parts) -> list[Any]:
    """A batch of all prompts with answers, and each of them alone."""
    _, processor = parts
    samples = [
        processor.encode_conversation(
            [Turn("human", text), Turn("gpt", "A red sign.")], images, videos
        )
        for text, images, videos in PROMPTS
    ]
    return [Collator(0)(samples), *(Collator(0)([sample]) for sample in samples)]


def learn(
    model: LlavaUHDForConditionalGeneration, batch: Any, **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of the losses, and gradients."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):  # of the upsampler: differs in each pass
            module.eval()
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1, **options).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_training_batch_equals_its_samples(parts: Parts, option: str) -> None:
    """Rows of no, one and two images and videos: the loss and every gradient."""
    model, _ = parts
    batches = batches_of(parts)
    upsamples = hasattr(model.projector, "upsampler")
    if upsamples:  # small gradients of large terms: float32 is too coarse to compare them
        model.double()
        for batch in batches:
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].double()
    model.train()
    (loss, gradients), *alone = [
        learn(model, batch, compression=OPTIONS[option]) for batch in batches
    ]
    model.eval().float()
    assert loss == pytest.approx(sum(each for each, _ in alone), rel=1e-5)
    for name, gradient in gradients.items():
        total = sum(each[name] for _, each in alone)
        bound = 1e-4 * float(gradient.abs().max()) + 1e-5
        assert float((gradient - total).abs().max()) <= bound, name


def test_gradient_checkpointing_changes_nothing(parts: Parts) -> None:
    model, _ = parts
    batch, options = batches_of(parts)[0], {"compression": OPTIONS["layer_2"]}
    model.train()
    loss, gradients = learn(model, batch, **options)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, others = learn(model, batch, **options)
    model.gradient_checkpointing_disable()
    model.eval()
    assert loss == again
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


# --- attention backends ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", PLAIN_FLASH])
@pytest.mark.parametrize("option", ["input", "layer_0", "layer_2", "squares"])
def test_attention_backends_agree(option: str, backend: str) -> None:
    """Padded at the right in training, at the left in generation, and without padding."""
    model, processor = parts = build("llava_1_5")
    model.config.compression = OPTIONS[option]
    other = copy.deepcopy(model)
    other.get_decoder().config._attn_implementation = backend
    for batch in batches_of(parts)[:3]:
        losses = [each(**batch).loss for each in (model, other)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    texts, images = [text for text, _, _ in PROMPTS[:3]], [images for _, images, _ in PROMPTS[:3]]
    inputs = processor(text=texts, images=images)
    with torch.no_grad():
        states = [each(**inputs).logits for each in (model, other)]
    torch.testing.assert_close(states[0][:, -1], states[1][:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "eager", PLAIN_FLASH])
@pytest.mark.parametrize("option", ["input", "layer_0", "layer_2", "squares"])
def test_packed_samples_equal_single_ones(option: str, backend: str) -> None:
    """Several samples in one row: the loss and the gradients of the language model."""
    model, _ = parts = build("llava_1_5")
    model.train()
    model.get_decoder().config._attn_implementation = backend
    singles = batches_of(parts)[1:]
    packed = {
        "input_ids": torch.cat([each["input_ids"] for each in singles], 1),
        "labels": torch.cat([each["labels"] for each in singles], 1),
        "position_ids": torch.cat(
            [torch.arange(each["input_ids"].shape[1])[None] for each in singles], 1
        ),
    }
    for name in ("pixel_values", "view_grids", "token_maps"):
        found = [each[name] for each in singles if name in each]
        if found:
            packed[name] = torch.cat(found)
    # The first token of a sample is never predicted from the sample before.
    starts = torch.tensor([each["input_ids"].shape[1] for each in singles[:-1]]).cumsum(0)
    packed["labels"][0, starts] = -100
    loss, gradients = learn(model, packed, compression=OPTIONS[option])
    alone = [learn(model, each, compression=OPTIONS[option]) for each in singles]
    assert loss == pytest.approx(sum(each for each, _ in alone), rel=1e-5)
    for name, gradient in gradients.items():
        if name.startswith("language_model."):
            total = sum(each[name] for _, each in alone)
            bound = 1e-4 * float(gradient.abs().max()) + 1e-5
            assert float((gradient - total).abs().max()) <= bound, name


# --- any batch ------------------------------------------------------------------------------------

SIDES = st.tuples(st.integers(8, 90), st.integers(8, 90))
ROWS = st.lists(st.lists(SIDES, max_size=3), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def slicing() -> Parts:
    """Slices of any shape, and squares of them joined: runs of odd lengths."""
    return tiny_parts(
        {**QWEN2, "num_hidden_layers": LAYERS}, seed=5, projector={"type": "mlp2x_gelu"}
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    layer=st.integers(-1, LAYERS - 1),
    stride=st.integers(2, 9),
    remainder=st.sampled_from(["keep", "drop"]),
    left=st.booleans(),
)
@torch.no_grad()
def test_any_batch_equals_its_rows(
    slicing: Parts, rows: Any, layer: int, stride: int, remainder: str, left: bool
) -> None:
    """0 to 3 images of any shape in a row, padding at either side."""
    model, processor = slicing
    options = CompressionConfig("avgpool1d", layer, stride, remainder)
    texts = ["<image> and " * len(row) + "what is it?" for row in rows]
    images = [[picture(*size, seed) for seed, size in enumerate(row)] for row in rows]
    inputs = processor(text=texts, images=images, padding_side="left" if left else "right")
    together = model(**inputs, compression=options).logits
    for row, (text, shown) in enumerate(zip(texts, images, strict=True)):
        alone = model(**processor(text=text, images=shown), compression=options).logits[0]
        start = together.shape[1] - len(alone) if left else 0
        mine = together[row, start : start + len(alone)]
        torch.testing.assert_close(mine, alone, atol=2e-4, rtol=1e-4)
