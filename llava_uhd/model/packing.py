"""Image tokens: their order in the sequence, and writing them over their placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch.nn import functional as F

from llava_uhd.images.maps import Newline, TokenMap


def placeholder_mask(input_ids: torch.Tensor, image_token_id: int | None) -> torch.Tensor:
    """(B, T) bool: where ``input_ids`` holds the placeholder."""
    if image_token_id is None:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    return input_ids == image_token_id


def write_features(
    embeddings: torch.Tensor, mask: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Replaces the placeholder rows by image tokens, in reading order.

    Args:
        embeddings: (B, T, D).
        mask: (B, T) bool.
        features: (N, D), N placeholders in the whole batch.

    Returns:
        (B, T, D).

    Raises:
        ValueError: there are more or fewer placeholders than image tokens; all counts are named.
    """
    wanted = int(mask.sum())
    if wanted != features.shape[0]:
        per_row = mask.sum(1).tolist()
        raise ValueError(
            f"input_ids hold {wanted} image placeholders (per row: {per_row}), but the images give "
            f"{features.shape[0]} tokens: text and images were prepared differently, or a sequence "
            "was cut inside an image"
        )
    return embeddings.masked_scatter(mask.unsqueeze(-1), features.to(embeddings.dtype))


def new_features(
    features: torch.Tensor | None, mask: torch.Tensor, tokens: int
) -> torch.Tensor | None:
    """Image tokens of the last ``tokens`` columns, where a cache holds those before.

    Args:
        features: (N, D) of all placeholders; any other number is left to `write_features`.
        mask: (B, T) bool, the placeholders of the whole sequence.
        tokens: columns that are computed now.

    Returns:
        (N', D), or None where they hold no placeholder.
    """
    if features is None or tokens >= mask.shape[1] or int(mask.sum()) != len(features):
        return features
    new = torch.zeros_like(mask)
    new[:, mask.shape[1] - tokens :] = True
    kept = features[new[mask].to(features.device)]
    return kept if len(kept) else None


def merge_views(
    tokens: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    token_maps: torch.Tensor,
    newline: torch.Tensor | None = None,
) -> torch.Tensor:
    """Carries out `TokenMap` rows: joins, cuts, resamples, and adds learned newlines.

    Args:
        tokens: (N, D) of all views, one after another, each row by row.
        shapes: (rows, columns) of tokens of each view.
        token_maps: (M, 10) integer, the fields of `TokenMap`.
        newline: (D,), where a map has newlines.

    Returns:
        (K, D) tokens in the order of the sequence.

    Raises:
        ValueError: the maps belong to other views.
    """
    maps = [TokenMap(*row) for row in token_maps.tolist()]
    wanted = sum(each.columns * each.rows for each in maps)
    if wanted != len(shapes):
        raise ValueError(
            f"token_maps mean {wanted} views, but view_grids has {len(shapes)}: pass all the "
            "processor returned"
        )
    views = tokens.split([rows * columns for rows, columns in shapes])
    pieces, start = [], 0
    # Equal neighbours, the frames of a video for instance, are made together.
    for each, run in groupby(maps):
        count = len(list(run))
        stop = start + count * each.columns * each.rows
        if len(set(shapes[start:stop])) > 1:
            raise ValueError(f"token_maps join views of different shapes: {shapes[start:stop]}")
        stacked = torch.stack(views[start:stop]).unflatten(1, shapes[start])  # (n, h, w, D)
        pieces.append(_merge(stacked, each, newline))
        start = stop
    return torch.cat(pieces)


def _merge(views: torch.Tensor, wanted: TokenMap, newline: torch.Tensor | None) -> torch.Tensor:
    """Views (n * rows * columns, h, w, D) of n equal maps to tokens (K, D)."""
    maps = views.unflatten(0, (-1, wanted.rows, wanted.columns)).transpose(2, 3)
    maps = maps.flatten(3, 4).flatten(1, 2)  # (n, rows * h, columns * w, D)
    maps = maps.narrow(1, wanted.top, wanted.height).narrow(2, wanted.left, wanted.width)
    size = (wanted.out_height, wanted.out_width)
    if maps.shape[1:3] != size and 0 not in size:
        maps = _resampled(maps.permute(0, 3, 1, 2), size, wanted.pool).permute(0, 2, 3, 1)
    if wanted.newline == Newline.NONE:
        return maps.reshape(-1, maps.shape[-1])
    if newline is None:
        raise ValueError("token_maps have learned newlines, but the model has none")
    newline = newline.to(maps.dtype)
    if wanted.newline == Newline.ROWS:
        column = newline.expand(*maps.shape[:2], 1, -1)
        return torch.cat([maps, column], dim=2).flatten(0, 2)
    rows = maps.flatten(1, 2)  # (n, tokens, D)
    return torch.cat([rows, newline.expand(rows.shape[0], 1, -1)], dim=1).flatten(0, 1)


def _resampled(maps: torch.Tensor, size: tuple[int, int], pool: int) -> torch.Tensor:
    """(n, D, h, w) to (n, D, *size); see `TokenMap.pool`."""
    if pool > 0:
        stride = (min(pool, maps.shape[2]), min(pool, maps.shape[3]))
        return F.avg_pool2d(maps, stride)
    if pool < 0:
        stride = (min(-pool, maps.shape[2]), min(-pool, maps.shape[3]))
        return F.max_pool2d(maps, stride)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def repeat_rows(features: torch.Tensor, mask: torch.Tensor, times: int) -> torch.Tensor:
    """Image tokens of a batch whose every row is repeated ``times`` times in a row (beams).

    Args:
        features: (N, D) of the batch before repetition.
        mask: (B, T) placeholder mask before repetition.
        times: copies of each row.
    """
    rows = features.split(mask.sum(1).tolist())
    return torch.cat([row for row in rows for _ in range(times)])
