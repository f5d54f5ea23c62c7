"""Writing image tokens over their placeholders."""

from __future__ import annotations

import torch


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


def repeat_rows(features: torch.Tensor, mask: torch.Tensor, times: int) -> torch.Tensor:
    """Image tokens of a batch whose every row is repeated ``times`` times in a row (beams).

    Args:
        features: (N, D) of the batch before repetition.
        mask: (B, T) placeholder mask before repetition.
        times: copies of each row.
    """
    rows = features.split(mask.sum(1).tolist())
    return torch.cat([row for row in rows for _ in range(times)])
