"""Attention sample by sample against the library's own, on whatever a decoder is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, QWEN2
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llava_uhd.language import by_sample
from llava_uhd.language.by_sample import BY_SAMPLE, attend_by_sample, prefer_by_sample

WINDOW = 5
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": WINDOW},
}


def build(kind: str) -> Any:
    values = {**SHAPES[kind], "vocab_size": 50}
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def logits(model: Any, backend: str, **inputs: Any) -> torch.Tensor:
    model.get_decoder().config._attn_implementation = backend
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("lengths", [[9], [1, 2, 11, 3], [4, 4, 4]])
def test_packed_rows(kind: str, lengths: list[int]) -> None:
    model, tokens = build(kind), ids(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"input_ids": tokens, "position_ids": positions}
    found = logits(model, BY_SAMPLE, **packed)
    torch.testing.assert_close(found, logits(model, "eager", **packed), atol=2e-4, rtol=1e-4)
    start = 0
    for length in lengths:
        alone = logits(model, "sdpa", input_ids=tokens[:, start : start + length])
        torch.testing.assert_close(found[:, start : start + length], alone, atol=2e-4, rtol=1e-4)
        start += length


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_of_their_own_and_padding(kind: str) -> None:
    model, tokens = build(kind), ids(3, 12)
    expected = logits(model, "eager", input_ids=tokens)
    torch.testing.assert_close(
        logits(model, BY_SAMPLE, input_ids=tokens), expected, atol=2e-4, rtol=1e-4
    )
    for left in (False, True):
        mask = torch.ones_like(tokens)
        mask[1, slice(0, 5) if left else slice(7, None)] = 0
        padded = {"input_ids": tokens, "attention_mask": mask}
        real = mask.bool()
        torch.testing.assert_close(
            logits(model, BY_SAMPLE, **padded)[real],
            logits(model, "eager", **padded)[real],
            atol=2e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("kind", SHAPES)
def test_generation_with_a_cache(kind: str) -> None:
    model, tokens = build(kind), ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    found = []
    for backend in ("eager", BY_SAMPLE):
        model.get_decoder().config._attn_implementation = backend
        found.append(
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        )
    assert torch.equal(*found)


def test_cumulative_lengths_count_more_than_positions() -> None:
    """Compressed rows have gaps in their positions."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 2, 7, 8, generator=generator) for _ in range(3))
    positions = torch.tensor([[0, 1, 5, 0, 2, 3, 9]])
    borders = torch.tensor([0, 3, 7], dtype=torch.int32)
    given = attend_by_sample(
        nn.Module(), query, key, value, None, scaling=0.3, cu_seq_lens_q=borders
    )[0]
    read = attend_by_sample(
        nn.Module(), query, key, value, None, scaling=0.3, position_ids=positions
    )[0]
    assert given.shape == (1, 7, 2, 8) and torch.equal(given, read)
    second = attend_by_sample(
        nn.Module(), *(each[:, :, 3:] for each in (query, key, value)), None, scaling=0.3
    )[0]
    assert torch.equal(given[:, 3:], second)


def test_nothing_is_computed_between_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    original = by_sample.F.scaled_dot_product_attention

    def counted(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append((query.shape[2], options["attn_mask"] is None))
        return original(query, *rest, **options)

    monkeypatch.setattr(by_sample.F, "scaled_dot_product_attention", counted)
    positions = torch.cat([torch.arange(length) for length in (3, 8, 2)])[None]
    logits(build("llama"), BY_SAMPLE, input_ids=ids(1, 13), position_ids=positions)
    assert calls == [(3, True), (8, True), (2, True)] * LLAMA["num_hidden_layers"]


def test_only_the_default_backend_is_replaced() -> None:
    model = build("llama")
    for before, after in (("sdpa", BY_SAMPLE), ("eager", "eager"), (BY_SAMPLE, BY_SAMPLE)):
        model.get_decoder().config._attn_implementation = before
        prefer_by_sample(model)
        assert model.get_decoder().config._attn_implementation == after
    assert BY_SAMPLE not in str(model.config.to_dict())
