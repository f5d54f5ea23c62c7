"""The losses of VDIM pre-training. All of them are computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CrfRule:
    """Constants of the sampled conditional random field, as published.

    Attributes:
        alpha: variance of distances between places, in parts of the picture, where colours count.
        beta: variance of distances between colours.
        gamma: variance of distances between places alone.
        w1: weight of places with colours.
        w2: weight of places alone.
        shift: taken from every similarity.
    """

    alpha: float = 0.1
    beta: float = 0.15
    gamma: float = 0.005
    w1: float = 10.0
    w2: float = 3.0
    shift: float = 0.0


def crf_loss(
    guidance: torch.Tensor,
    features: torch.Tensor,
    points: torch.Tensor,
    rule: CrfRule | None = None,
) -> torch.Tensor:
    """Features of places that look alike and lie close should not differ.

    Args:
        guidance: (B, 3, H, W) normalised pictures.
        features: (B, D, N) features of the points, or (B, D, H, W) maps.
        points: int64 (2, N) rows and columns of the compared places, for the whole batch.
        rule: constants.

    Returns:
        Mean over pictures and pairs of similarity times squared distance.
    """
    rule = rule or CrfRule()
    rows, columns = points
    if features.ndim == 4:
        features = features[:, :, rows, columns]
    height, width = guidance.shape[-2:]
    scale = torch.tensor([height, width], device=guidance.device, dtype=torch.float32)
    apart = _squared_distances((points.T.float() / scale)[None])  # (1, N, N)
    colours = _squared_distances(guidance.float()[:, :, rows, columns].transpose(1, 2))
    similar = (
        rule.w1 * torch.exp(-apart / (2 * rule.alpha) - colours / (2 * rule.beta))
        + rule.w2 * torch.exp(-apart / (2 * rule.gamma))
        - rule.shift
    )
    return (_squared_distances(features.float().transpose(1, 2)) * similar).mean()


def _squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """(B, N, D) to (B, N, N), through products: differences would need D times the memory."""
    # Distances do not depend on the origin; near the middle of the rows, less is rounded away.
    rows = rows - rows.mean(1, keepdim=True).detach()
    norms = rows.square().sum(-1)
    return norms[:, :, None] + norms[:, None, :] - 2 * rows @ rows.transpose(1, 2)


def tv_loss(maps: torch.Tensor) -> torch.Tensor:
    """Total variation: squared steps down and right, per element of (B, C, H, W)."""
    maps = maps.float()
    down = (maps[:, :, 1:] - maps[:, :, :-1]).square().sum()
    right = (maps[:, :, :, 1:] - maps[:, :, :, :-1]).square().sum()
    return (down + right) / maps.numel()


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of kernels (B, C, k, k) that add up to 1, mean over the first axis."""
    weights = weights.float()
    return -(weights * weights.clamp(min=1e-7).log()).sum((1, 2, 3)).mean()


def reconstruction_loss(
    guess: torch.Tensor, target: torch.Tensor, deviation: torch.Tensor | None
) -> torch.Tensor:
    """Squared error, or the likelihood under a predicted deviation.

    Args:
        guess: (B, D, h, w) shrunken maps.
        target: (B, D, h, w) features of the tower.
        deviation: (B, 1, h, w) above 0, or None.
    """
    squared = (guess.float() - target.float()) ** 2
    if deviation is None:
        return squared.mean()
    return (squared / (2 * deviation**2) + deviation.log()).mean()
