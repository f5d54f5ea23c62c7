"""Attention of packed rows, sample by sample: for machines without variable-length kernels.

The library's ``sdpa`` computes the whole square of a packed row and masks what lies between its
samples: n samples in a row cost n times as much as they need. Here each sample is a call of its
own, of the kernel for plain causal attention, without any mask.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

# Backends whose names hold "flash" get masks and borders of samples in flash attention's form.
BY_SAMPLE = "flash_by_sample"


def attend_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, an attention function of transformers.

    Args:
        module: that attends.
        query: (B, H, Q, d).
        key: (B, H', K, d), with H a multiple of H'.
        value: (B, H', K, d).
        attention_mask: (B, K), or None where nothing is padded.
        dropout: of the weights.
        scaling: of the scores.
        cu_seq_lens_q: (samples + 1,) where the samples of a packed row begin, and its end.
        position_ids: (1, Q) that begin again at 0 with each of them, likewise.
        sliding_window: keys that a query sees at most.
        **kwargs: of other backends.

    Returns:
        (B, Q, H, d), and no weights.
    """
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if query.shape[1] != key.shape[1]:
        if query.is_cuda:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and queries == keys:
        borders = _borders(query, cu_seq_lens_q, position_ids)
        parts = [
            _attend(
                query[:, :, start:stop],
                key[:, :, start:stop],
                value[:, :, start:stop],
                sliding_window,
                options,
            )
            for start, stop in pairwise(borders)
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None
    allowed = _allowed(queries, keys, sliding_window, query.device)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, -keys:].bool()
    # A row of padding must attend to something; nobody reads what comes of it.
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, **options)
    return output.transpose(1, 2).contiguous(), None


def prefer_by_sample(model: Any) -> None:
    """Lets the language model attend sample by sample where it would use ``sdpa``.

    Args:
        model: a language model of transformers, or one with such a decoder.
    """
    config = model.get_decoder().config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = BY_SAMPLE


def _borders(
    query: torch.Tensor, cumulative: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[int]:
    """Where the samples of a row begin, and its end; several rows hold one sample each."""
    total = query.shape[2]
    if query.shape[0] > 1:
        return [0, total]
    if cumulative is not None:
        return [int(each) for each in cumulative.tolist()]
    if position_ids is None or position_ids.shape[-1] != total:
        return [0, total]
    starts = (position_ids.reshape(-1)[1:] == 0).nonzero()[:, 0] + 1
    return [0, *starts.tolist(), total]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """One sample, (B, H, T, d)."""
    total = query.shape[2]
    mask = None
    if window is not None and total > window:
        mask = _allowed(total, total, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, **options
    )


def _allowed(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Bool (1, 1, Q, K): what each of the last Q positions sees."""
    places = torch.arange(keys, device=device)
    at = places[keys - queries :, None]
    seen = places <= at
    if window is not None:
        seen = seen & (places > at - window)
    return seen[None, None]


AttentionInterface.register(BY_SAMPLE, attend_by_sample)
AttentionMaskInterface.register(BY_SAMPLE, flash_attention_mask)
