"""Flash attention in slow steps: what it makes of its arguments, without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

PLAIN_FLASH = "plain_flash_attention"


def plain_flash(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What flash attention computes of its arguments, step by step: (B, H, T, d) -> (B, T, H, d).

    Padding is cut out by the 2-D mask; borders of packed samples come as cumulative lengths, or
    are where positions restart.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    output = torch.zeros_like(query)
    for row in range(len(query)):
        kept = torch.ones(key.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), key.shape[2])
            kept = attention_mask[row].bool()
        places = kept.nonzero()[:, 0]
        borders = torch.tensor([0, len(places)])
        if cu_seq_lens_q is not None:
            borders = cu_seq_lens_q
        elif position_ids is not None and attention_mask is None and len(query) == 1:
            starts = (position_ids[0] == position_ids.min()).nonzero()[:, 0]
            borders = torch.cat([starts, borders[1:]])
        for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            own = places[start:stop]
            one = [each[row, :, own][None] for each in (query, key, value)]
            output[row, :, own] = F.scaled_dot_product_attention(
                *one, is_causal=True, scale=scaling
            )[0]
    return output.transpose(1, 2), None


AttentionInterface.register(PLAIN_FLASH, plain_flash)
AttentionMaskInterface.register(PLAIN_FLASH, flash_attention_mask)
