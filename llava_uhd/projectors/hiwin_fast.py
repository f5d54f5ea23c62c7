"""The Hiwin projector by exact re-association: nothing at the language model's width per cell.

A cell x of a map counts as ``LN(W x + b) = g * (W' x + b') / s(x) + beta`` with W' and b' centred
over the output channels. It is divided by its deviation s(x) at the tower's width C; all the rest
is linear and can wait:

- cells are pooled once, at width C, for keys and values of all four query sets;
- s(x) needs no W' x either: its square is a quadratic form of x with the Gram matrix of W', where
  that is cheaper (`gram_pays`);
- W', b', g and beta move into the key and the value projection, one small product per call
  instead of one per cell; queries do not depend on the image, so these key matrices move on to
  the queries;
- attention weights are applied to the pooled cells, and only these averages are projected, for
  each head its own rows;
- a key's position and scale embedding are pooled per shape of view, from the small table.

The deviations are float32 or better whatever the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_uhd.projectors.hiwin_weights import Grid, HiwinWeights
from llava_uhd.projectors.pooling import pool_table, pool_windows

# Elements of the temporaries of the value side: 64 MiB in float32 on a CPU, 256 MiB in bfloat16 on
# a GPU, which likes few large launches.
CPU_MIXED, GPU_MIXED = 2**24, 2**27

# Cells whose deviations are computed at a time on a CPU.
CPU_CELLS = 2**12

# Columns beside the C of a pooled cell: its share of b', its share of beta, and zeros up to a
# width that matrix units like.
EXTRA = 8


def gram_pays(cells: int, kv_width: int, width: int) -> bool:
    """Whether deviations are cheaper through the Gram matrix than by projecting every cell.

    Multiply-adds: ``cells * C * D`` against ``cells * C * C`` and ``C * C * D`` for the matrix.

    Example: C = 1024, D = 4096 pays from 1366 cells: for all 4x maps, and for three tower maps of
    24 x 24. D <= C never pays.

    Args:
        cells: of all maps of one scale in the call.
        kv_width: channels C of the maps.
        width: channels D of the language model.
    """
    return cells * width > (cells + width) * kv_width


class _GramDeviation(torch.autograd.Function):
    """``1 / sqrt(x' G x + 2 c' x + d + eps)`` for each row x, in the dtype of G."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        gram: torch.Tensor,
        cross: torch.Tensor,
        rest: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """(N, C), (C, C), (C,), () to (N,)."""
        found = []
        with torch.autocast(rows.device.type, enabled=False):
            for part in _pieces(rows):
                part = part.to(gram.dtype)
                square = torch.linalg.vecdot(part @ gram + 2 * cross, part)
                found.append(square.add_(rest).clamp_min_(0).add_(eps).rsqrt_())
        result = torch.cat(found)
        ctx.save_for_backward(rows, gram, cross, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, gram, cross, result = ctx.saved_tensors
        slope = grad * result**3 * -0.5  # d loss / d square
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_gram, grad_cross = torch.zeros_like(gram), torch.zeros_like(cross)
        start = 0
        with torch.autocast(rows.device.type, enabled=False):
            for part in _pieces(rows):
                stop = start + len(part)
                part, weight = part.to(gram.dtype), slope[start:stop, None]
                if ctx.needs_input_grad[1]:
                    weighted = part * weight
                    grad_gram.addmm_(weighted.T, part)
                    grad_cross.add_(weighted.sum(0), alpha=2)
                if grad_rows is not None:
                    grad_rows[start:stop] = (part @ gram + cross) * (2 * weight)
                start = stop
        return grad_rows, grad_gram, grad_cross, slope.sum(), None


def _pieces(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.split(CPU_CELLS) if rows.device.type == "cpu" else (rows,)


def precise(values: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class ScaleMatrices:
    """What one scale's parameters come to.

    Attributes:
        centred: (D, C) and (D,): W' and b'.
        gram: (C, C), (C,), (), float32 or better: of W' and b', or None where cells are projected
            instead.
        eps: of the norm.
        key: (H, D / H, C + EXTRA): from pooled cells to keys, projected, per head.
        value: (H, C + EXTRA, D / H): likewise values, transposed.
    """

    centred: tuple[torch.Tensor, torch.Tensor]
    gram: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    eps: float
    key: torch.Tensor
    value: torch.Tensor

    def inverse_deviation(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, h, w) of (n, h, w, C), float32 or better."""
        if self.gram is None:
            projected = precise(F.linear(maps, *self.centred))
            return (projected.square().mean(-1) + self.eps).rsqrt()
        inverse: torch.Tensor = _GramDeviation.apply(maps.flatten(0, 2), *self.gram, self.eps)
        return inverse.unflatten(0, maps.shape[:3])


def scale_matrices(
    weights: HiwinWeights, scale: int, cells: int, key: torch.Tensor, value: torch.Tensor
) -> ScaleMatrices:
    """Merges the parameters that a pooled cell of one scale meets.

    Args:
        weights: of the projector.
        scale: of the maps.
        cells: of all maps of that scale in the call.
        key: (D, D), the attention's key matrix.
        value: (D, D), its value matrix.
    """
    projector, norm = weights.scale_projector(scale), weights.ln_kv
    width, kv_width = projector.weight.shape
    matrix = projector.weight - projector.weight.mean(0)
    bias = projector.bias - projector.bias.mean()
    gram = None
    if gram_pays(cells, kv_width, width):
        with torch.autocast(matrix.device.type, enabled=False):
            wide, tall = precise(matrix), precise(bias)
            gram = (wide.T @ wide / width, tall @ wide / width, tall @ tall / width)
    gain = norm.weight[:, None]
    columns = [gain * matrix, gain * bias[:, None], norm.bias[:, None]]
    whole = torch.cat([*columns, matrix.new_zeros(width, EXTRA - 2)], dim=1)  # (D, C + EXTRA)
    heads = (weights.attn.num_heads, -1)
    return ScaleMatrices(
        (matrix, bias),
        gram,
        norm.eps,
        (key @ whole).unflatten(0, heads),
        (value @ whole).unflatten(0, heads).transpose(1, 2),
    )


def fast_tokens(
    weights: HiwinWeights,
    features: torch.Tensor,
    pixel_values: torch.Tensor | None,
    grids: list[Grid],
) -> torch.Tensor:
    """Tokens of all views; see `llava_uhd.projectors.hiwin_plain.plain_tokens`.

    Args:
        weights: whose parameters are used.
        features: (P, C) of all views, one after another.
        pixel_values: (P, 3 * p * p).
        grids: (rows, columns) of each view.

    Returns:
        (V * Q, D).
    """
    lengths = [rows * columns for rows, columns in grids]
    # Split once: each split of a parameter would have a gradient of its full size.
    w_query, w_key, w_value = weights.attn.in_proj_weight.chunk(3)
    matrices = {
        scale: scale_matrices(weights, scale, sum(lengths) * scale**2, w_key, w_value)
        for scale in weights.scales
    }
    query, tables = _queries(weights, w_query), _position_keys(weights, w_key)
    views = features.split(lengths)
    pixels = None if pixel_values is None else pixel_values.split(lengths)
    answers, order = [], []
    for grid in dict.fromkeys(grids):
        members = [index for index, other in enumerate(grids) if other == grid]
        order += members
        packed = torch.stack([views[index] for index in members])
        guidance = None if pixels is None else torch.stack([pixels[index] for index in members])
        cells = _pooled_cells(weights, matrices, packed, guidance, grid)
        place = _places(weights, tables, grid)
        answers.append(_attend(query, place, cells, list(matrices.values())))
    attended = torch.cat(answers) if len(answers) > 1 else answers[0]
    del answers
    tokens = _tokens(weights, attended)  # (V, Q, D), views in the order of `order`
    if order != sorted(order):
        tokens = tokens[torch.tensor(order, device=tokens.device).argsort()]
    return tokens.flatten(0, 1)


def _queries(weights: HiwinWeights, matrix: torch.Tensor) -> torch.Tensor:
    """Queries of all sets through their matrix (D, D), scaled: (Q, sets, H, D / H)."""
    rows = weights.ln_q(torch.stack(weights.queries, dim=1))  # (Q, sets, D)
    rows = rows + weights.pos_embed.to(rows.dtype)[:, None]
    rows = F.linear(rows, matrix, weights.attn.in_proj_bias.chunk(3)[0])
    rows = rows.unflatten(-1, (weights.attn.num_heads, -1))
    return rows * rows.shape[-1] ** -0.5


def _position_keys(weights: HiwinWeights, matrix: torch.Tensor) -> dict[int, torch.Tensor]:
    """Scale -> positions plus the scale's embedding through the key matrix (D, D): (Q, D).

    The key bias is left out: it adds the same to all scores of a query.
    """
    table = weights.pos_embed @ matrix.T
    return {scale: table + weights.scale_embedding(scale)[0] @ matrix.T for scale in weights.scales}


def _places(weights: HiwinWeights, tables: dict[int, torch.Tensor], grid: Grid) -> torch.Tensor:
    """What position and scale add to the projected keys of a view: (Q, scales * bins, D)."""
    places = []
    for scale, table in tables.items():
        size = (grid[0] * scale, grid[1] * scale)
        round_to = weights.proj.dtype if weights.round_boxes else None
        places.append(pool_table(table, size, weights.grid_size, round_to))
    return torch.cat(places, dim=1)


def _pooled_cells(
    weights: HiwinWeights,
    matrices: dict[int, ScaleMatrices],
    features: torch.Tensor,
    pixel_values: torch.Tensor | None,
    grid: Grid,
) -> list[torch.Tensor]:
    """Cells of equal views in their windows, divided by their deviations.

    Large maps live only for the few views whose turn it is, unless gradients need them.

    Args:
        weights: of the projector.
        matrices: of each scale.
        features: (n, rows * columns, C).
        pixel_values: (n, rows * columns, 3 * p * p).
        grid: (rows, columns).

    Returns:
        For each scale (Q, n, bins, C + EXTRA).
    """
    step = weights.views_at_once(features, grid)
    found: list[list[torch.Tensor]] = [[] for _ in matrices]
    views = features.split(step)
    guides = [None] * len(views) if pixel_values is None else pixel_values.split(step)
    for part, pixels in zip(views, guides, strict=True):
        maps = weights.feature_maps(part, pixels, grid)
        for pieces, (scale, matrix) in zip(found, matrices.items(), strict=True):
            pieces.append(_pool(weights, matrix, maps.pop(scale)))
    return [torch.cat(pieces, dim=1) for pieces in found]


def _pool(weights: HiwinWeights, matrices: ScaleMatrices, maps: torch.Tensor) -> torch.Tensor:
    """(n, h, w, C) to (Q, n, bins, C + EXTRA)."""
    side, round_to = weights.grid_size, maps.dtype if weights.round_boxes else None
    inverse = matrices.inverse_deviation(maps).to(maps.dtype)[..., None]
    cells = pool_windows(maps * inverse, side, round_to)
    biases = pool_windows(inverse, side, round_to)
    # One inside the map; windows of small maps reach beyond it, where RoIAlign reads zeros.
    inside = pool_windows(maps.new_ones(1, *maps.shape[1:3], 1), side, round_to)
    parts = [cells, biases, inside.expand_as(biases)]
    return F.pad(torch.cat(parts, dim=-1), (0, EXTRA - 2))


def _attend(
    query: torch.Tensor,
    place: torch.Tensor,
    cells: list[torch.Tensor],
    matrices: list[ScaleMatrices],
) -> torch.Tensor:
    """All query sets over the windows of equal views.

    Args:
        query: (Q, sets, H, D / H).
        place: (Q, scales * bins, D).
        cells: for each scale (Q, n, bins, C + EXTRA).
        matrices: of each scale.

    Returns:
        (n, Q, sets, D), before the value bias and the output projection.
    """
    keys, values = [each.key for each in matrices], [each.value for each in matrices]
    count, wide = cells[0].shape[1], cells[0].shape[-1]
    # The averages are larger than the result: some windows at a time, and where gradients are
    # needed made again instead of kept.
    each = count * query.shape[1] * query.shape[2] * wide * len(cells)
    step = max((CPU_MIXED if query.device.type == "cpu" else GPU_MIXED) // each, 1)
    outputs = []
    parts = zip(*(each.split(step) for each in (query, place, *cells)), strict=True)
    for query_part, place_part, *cell_parts in parts:
        arguments = (query_part, place_part, cell_parts, keys, values)
        if torch.is_grad_enabled():
            output = checkpoint(
                _attend_windows, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            output = _attend_windows(*arguments)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _attend_windows(
    query: torch.Tensor,
    place: torch.Tensor,
    cells: list[torch.Tensor],
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """`_attend` for w windows: (n, w, sets, D)."""
    windows, sets, heads, _ = query.shape
    count, bins = cells[0].shape[1:3]
    per_head = query.permute(2, 0, 1, 3).flatten(1, 2)  # (H, w * sets, d)
    scores = []
    for cell, key in zip(cells, keys, strict=True):
        absorbed = (per_head @ key).unflatten(1, (windows, sets))  # (H, w, sets, C')
        absorbed = absorbed.permute(1, 2, 0, 3).flatten(1, 2)  # (w, sets * H, C')
        score = absorbed @ cell.flatten(1, 2).transpose(1, 2)  # (w, sets * H, n * bins)
        scores.append(score.unflatten(2, (count, bins)).transpose(1, 2))
    where = place.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # (w, H, d, scales * bins)
    fixed = (query.transpose(1, 2) @ where).transpose(1, 2)  # (w, sets, H, scales * bins)
    total = torch.cat(scores, dim=-1) + fixed.flatten(1, 2)[:, None]  # (w, n, sets * H, ...)
    shares = total.softmax(-1, dtype=torch.float32).to(cells[0].dtype)
    output = None
    for share, cell, value in zip(shares.split(bins, dim=-1), cells, values, strict=True):
        mixed = share @ cell  # (w, n, sets * H, C')
        mixed = mixed.reshape(-1, heads, mixed.shape[-1]).transpose(0, 1)  # (H, w * n * sets, C')
        output = mixed @ value if output is None else torch.baddbmm(output, mixed, value)
    assert output is not None
    return output.transpose(0, 1).reshape(windows, count, sets, -1).transpose(0, 1)


def _tokens(weights: HiwinWeights, attended: torch.Tensor) -> torch.Tensor:
    """(V, Q, sets, D) as `_attend` gives them to tokens (V, Q, D)."""
    attention = weights.attn
    attended = attended + attention.in_proj_bias.chunk(3)[2]
    attended = weights.ln_proj(attention.out_proj(attended))
    # The sets lie side by side already: the product with `cat_proj` is the sum of theirs.
    joined = weights.cat_proj(attended.flatten(-2))
    return weights.ln_post(joined) @ weights.proj
