"""Image tokens: their order in the sequence, and writing them over their placeholders."""

from __future__ import annotations

from functools import lru_cache

import torch

from llava_uhd.images.geometry import map_side, row_order


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


@lru_cache(maxsize=256)
def _image_order(columns: int, rows: int, tokens_per_view: int) -> torch.Tensor:
    """int64 (N,): order of one image's tokens in the layout "rows", overview included."""
    slices = row_order(columns, rows, map_side([tokens_per_view]))
    return torch.tensor([*slices, *range(len(slices), len(slices) + tokens_per_view)])


def sequence_order(
    image_grids: torch.Tensor, num_views: int, num_tokens: int
) -> torch.Tensor | None:
    """Order in which the sequence of the layout "rows" takes the tokens of a projector.

    Args:
        image_grids: (I, 2) integer (columns, rows) of each image's slices, (0, 0) unsliced.
        num_views: views of all images, slices and overviews.
        num_tokens: tokens of all views, as many for each.

    Returns:
        int64 (num_tokens,) on the CPU: position in the sequence -> token of the projector. None
        where no image is sliced: the tokens stay as they are.

    Raises:
        ValueError: the grids belong to another number of views.
        UserError: the tokens of a view form no square map.
    """
    grids = [(columns, rows) for columns, rows in image_grids.tolist()]
    wanted = sum(columns * rows + 1 for columns, rows in grids)
    if wanted != num_views:
        raise ValueError(
            f"image_grids {grids} mean {wanted} views, but view_grids has {num_views}: pass all "
            "the processor returned"
        )
    if not any(columns for columns, _ in grids):
        return None
    tokens = num_tokens // num_views
    order, start = [], 0
    for columns, rows in grids:
        order.append(_image_order(columns, rows, tokens) + start)
        start += (columns * rows + 1) * tokens
    return torch.cat(order)


def repeat_rows(features: torch.Tensor, mask: torch.Tensor, times: int) -> torch.Tensor:
    """Image tokens of a batch whose every row is repeated ``times`` times in a row (beams).

    Args:
        features: (N, D) of the batch before repetition.
        mask: (B, T) placeholder mask before repetition.
        times: copies of each row.
    """
    rows = features.split(mask.sum(1).tolist())
    return torch.cat([row for row in rows for _ in range(times)])
