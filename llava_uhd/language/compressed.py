"""Running a decoder whose visual tokens become fewer at one of its layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from llava_uhd.config.model import CompressionConfig
from llava_uhd.errors import UserError
from llava_uhd.language.compression import IndexMap, build_map
from llava_uhd.language.compressors import COMPRESSORS
from llava_uhd.language.layers import (
    Shortened,
    cache_name,
    check_decoder,
    library_masks,
    run_layers,
)


class Compressed(NamedTuple):
    """What `decode_compressed` gives.

    Attributes:
        hidden: (B, T', D) behind the last norm.
        cache: of the keys and values, or None.
        index_map: of the whole sequence, or None while single new tokens are decoded.
    """

    hidden: torch.Tensor
    cache: Any
    index_map: IndexMap | None


def is_active(config: CompressionConfig, num_layers: int) -> bool:
    """Whether a configuration changes anything in a decoder of so many layers."""
    return config.method != "none" and config.stride > 1 and config.layer < num_layers


def decode_compressed(
    decoder: Any,
    config: CompressionConfig,
    runs: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Any = None,
    use_cache: bool | None = None,
    scored_at: int | None = None,
    **kwargs: Any,
) -> Compressed:
    """Runs all layers and the last norm; nothing is remembered but the cache.

    Args:
        decoder: of a language model, without its head.
        config: method, layer, stride, ...
        runs: of the whole sequence, from `place_runs`.
        inputs_embeds: (B, Q, D): the whole sequence, or new tokens behind a cache.
        attention_mask: (B, T) of the whole sequence, cached tokens included.
        position_ids: (B, Q) or (1, Q); restarting ones pack several samples in a row.
        cache: of earlier tokens; the layers from ``config.layer`` on hold fewer.
        use_cache: keep one.
        scored_at: position of the tokens whose attention "fastv" follows; None: the last of each
            row. Generation without a cache names the end of the prompt.
        **kwargs: of the layers.

    Raises:
        UserError: a decoder of another build, or a method that needs an earlier layer.
    """
    batch, queries = inputs_embeds.shape[:2]
    if use_cache and cache is None:
        cache = DynamicCache(config=decoder.config)
    whole = cache is None or cache.get_seq_length() == 0
    valid = _valid(inputs_embeds, attention_mask, None if whole else position_ids)
    if position_ids is None:
        position_ids = _counted(valid, queries)
    position_ids = position_ids.expand(batch, -1)
    samples = _packed_samples(position_ids) if attention_mask is None and whole else None
    kwargs.pop("return_dict", None)
    options = {"use_cache": use_cache, **kwargs}
    training, layer = bool(decoder.training), max(config.layer, 0)
    if config.layer < 0:
        table = build_map(config, runs, valid, training=training)
        hidden = _before(decoder, inputs_embeds, table, samples, whole, cache, options)
        return Compressed(hidden, cache if use_cache else None, table if whole else None)
    check_decoder(decoder)
    lower, upper = decoder.layers[:layer], decoder.layers[layer:]
    masks = library_masks(decoder, inputs_embeds, attention_mask, position_ids, cache)
    # Of a step behind the cache only the numbers of kept tokens matter, not which ones.
    scores = torch.zeros(valid.shape) if COMPRESSORS.get(config.method).needs_scores else None
    if whole and scores is not None:
        at = _ends(valid) if scored_at is None else torch.full_like(valid[:, 0], scored_at).long()
        hidden, scores = _with_scores(
            decoder, lower, inputs_embeds, masks, position_ids, valid, at, cache, options
        )
    else:
        hidden = run_layers(decoder, lower, inputs_embeds, masks, position_ids, cache, **options)
    table = build_map(config, runs, valid, scores, training)
    if whole:
        hidden = table.states(hidden)
        samples = None if samples is None else table.carry(samples, -1)
        position_ids = table.positions(position_ids, config.positions == "half")
    shortened = Shortened(table.mask, hidden.shape[1], samples)
    masks = shortened.masks(decoder, hidden)
    options |= {"shown_positions": False, **shortened.flash_arguments(decoder)}
    hidden = run_layers(decoder, upper, hidden, masks, position_ids, cache, **options)
    return Compressed(decoder.norm(hidden), cache if use_cache else None, table if whole else None)


def _before(
    decoder: Any,
    hidden: torch.Tensor,
    table: IndexMap,
    samples: torch.Tensor | None,
    whole: bool,
    cache: Any,
    options: dict[str, Any],
) -> torch.Tensor:
    """Shortens the embeddings, then any decoder runs as if the text had been shorter."""
    if whole:
        hidden = table.states(hidden)
    position_ids = _counted(table.mask, hidden.shape[1])
    if samples is not None:
        position_ids = position_ids - _counted_before(table.carry(samples, -1))
    names = {cache_name(decoder.forward): cache}
    mask = None if bool(table.mask.all()) else table.mask.long()
    output = decoder(
        inputs_embeds=hidden, attention_mask=mask, position_ids=position_ids, **names, **options
    )
    return output.last_hidden_state


def _counted_before(samples: torch.Tensor) -> torch.Tensor:
    """int64 (B, T): where the packed sample of each position starts in its row."""
    places = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
    begins = torch.ones_like(samples, dtype=torch.bool)
    begins[:, 1:] = samples[:, 1:] != samples[:, :-1]
    return (places * begins).cummax(1).values


def _ends(valid: torch.Tensor) -> torch.Tensor:
    """int64 (B,): the last position of each row that holds a token."""
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).argmax(1)


def _counted(valid: torch.Tensor, last: int) -> torch.Tensor:
    """int64 (B, last): positions of the last tokens, counted without padding."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)[:, -last:]


def _valid(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Bool (B, T): positions of the whole sequence that hold a token.

    Generation leaves a mask of ones out; then the positions of new tokens (None: there is no cache
    before them) tell how many there are.
    """
    if attention_mask is not None:
        return attention_mask.bool()
    batch, total = inputs_embeds.shape[:2]
    if position_ids is not None:
        total = int(position_ids.max()) + 1
    return torch.ones(batch, total, dtype=torch.bool, device=inputs_embeds.device)


def _packed_samples(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Number of the sample of each position of packed rows, or None if nothing is packed."""
    starts = position_ids == 0
    if bool((starts.sum(1) <= 1).all()):
        return None
    return starts.long().cumsum(1)


def _with_scores(
    decoder: Any,
    lower: list[nn.Module],
    hidden: torch.Tensor,
    masks: Any,
    position_ids: torch.Tensor,
    valid: torch.Tensor,
    at: torch.Tensor,
    cache: Any,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the lower layers, and the attention of the tokens at ``at`` in the last of them."""
    if not len(lower):
        raise UserError(
            "compression.method 'fastv' chooses by the attention of the layer before: set "
            "compression.layer to at least 1"
        )
    hidden = run_layers(decoder, lower[:-1], hidden, masks, position_ids, cache, **options)
    scores = attention_of(decoder, lower[-1], hidden, position_ids, valid, at)
    hidden = run_layers(decoder, lower[-1:], hidden, masks, position_ids, cache, **options)
    return hidden, scores


@torch.no_grad()
def attention_of(
    decoder: Any,
    layer: Any,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    valid: torch.Tensor,
    at: torch.Tensor,
) -> torch.Tensor:
    """Attention of one position in each row to the others, averaged over heads.

    Only that row of the attention map is computed.

    Args:
        decoder: of the layer.
        layer: whose queries and keys are used.
        hidden: (B, T, D) before the layer.
        position_ids: (B, T).
        valid: bool (B, T): positions that hold a token.
        at: int64 (B,), the position.

    Returns:
        float32 (B, T), zero at padding and behind ``at``.
    """
    rows = torch.arange(len(at), device=at.device)
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    shape = (*states.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(states[rows, at]).view(shape[0], 1, -1, attention.head_dim)
    key = attention.k_proj(states).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = decoder.rotary_emb(hidden, position_ids=position_ids)
    query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, 1 | T, d)
    query = _rotated(query, cos[rows, at][:, None, None], sin[rows, at][:, None, None])
    key = _rotated(key, cos[:, None], sin[:, None])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.float() @ key.float().transpose(2, 3)) * attention.scaling  # (B, H, 1, T)
    seen = valid & (torch.arange(valid.shape[1], device=at.device)[None] <= at[:, None])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return scores.softmax(-1).mean(1)[:, 0]


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
