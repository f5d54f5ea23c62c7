"""The Hiwin projector step by step as published: what the fast form is measured against.

Every cell of every map is projected and normalised at the language model's width; keys and values
are pooled separately; each query set runs the whole attention, projections included.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch.nn import functional as F

from llava_uhd.projectors.hiwin_weights import Grid, HiwinWeights
from llava_uhd.projectors.pooling import pool_windows
from llava_uhd.vision.position import resample_positions


def plain_tokens(
    weights: HiwinWeights,
    features: torch.Tensor,
    pixel_values: torch.Tensor | None,
    grids: list[Grid],
) -> torch.Tensor:
    """Tokens of all views.

    Args:
        weights: whose parameters are used.
        features: (P, C) of all views, one after another.
        pixel_values: (P, 3 * p * p).
        grids: (rows, columns) of each view.

    Returns:
        (V * Q, D).
    """
    keys, values = window_tokens(weights, features, pixel_values, grids)
    lengths = torch.tensor([key.shape[1] for key in keys], device=features.device)
    longest = int(lengths.max())
    counts = torch.tensor([key.shape[0] for key in keys], device=features.device)
    lengths = lengths.repeat_interleave(counts)  # (windows of all views,)
    mask = torch.arange(longest, device=features.device) >= lengths[:, None]
    key = torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in keys])
    value = torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in values])
    outputs = []
    for query in weights.queries:
        row = weights.ln_q(query) + weights.pos_embed.to(query.dtype)  # (Q, D)
        attended = attend(weights, row.repeat(len(grids), 1), key, value, mask)
        outputs.append(weights.ln_proj(attended))
    tokens = weights.cat_proj(torch.cat(outputs, dim=-1))
    return weights.ln_post(tokens) @ weights.proj


def window_tokens(
    weights: HiwinWeights,
    features: torch.Tensor,
    pixel_values: torch.Tensor | None,
    grids: list[Grid],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values in their windows, for each run of equal views.

    Args:
        weights: whose parameters are used.
        features: (P, C).
        pixel_values: (P, 3 * p * p).
        grids: of each view.

    Returns:
        Keys and values, one (n * Q, scales * bins, D) for each run of n views.
    """
    keys, values = [], []
    start = 0
    for grid, run in groupby(grids):
        count, cells = len(list(run)), grid[0] * grid[1]
        part = slice(start, start + count * cells)
        start = part.stop
        pixels = None if pixel_values is None else pixel_values[part].unflatten(0, (count, cells))
        maps = weights.feature_maps(features[part].unflatten(0, (count, cells)), pixels, grid)
        pooled_keys, pooled_values = [], []
        for scale, feature_map in maps.items():
            value = weights.ln_kv(weights.scale_projector(scale)(feature_map))  # (n, h, w, D)
            size = (value.shape[1], value.shape[2])
            positions = resample_positions(weights.pos_embed, size).to(value.dtype)
            key = value + positions.unflatten(0, size) + weights.scale_embedding(scale)
            pooled_keys.append(_pool(weights, key))
            pooled_values.append(_pool(weights, value))
        keys.append(torch.cat(pooled_keys, dim=1))
        values.append(torch.cat(pooled_values, dim=1))
    return keys, values


def _pool(weights: HiwinWeights, maps: torch.Tensor) -> torch.Tensor:
    """(n, h, w, D) to (n * Q, bins, D)."""
    round_to = maps.dtype if weights.round_boxes else None
    return pool_windows(maps, weights.grid_size, round_to).transpose(0, 1).flatten(0, 1)


def attend(
    weights: HiwinWeights,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """One query set: each window's query over the tokens of the window.

    Args:
        weights: whose attention is used.
        query: (N, D), one for each window.
        key: (N, L, D).
        value: (N, L, D).
        mask: bool (N, L), True where a window has no token.

    Returns:
        (N, D).
    """
    attention = weights.attn
    attended, _ = F.multi_head_attention_forward(
        query[None],
        key.transpose(0, 1),
        value.transpose(0, 1),
        query.shape[-1],
        attention.num_heads,
        attention.in_proj_weight,
        attention.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight,
        attention.out_proj.bias,
        training=False,
        key_padding_mask=mask,
    )
    return attended[0]
