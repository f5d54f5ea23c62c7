"""Scores of "fastv" in layers with a sliding window, and half precision of every compressor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, picture, tiny_parts
from test_mixed_visuals import IMAGES, MODELS, TEXTS, Parts

from llava_uhd.config.model import CompressionConfig
from llava_uhd.data.collator import Collator
from llava_uhd.language.compressed import attention_of
from llava_uhd.language.compressors import COMPRESSORS
from llava_uhd.language.layers import window_of
from llava_uhd.language.runs import Run
from llava_uhd.text.templates import Turn

WINDOW = 9
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {
        "model_type": "qwen2",
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 16,
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def windowed(kind: str) -> Parts:
    text = {**LLAMA, **KINDS[kind], "num_hidden_layers": 3}
    image = {"strategy": "pad", "layout": "flat"}
    return tiny_parts(text, seed=2, projector={"type": "mlp2x_gelu"}, image=image)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_attention_of_the_library(kind: str) -> None:
    """Of every layer, windowed or not, in rows padded at the left."""
    model, _ = windowed(kind)
    decoder = model.get_decoder()
    decoder.set_attn_implementation("eager")
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 24, 64), torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, given: states.append(given[0]))
        for layer in decoder.layers
    ]
    with torch.no_grad():
        found = decoder(
            inputs_embeds=hidden,
            attention_mask=mask,
            position_ids=positions,
            output_attentions=True,
        ).attentions
    for hook in hooks:
        hook.remove()
    rows = torch.arange(2)
    for index, layer in enumerate(decoder.layers):
        for at in (23, 20):
            places = torch.full((2,), at)
            scores = attention_of(
                decoder, layer, states[index], positions, mask.bool(), rows, places
            )
            wanted = found[index].mean(1)[:, at]
            torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=1e-5)
            windowed_layer = window_of(decoder, layer) == WINDOW
            assert bool((scores[:, 5 : at - WINDOW + 1] == 0).all()) == windowed_layer
    assert any(window_of(decoder, layer) == WINDOW for layer in decoder.layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, 2])
def test_generation_behind_windows(kind: str, layer: int) -> None:
    """Cached, uncached, batched and alone choose the same tokens."""
    model, processor = windowed(kind)
    chosen = CompressionConfig("fastv", layer, 3)
    options: dict[str, Any] = {"compression": chosen, "max_new_tokens": 6, "do_sample": False}
    inputs = processor(text=TEXTS[:3], images=IMAGES[:3])
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row in range(3):
        inputs = processor(text=TEXTS[row], images=IMAGES[row])
        start = inputs["input_ids"].shape[1]
        cached, plain = (
            model.generate(**inputs, **options, use_cache=use)[:, start:] for use in (True, False)
        )
        assert cached.tolist() == plain.tolist() == together[row : row + 1].tolist()


@pytest.mark.parametrize("length", [5, 200])
def test_of_equal_scores_the_first_stay(length: int) -> None:
    """Tokens before a window all have the score 0."""
    rule = COMPRESSORS.get("fastv").groups
    scores = torch.zeros(length)
    scores[-1] = 0.5
    kept = (rule(Run(length), 2, True, scores) >= 0).nonzero()[:, 0].tolist()
    assert kept == [*range((length + 1) // 2 - 1), length - 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", sorted(COMPRESSORS))
def test_half_precision(method: str, attention: str) -> None:
    """A step and an answer in bfloat16, from every place; near to those in float32."""
    options = {key: dict(value) for key, value in MODELS["uhd"].items()}
    options["text"] |= {"num_hidden_layers": 3}
    model, processor = tiny_parts(seed=5, **options)
    model.set_attn_implementation(attention)
    turns = [[Turn("human", text), Turn("gpt", "A red sign.")] for text in TEXTS[:3]]
    pairs = zip(turns, IMAGES[:3], strict=True)
    batch = Collator(0)([processor.encode_conversation(turn, shown) for turn, shown in pairs])
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    places = [
        layer for layer in (-1, 0, 2) if layer > 0 or not COMPRESSORS.get(method).needs_scores
    ]
    forms = (("keep", "integer"), ("drop", "half"))
    chosen = [CompressionConfig(method, layer, 4, *form) for layer in places for form in forms]
    with torch.no_grad():
        exact = [model(**batch, compression=each).loss for each in chosen]
    model.to(torch.bfloat16)
    for each, wanted in zip(chosen, exact, strict=True):
        model.zero_grad()
        loss = model(**batch, compression=each).loss
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=0.05)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) > 20 and all(bool(g.isfinite().all()) for g in gradients)
        answer = model.generate(**inputs, compression=each, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
