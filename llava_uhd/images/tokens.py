"""Which map of language-model tokens a projector makes of a view: one pure rule per projector.

The processor reserves as many placeholders and the model checks that as many features arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isqrt

from llava_uhd.config.model import ProjectorConfig
from llava_uhd.errors import UserError
from llava_uhd.registry import Registry

Grid = tuple[int, int]
TokenRule = Callable[[ProjectorConfig, int, int], Grid]

TOKEN_RULES: Registry[TokenRule] = Registry("projector")

# Depths of the published name ``mlpNx_gelu`` that exist here.
MLP_DEPTHS = range(1, 9)


def fixed_queries(config: ProjectorConfig, rows: int, columns: int) -> Grid:
    """A resampler: a square map of ``num_queries`` tokens whatever the view's grid.

    Raises:
        UserError: ``num_queries`` is not a positive square.
    """
    side = isqrt(max(config.num_queries, 0))
    if side < 1 or side * side != config.num_queries:
        raise UserError(
            f"projector.num_queries must be a square number (64, 144, 256, ...), "
            f"got {config.num_queries}"
        )
    return side, side


def one_per_patch(config: ProjectorConfig, rows: int, columns: int) -> Grid:
    """A projector that keeps every patch."""
    return rows, columns


def one_per_square(config: ProjectorConfig, rows: int, columns: int) -> Grid:
    """A projector that joins squares of ``unshuffle`` x ``unshuffle`` patches.

    Squares at the right and lower border may be incomplete.

    Example: 24x27 patches and squares of 2: 12x14 tokens.
    """
    side = config.unshuffle
    return -(-rows // side), -(-columns // side)


TOKEN_RULES.add("hiwin", fixed_queries)
TOKEN_RULES.add("spatial_resampler", fixed_queries)
TOKEN_RULES.add("identity", one_per_patch)
TOKEN_RULES.add("linear", one_per_patch)
TOKEN_RULES.add("pixel_unshuffle_mlp", one_per_square)
for _depth in MLP_DEPTHS:
    TOKEN_RULES.add(f"mlp{_depth}x_gelu", one_per_patch)


def view_token_shapes(config: ProjectorConfig, grids: Iterable[Grid]) -> list[Grid]:
    """(rows, columns) of tokens of each view.

    Args:
        config: of the projector.
        grids: (rows, columns) of the views.
    """
    rule = TOKEN_RULES.get(config.type)
    return [rule(config, rows, columns) for rows, columns in grids]


def view_token_counts(config: ProjectorConfig, grids: Iterable[Grid]) -> list[int]:
    """Tokens of each view; see `view_token_shapes`."""
    return [rows * columns for rows, columns in view_token_shapes(config, grids)]
