"""Attention inside views of a packed sequence: no token sees another view.

Registered as a transformers attention backend, so the library's own encoder layers run over the
pack unchanged: every linear layer sees all tokens at once and only the attention core works view
by view. The layout of the pack travels as the attention mask, the one argument that the layers of
every family hand on to their backend untouched. Each layer runs exactly once per call whatever the
mix of view shapes, so parallel ranks with different images stay in step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

PACKED_VIEWS = "packed_views"


@dataclass(frozen=True)
class ViewGroups:
    """Layout of a packed sequence in which views of equal length stand together.

    Attributes:
        groups: (number of views, tokens per view) of each run of equal views.
        backend: "grouped" (scaled dot-product attention per run) or "varlen" (one
            variable-length kernel; half precision on CUDA).
    """

    groups: tuple[tuple[int, int], ...]
    backend: str = "grouped"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each view, in order."""
        return [length for count, length in self.groups for _ in range(count)]


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: tuple[tuple[int, int], ...],
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Runs one dense attention per run of equal views.

    Args:
        query: (heads, N, d); key and value alike.
        key: see query.
        value: see query.
        groups: (number of views, tokens per view); the products sum to N.
        scale: of the logits.
        dropout: probability.

    Returns:
        (N, heads, d).
    """
    heads, _, width = query.shape
    outputs, start = [], 0
    for count, length in groups:
        stop = start + count * length

        def part(x: torch.Tensor, start: int = start, stop: int = stop) -> torch.Tensor:
            return x[:, start:stop].reshape(heads, count, length, width).transpose(0, 1)  # noqa: B023

        out = F.scaled_dot_product_attention(
            part(query), part(key), part(value), dropout_p=dropout, scale=scale
        )  # (count, heads, length, d)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, width))
        start = stop
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    """One variable-length kernel over the pack (PyTorch's own; CUDA, half precision).

    Shapes as in `grouped_attention`.
    """
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    # (N, heads, d) as the kernel wants it.
    query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    # The kernel scales by 1 / sqrt(d) itself; any other scale goes into the query.
    query = query * (scale * query.shape[-1] ** 0.5)
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest)
    return out[0] if isinstance(out, tuple) else out


def packed_views_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: ViewGroups,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers attention backend over a pack of views.

    Args:
        module: the calling attention layer.
        query: (1, heads, N, d); key and value alike.
        key: see query.
        value: see query.
        attention_mask: who may see whom; its lengths sum to N.
        scaling: of the logits.
        dropout: probability.
        **kwargs: of the library's interface: none is used.

    Returns:
        (1, N, heads, d) and None for the weights.
    """
    layout = attention_mask
    parts = (query[0], key[0], value[0])
    if layout.backend == "varlen":
        out = varlen_attention(*parts, layout.lengths, scaling)
    else:
        out = grouped_attention(*parts, layout.groups, scaling, dropout)
    return out.unsqueeze(0), None


AttentionInterface.register(PACKED_VIEWS, packed_views_attention)
