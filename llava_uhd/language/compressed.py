"""Running a decoder whose visual tokens become fewer at one of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from llava_uhd.config.model import CompressionConfig
from llava_uhd.errors import UserError
from llava_uhd.language.compression import IndexMap, build_map
from llava_uhd.language.compressors import compressor_of
from llava_uhd.language.layers import (
    Shortened,
    cache_name,
    check_decoder,
    library_masks,
    run_layers,
    window_of,
)
from llava_uhd.language.runs import Run, checked_runs

NEEDS_A_LAYER = (
    "compression.method '{}' chooses by the attention of the layer before: set compression.layer "
    "to at least 1"
)


# Attributes of a cache: what its tokens were shortened by, and how many its first layer lacks.
_MARK, _FEWER = "llava_uhd_compression", "llava_uhd_fewer_tokens"


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


def compression_of(own: Any, given: Any = None) -> CompressionConfig:
    """What a pass does: the argument or, without one, what the model's configuration says.

    Args:
        own: of the configuration.
        given: argument of the call, or None.

    Raises:
        UserError: it is none, or holds values that a pass cannot follow.
    """
    found = own if given is None else given
    if not isinstance(found, CompressionConfig):
        raise UserError(
            f"compression must be a CompressionConfig, got {found!r}: write for example "
            "CompressionConfig('avgpool1d', layer=2, stride=8)"
        )
    found.check()
    if found.method != "none":
        compressor_of(found.method)
    if found.schedule is not None:
        raise UserError(
            f"compression.schedule '{found.schedule}' belongs to a training run, not to one pass: "
            "set compression.layer and compression.stride instead"
        )
    return found


def is_active(config: CompressionConfig, num_layers: int) -> bool:
    """Whether a configuration changes anything in a decoder of so many layers."""
    return config.method != "none" and config.stride > 1 and config.layer < num_layers


def check_method(config: CompressionConfig) -> None:
    """Finds what a method could not do, before anything is computed.

    Raises:
        UserError: an unknown method, or one that cannot work with its layer or stride.
    """
    if config.method == "none":
        return
    compressor = compressor_of(config.method)
    if compressor.needs_scores and config.layer < 1:
        raise UserError(NEEDS_A_LAYER.format(config.method))
    # Any run tells whether a rule takes the stride; a small one also where that is enormous.
    compressor.groups(Run(4, 2), config.stride, True, torch.zeros(4))


def check_cache(cache: Any, config: CompressionConfig | None) -> None:
    """Refuses to go on from a cache that holds other tokens than the call would.

    Args:
        cache: of earlier tokens, or None.
        config: of the call; None: the call shortens nothing.

    Raises:
        ValueError: it was filled under another compression, or cannot hold layers of different
            lengths.
    """
    if cache is None:
        return
    if config is not None and getattr(cache, "is_compileable", False):
        raise ValueError(
            "compression needs a cache that grows: leave cache_implementation 'static' out"
        )
    if cache.get_seq_length() > 0 and getattr(cache, _MARK, None) != config:
        raise ValueError(
            "the cache was filled under another compression: pass the compression and the "
            "visual_runs of the whole sequence (get_visual_runs) in every call"
        )


def fewer_tokens(cache: Any) -> int:
    """How many of the tokens that went into a cache its first layer does not hold."""
    return int(getattr(cache, _FEWER, 0))


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
    """Runs all layers and the last norm; nothing is remembered but in the cache.

    Args:
        decoder: of a language model, without its head.
        config: method, layer, ...
        runs: of the whole sequence, from `place_runs`.
        inputs_embeds: (B, Q, D): the whole sequence, or new tokens behind a cache.
        attention_mask: (B, T) of the whole sequence, cached tokens included.
        position_ids: (B, Q) or (1, Q); restarting ones pack several samples in a row.
        cache: of earlier tokens; the layers from ``config.layer`` on hold fewer.
        use_cache: keep one.
        scored_at: of the tokens whose attention "fastv" follows (the end of the prompt); None:
            the last of each row.
        **kwargs: of the layers.

    Raises:
        UserError: a decoder of another build, or a method that needs an earlier layer.
        ValueError: a cache that this call cannot go on from.
    """
    if use_cache and cache is None:
        cache = DynamicCache(config=decoder.config)
    check_cache(cache, config)
    given = _read(inputs_embeds, attention_mask, position_ids, cache)
    total = given.valid.shape[1]
    runs, cached = checked_runs(runs, len(given.valid), total), total - inputs_embeds.shape[1]
    if not given.whole and bool((runs[..., :2].sum(-1) > cached).any()):
        raise ValueError(
            "visual tokens behind a cache cannot be shortened: pass the whole sequence without it"
        )
    kwargs.pop("return_dict", None)
    options = {"use_cache": use_cache, **kwargs}
    if config.layer < 0:
        hidden, table = _before(decoder, config, runs, given, options)
    else:
        hidden, table = _between(decoder, config, runs, given, scored_at, options)
    if cache is not None:
        setattr(cache, _MARK, config)
        setattr(cache, _FEWER, total - cache.get_seq_length())
    return Compressed(hidden, cache if use_cache else None, table if given.whole else None)


@dataclass(frozen=True)
class _Given:
    """One call of the decoder.

    Attributes:
        hidden: (B, Q, D) embeddings.
        mask: (B, T) as it was passed, or None.
        valid: bool (B, T): positions of the whole sequence that hold a token.
        position_ids: (B, Q).
        samples: int64 (B, Q) numbers of packed samples, or None.
        cache: of earlier tokens, or None.
        whole: nothing is cached: the call holds the whole sequence.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None
    valid: torch.Tensor
    position_ids: torch.Tensor
    samples: torch.Tensor | None
    cache: Any
    whole: bool


def _read(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Any,
) -> _Given:
    """Completes what a caller may leave out."""
    batch, queries = hidden.shape[:2]
    whole = cache is None or cache.get_seq_length() == 0
    valid = _valid(hidden, mask, None if whole else position_ids)
    if position_ids is None:
        position_ids = _counted(valid, queries)
    position_ids = position_ids.expand(batch, -1)
    samples = _packed_samples(position_ids) if mask is None and whole else None
    return _Given(hidden, mask, valid, position_ids, samples, cache, whole)


def _before(
    decoder: Any,
    config: CompressionConfig,
    runs: torch.Tensor,
    given: _Given,
    options: dict[str, Any],
) -> tuple[torch.Tensor, IndexMap]:
    """Shortens the embeddings; then any decoder runs as if there had been fewer."""
    if compressor_of(config.method).needs_scores:
        raise UserError(NEEDS_A_LAYER.format(config.method))
    table = build_map(config, runs, given.valid, training=bool(decoder.training))
    hidden = table.states(given.hidden) if given.whole else given.hidden
    position_ids = _counted(table.mask, hidden.shape[1])
    if given.samples is not None:
        position_ids = position_ids - _starts(table.carry(given.samples, -1))
    output = decoder(
        inputs_embeds=hidden,
        attention_mask=None if bool(table.mask.all()) else table.mask.long(),
        position_ids=position_ids,
        **{cache_name(decoder.forward): given.cache},
        **options,
    )
    return output.last_hidden_state, table


def _between(
    decoder: Any,
    config: CompressionConfig,
    runs: torch.Tensor,
    given: _Given,
    scored_at: int | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, IndexMap]:
    """Shortens the states before layer ``config.layer``."""
    check_decoder(decoder)
    lower, upper = decoder.layers[: config.layer], decoder.layers[config.layer :]
    scored = compressor_of(config.method).needs_scores
    if scored and not len(lower):
        raise UserError(NEEDS_A_LAYER.format(config.method))
    positions, cache = given.position_ids, given.cache
    masks = library_masks(decoder, given.hidden, given.mask, positions, cache)
    hidden = run_layers(decoder, lower[:-1], given.hidden, masks, positions, cache, **options)
    scores = _scores(decoder, lower[-1], hidden, given, scored_at) if scored else None
    hidden = run_layers(decoder, lower[-1:], hidden, masks, positions, cache, **options)
    table, samples = build_map(config, runs, given.valid, scores, bool(decoder.training)), None
    if given.whole:
        hidden = table.states(hidden)
        positions = table.positions(positions, config.positions == "half")
        samples = None if given.samples is None else table.carry(given.samples, -1)
    shortened = Shortened(table.mask, hidden.shape[1], samples)
    masks = shortened.masks(decoder, hidden)
    options = {**options, "shown_positions": False, **shortened.flash_arguments(decoder)}
    hidden = run_layers(decoder, upper, hidden, masks, positions, cache, **options)
    return decoder.norm(hidden), table


def _starts(samples: torch.Tensor) -> torch.Tensor:
    """int64 (B, T): where the packed sample of each position starts in its row."""
    places = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
    begins = torch.ones_like(samples, dtype=torch.bool)
    begins[:, 1:] = samples[:, 1:] != samples[:, :-1]
    return (places * begins).cummax(1).values


def _scores(
    decoder: Any, layer: Any, hidden: torch.Tensor, given: _Given, scored_at: int | None
) -> torch.Tensor | None:
    """(B, T) attention that the tokens before it get from the last one of their sample.

    None behind a cache, where it does not matter any more.
    """
    if not given.whole:
        return None
    valid, samples = given.valid, given.samples
    rows = torch.arange(len(valid), device=valid.device)
    if scored_at is not None:
        at = torch.full_like(rows, scored_at)
    elif samples is None:
        at = (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).argmax(1)
    else:
        ends = torch.ones_like(valid)
        ends[:, :-1] = samples[:, 1:] != samples[:, :-1]
        rows, at = ends.nonzero(as_tuple=True)
    seen = valid[rows]
    if samples is not None:
        seen = seen & (samples[rows] == samples[rows, at][:, None])
    found = attention_of(decoder, layer, hidden, given.position_ids, seen, rows, at)
    return found.new_zeros(valid.shape).index_add_(0, rows, found)


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


@torch.no_grad()
def attention_of(
    decoder: Any,
    layer: Any,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    seen: torch.Tensor,
    rows: torch.Tensor,
    at: torch.Tensor,
) -> torch.Tensor:
    """Attention of single positions to the others of their rows, averaged over heads.

    Only those rows of the attention map are computed.

    Args:
        decoder: of the layer.
        layer: whose queries and keys are used.
        hidden: (B, T, D) before the layer.
        position_ids: (B, T).
        seen: bool (N, T): what each of them may attend to, as far as it stands before it.
        rows: int64 (N,), of the batch, in order.
        at: int64 (N,), the position.

    Returns:
        float32 (N, T), zero where nothing is seen: behind ``at``, and before a sliding window.
    """
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    query = attention.q_proj(states[rows, at]).unflatten(-1, (-1, attention.head_dim))  # (N, H, d)
    key = attention.k_proj(states).unflatten(-1, (-1, attention.head_dim))  # (B, T, K, d)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = decoder.rotary_emb(hidden, position_ids=position_ids)
    query = _rotated(query, cos[rows, at][:, None], sin[rows, at][:, None])
    key = _rotated(key, cos[:, :, None], sin[:, :, None])
    query = query.unflatten(1, (key.shape[2], -1)) * attention.scaling  # (N, K, H / K, d)
    found = [
        torch.einsum("nkgd,tkd->nkgt", query[rows == row].float(), keys.float()).flatten(1, 2)
        for row, keys in enumerate(key)
    ]
    places = torch.arange(seen.shape[1], device=at.device)
    seen = seen & (places[None] <= at[:, None])
    if (window := window_of(decoder, layer)) is not None:
        seen = seen & (places[None] > at[:, None] - window)
    scores = torch.cat(found).masked_fill(~seen[:, None], -torch.inf)  # (N, H, T)
    return scores.softmax(-1).mean(1)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
