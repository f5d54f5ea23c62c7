"""The spatially constrained resampler of LLaVA-UHD (published as ``adapt_spatial_resampler``).

A fixed grid of learned queries; each query attends to its own window of the view's feature map.
Parameter names, norm epsilon and window arithmetic are those of the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.tokens import fixed_queries
from llava_uhd.projectors.pooling import pool_windows
from llava_uhd.projectors.registry import PROJECTORS
from llava_uhd.vision.position import ResampledRows

Grid = tuple[int, int]

# Elements of the largest temporary of the value side (128 MiB in float32).
MIXED_ELEMENTS = 2**25


def sincos_table(side: int, width: int) -> torch.Tensor:
    """Analytic 2-D position table, the initial value of the learned one.

    The first half of the channels encodes the column, the second the row; each half is the sines,
    then the cosines of ``position / 10000 ** (k / (width / 4))``.

    Args:
        side: of the square grid.
        width: channels, divisible by 4.

    Returns:
        float32 (side * side, width), row by row.
    """
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, quarter)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = one_axis.repeat(side, 1)
    rows = one_axis.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()


def attention_heads(config: LlavaUHDConfig) -> int:
    """Heads of a projector with queries: ``projector.num_heads``, else the published rule.

    Raises:
        UserError: the width does not fit the heads or the position table.
    """
    width = config.hidden_size
    num_heads = config.projector.num_heads or max(width // 128, 1)
    if width % num_heads or width % 4:
        raise UserError(
            f"projector.num_heads: the width {width} must be divisible by {num_heads} and by 4"
        )
    return num_heads


class WindowAttention(nn.Module):
    """Multi-head attention of one query per window over the window's pooled cells.

    The published module pools keys and values, then projects all pooled rows. The same numbers
    cost a fraction of that:

    - a key is its value plus a position, and pooling is linear: values are pooled once, and the
      positions once per shape of view;
    - queries do not depend on the image, so the key projection moves to them: ``q . (W k)`` is
      ``(W^T q) . k``; the key bias adds the same to all scores of a window and cancels in the
      softmax;
    - weights sum to one, so values are averaged before they are projected, bias included.

    Args:
        width: channels of queries, keys, values and output.
        num_heads: attention heads; divides ``width``.
        grid_size: windows along each axis.
        round_boxes: round window corners to the feature dtype.
    """

    def __init__(self, width: int, num_heads: int, grid_size: int, round_boxes: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid_size = grid_size
        self.round_boxes = round_boxes
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def reset_weights(self) -> None:
        """Xavier input projections, as in the published module."""
        init.xavier_uniform_(self.in_proj_weight)
        init.zeros_(self.in_proj_bias)

    def forward(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        positions: dict[Grid, torch.Tensor],
        grids: list[Grid],
    ) -> torch.Tensor:
        """Attends in all views of a pack.

        Args:
            query: (Q, D), one per window, Q = grid_size ** 2.
            value: (P, D) on the cells of all views, one view after another.
            positions: grid -> (rows * columns, D); a cell's key is its value plus its position.
            grids: (rows, columns) of each view.

        Returns:
            (V, Q, D).
        """
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, _, b_v = self.in_proj_bias.chunk(3)
        absorbed = self._absorb(F.linear(query, w_q, b_q), w_k)  # (Q, H, D)
        views = value.split([rows * columns for rows, columns in grids])
        outputs: list[torch.Tensor] = [query] * len(grids)
        for grid in dict.fromkeys(grids):
            members = [index for index, other in enumerate(grids) if other == grid]
            place = self._pool([positions[grid]], grid)  # (Q, 1, bins, D)
            cells = self._pool([views[index] for index in members], grid)  # (Q, n, bins, D)
            scores = self._score(absorbed, cells) + self._score(absorbed, place)  # (Q, n, H, bins)
            weights = scores.softmax(-1, dtype=torch.float32).to(cells.dtype)
            attended = self._mix(weights, cells, w_v)  # (Q, n, D)
            for index, view in zip(members, attended.unbind(1), strict=True):
                outputs[index] = view
        return self.out_proj(torch.stack(outputs) + b_v)

    def _absorb(self, query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Scaled queries (Q, D) through the transposed key projection (D, D): (Q, H, D)."""
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # (H, Q, d)
        query = query * query.shape[-1] ** -0.5
        return (query @ weight.unflatten(0, (self.num_heads, -1))).transpose(0, 1)

    @staticmethod
    def _score(absorbed: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """(Q, H, D) against (Q, n, bins, D): (Q, n, H, bins)."""
        scores = absorbed @ cells.flatten(1, 2).transpose(1, 2)  # (Q, H, n * bins)
        return scores.unflatten(2, cells.shape[1:3]).transpose(1, 2)

    def _pool(self, views: list[torch.Tensor], grid: Grid) -> torch.Tensor:
        """Views of one shape to (Q, n, bins, D)."""
        maps = torch.stack(views).unflatten(1, grid)  # (n, rows, columns, D)
        return pool_windows(maps, self.grid_size, maps.dtype if self.round_boxes else None)

    def _mix(
        self, weights: torch.Tensor, cells: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """Averages the cells for each head, then projects each head.

        Args:
            weights: (Q, n, H, bins).
            cells: (Q, n, bins, D).
            projection: (D, D) of the values.

        Returns:
            (Q, n, D).
        """
        heads, width = self.num_heads, cells.shape[-1]
        projection = projection.unflatten(0, (heads, -1)).transpose(1, 2)  # (H, D, d)
        # The averages have H times the size of the result: when they are large, only some windows
        # at a time, and made again in the backward pass instead of kept.
        step = max(MIXED_ELEMENTS // (cells.shape[1] * heads * width), 1)
        if step >= len(cells):
            return _project_averages(weights, cells, projection)
        parts = zip(weights.split(step), cells.split(step), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([_project_averages(*part, projection) for part in parts])
        outputs = []
        for part in parts:
            outputs.append(
                checkpoint(
                    _project_averages,
                    *part,
                    projection,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.cat(outputs)


def _project_averages(
    weights: torch.Tensor, cells: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """(Q, n, H, bins), (Q, n, bins, D) and (H, D, d) to (Q, n, H * d)."""
    mixed = weights @ cells  # (Q, n, H, D)
    values = mixed.flatten(0, 1).transpose(0, 1) @ projection  # (H, Q * n, d)
    return values.transpose(0, 1).reshape(*mixed.shape[:2], -1)


@PROJECTORS.register("spatial_resampler")
class SpatialResampler(nn.Module):
    """``num_queries`` tokens for every view, whatever its shape.

    Args:
        config: of the model; reads ``projector``, the tower's width and the language model's.

    Raises:
        UserError: ``num_queries`` is not a square, or the width does not fit the heads or the
            position table.
    """

    def __init__(self, config: LlavaUHDConfig) -> None:
        super().__init__()
        options, width = config.projector, config.hidden_size
        kv_width = config.vision_config.hidden_size
        num_heads = attention_heads(config)
        side, _ = fixed_queries(options, 1, 1)
        self.grid_size, num_queries = side, side * side
        eps = options.layer_norm_eps
        self.pos_embed = nn.Parameter(torch.empty(num_queries, width))
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.kv_proj: nn.Module = (
            nn.Linear(kv_width, width, bias=False) if kv_width != width else nn.Identity()
        )
        self.attn = WindowAttention(width, num_heads, self.grid_size, options.round_boxes)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Parameter(torch.empty(width, width))
        self._positions = ResampledRows()

    def reset_weights(self) -> None:
        """Published initial values of the parameters held directly by this module."""
        width = self.proj.shape[0]
        init.copy_(self.pos_embed, sincos_table(self.grid_size, width))
        init.trunc_normal_(self.query, std=0.02)
        init.normal_(self.proj, std=width**-0.5)

    def forward(
        self,
        features: torch.Tensor,
        view_grids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Resamples all views in one call.

        Args:
            features: (P, C) patch features of all views, one after another.
            view_grids: (V, 2) integer (rows, columns).
            pixel_values: unused; other projectors read the pixels.

        Returns:
            (V * num_queries, D): tokens of each view in row order of the query grid.
        """
        grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
        value = self.ln_kv(self.kv_proj(features))  # (P, D)
        positions = {
            grid: self._positions(self.pos_embed, grid).to(value.dtype)
            for grid in dict.fromkeys(grids)
        }
        query = self.ln_q(self.query) + self.pos_embed.to(value.dtype)  # (Q, D)
        tokens = self.attn(query, value, positions, grids)  # (V, Q, D)
        return (self.ln_post(tokens) @ self.proj).flatten(0, 1)
