"""The plain forms that the package's own are measured against, as the original systems compute."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_uhd.images.geometry import Size, pool_bins
from llava_uhd.projectors.resampler import SpatialResampler
from llava_uhd.vision.position import resample_positions
from llava_uhd.vision.towers import VisionTower


def encode_one_by_one(
    tower: VisionTower, pixel_values: torch.Tensor, grids: list[Size]
) -> torch.Tensor:
    """Runs the tower on each view alone: (P, 3 * p * p) to (P, C)."""
    views = pixel_values.split([rows * columns for rows, columns in grids])
    return torch.cat([tower(view, torch.tensor([grid])) for view, grid in zip(views, grids)])


def axis_samples(length: int, num_windows: int, bins: int, device: torch.device) -> torch.Tensor:
    """Coordinates of RoIAlign's samples along one axis of windows that tile it.

    Unaligned, with adaptive sampling: float32 (num_windows, bins, samples).
    """
    edges = torch.arange(num_windows, dtype=torch.float64) * (length / num_windows)
    start = edges.float()
    size = ((edges + length / num_windows).float() - start).clamp_min(1.0)
    bin_size = size / bins
    samples = int(torch.ceil(bin_size).max())
    steps = (torch.arange(samples) + 0.5)[None, None] * bin_size[:, None, None] / samples
    bins_at = torch.arange(bins)[None, :, None] * bin_size[:, None, None]
    return (start[:, None, None] + bins_at + steps).to(device)


def roi_align(feature_map: torch.Tensor, grid_size: int) -> torch.Tensor:
    """RoIAlign of a grid of windows: four gathers for each sample of each window.

    Args:
        feature_map: float32 (C, rows, columns), channels first.
        grid_size: windows along each axis.

    Returns:
        (grid_size ** 2, C, bin rows, bin columns).
    """
    width, rows, columns = feature_map.shape
    bins = pool_bins(rows, columns)
    axes = []
    for length, count in zip((rows, columns), bins, strict=True):
        at = axis_samples(length, grid_size, count, feature_map.device)
        inside = ((at >= -1) & (at <= length)).float()
        at = at.clamp(0, length - 1)
        low = at.long()
        axes.append((low, (low + 1).clamp_max(length - 1), at - low, inside, at.shape[2]))
    (top, bottom, down, in_y, samples_y), (left, right, across, in_x, samples_x) = axes
    flat = feature_map.flatten(1)
    result = flat.new_zeros(())
    for y, wy in ((top, 1 - down), (bottom, down)):
        for x, wx in ((left, 1 - across), (right, across)):
            index = (y.flatten()[:, None] * columns + x.flatten()).flatten()
            weight = ((wy * in_y).flatten()[:, None] * (wx * in_x).flatten()).flatten()
            result = result + flat[:, index] * weight
    shape = (width, grid_size, bins[0], samples_y, grid_size, bins[1], samples_x)
    return result.reshape(shape).mean((3, 6)).permute(1, 3, 0, 2, 4).flatten(0, 1)


def sampled_roi_align(feature_map: torch.Tensor, grid_size: int) -> torch.Tensor:
    """`roi_align` through the compiled sampler of PyTorch; windows inside the map only."""
    _, rows, columns = feature_map.shape
    bins = pool_bins(rows, columns)
    down = axis_samples(rows, grid_size, bins[0], feature_map.device)
    across = axis_samples(columns, grid_size, bins[1], feature_map.device)
    if float(down.max()) > rows or float(across.max()) > columns:
        raise ValueError(f"windows of a {rows} x {columns} map reach beyond it")
    y = down.flatten() / max(rows - 1, 1) * 2 - 1
    x = across.flatten() / max(columns - 1, 1) * 2 - 1
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]  # (1, Y, X, 2)
    sampled = F.grid_sample(
        feature_map[None], points, mode="bilinear", padding_mode="border", align_corners=True
    )[0]
    shape = (grid_size, bins[0], down.shape[2], grid_size, bins[1], across.shape[2])
    pooled = sampled.unflatten(2, shape[3:]).unflatten(1, shape[:3]).mean((3, 6))
    return pooled.permute(1, 3, 0, 2, 4).flatten(0, 1)


def resample(
    projector: SpatialResampler, features: torch.Tensor, grids: list[Size]
) -> torch.Tensor:
    """The resampler's forward as published.

    Views one by one; keys and values each pooled by `roi_align` in float32, channels first; the
    attention module projects every pooled row.

    Args:
        projector: whose parameters are used.
        features: (P, C) of all views.
        grids: (rows, columns) of each view.

    Returns:
        (V * num_queries, D).
    """
    views = features.split([rows * columns for rows, columns in grids])
    outputs = [_resample_view(projector, view, grid) for view, grid in zip(views, grids)]
    return torch.cat(outputs)


def _resample_view(projector: SpatialResampler, view: torch.Tensor, grid: Size) -> torch.Tensor:
    value = projector.ln_kv(projector.kv_proj(view))  # (n, D)
    key = value + resample_positions(projector.pos_embed, grid)
    query = projector.ln_q(projector.query) + projector.pos_embed  # (Q, D)

    def pool(rows: torch.Tensor) -> torch.Tensor:
        feature_map = rows.T.float().reshape(-1, *grid).contiguous()  # (D, rows, columns)
        windows = roi_align(feature_map, projector.grid_size)  # (Q, D, bin rows, bin columns)
        return windows.flatten(2).permute(2, 0, 1).to(rows.dtype)  # (bins, Q, D)

    attention = projector.attn
    attended, _ = F.multi_head_attention_forward(
        query[None],
        pool(key),
        pool(value),
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
    )
    return projector.ln_post(attended[0]) @ projector.proj
