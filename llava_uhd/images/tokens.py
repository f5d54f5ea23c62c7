"""How many language-model tokens a projector makes of a view: one pure rule per projector.

The processor reserves as many placeholders and the model checks that as many features arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isqrt

from llava_uhd.config.model import ProjectorConfig
from llava_uhd.errors import UserError
from llava_uhd.registry import Registry

TokenRule = Callable[[ProjectorConfig, int, int], int]

TOKEN_RULES: Registry[TokenRule] = Registry("projector")


def fixed_queries(config: ProjectorConfig, rows: int, columns: int) -> int:
    """A resampler: ``num_queries`` tokens whatever the view's grid.

    Raises:
        UserError: ``num_queries`` is not a positive square.
    """
    side = isqrt(max(config.num_queries, 0))
    if side < 1 or side * side != config.num_queries:
        raise UserError(
            f"projector.num_queries must be a square number (64, 144, 256, ...), "
            f"got {config.num_queries}"
        )
    return config.num_queries


def one_per_patch(config: ProjectorConfig, rows: int, columns: int) -> int:
    """A projector that keeps every patch."""
    return rows * columns


TOKEN_RULES.add("hiwin", fixed_queries)
TOKEN_RULES.add("spatial_resampler", fixed_queries)
TOKEN_RULES.add("mlp2x_gelu", one_per_patch)


def view_token_counts(config: ProjectorConfig, grids: Iterable[tuple[int, int]]) -> list[int]:
    """Tokens of each view.

    Args:
        config: of the projector.
        grids: (rows, columns) of the views.
    """
    rule = TOKEN_RULES.get(config.type)
    return [rule(config, rows, columns) for rows, columns in grids]
