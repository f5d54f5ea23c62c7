"""Projectors that treat every patch, or every square of patches, alike.

Source: LLaVA and LLaVA-1.5 (arXiv 2310.03744; published as ``linear``, ``mlpNx_gelu``,
``identity``), and the pixel-unshuffle MLP of later systems, which needs a quarter or a sixteenth of
their tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.tokens import MLP_DEPTHS
from llava_uhd.projectors.registry import PROJECTORS


def mlp_layers(width_in: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers with exact GELUs between them."""
    layers: list[nn.Module] = [nn.Linear(width_in, width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


class MLPProjector(nn.Module):
    """One token for every patch.

    Args:
        config: of the model; reads the tower's width and the language model's.
        depth: linear layers.
    """

    def __init__(self, config: LlavaUHDConfig, depth: int) -> None:
        super().__init__()
        self.layers = mlp_layers(config.vision_config.hidden_size, config.hidden_size, depth)

    def forward(
        self,
        features: torch.Tensor,
        view_grids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Projects all views in one call.

        Args:
            features: (P, C) patch features of all views, one after another.
            view_grids: (V, 2) integer (rows, columns).
            pixel_values: unused.

        Returns:
            (P, D).
        """
        projected: torch.Tensor = self.layers(features)
        return projected


PROJECTORS.add("linear", partial(MLPProjector, depth=1))
for _depth in MLP_DEPTHS:
    PROJECTORS.add(f"mlp{_depth}x_gelu", partial(MLPProjector, depth=_depth))


@PROJECTORS.register("identity")
class IdentityProjector(nn.Module):
    """The features as they are: tower and language model have one width.

    Args:
        config: of the model.

    Raises:
        UserError: the widths differ.
    """

    def __init__(self, config: LlavaUHDConfig) -> None:
        super().__init__()
        tower, width = config.vision_config.hidden_size, config.hidden_size
        if tower != width:
            raise UserError(
                f"projector.type 'identity' needs a tower as wide as the language model, got "
                f"{tower} and {width}: choose 'linear'"
            )

    def forward(
        self,
        features: torch.Tensor,
        view_grids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns ``features`` (P, C)."""
        return features


@PROJECTORS.register("pixel_unshuffle_mlp")
class PixelUnshuffleMLP(nn.Module):
    """One token for every square of ``projector.unshuffle`` x ``projector.unshuffle`` patches.

    The features of a square are joined (row by row, missing ones at the border zero), normalised
    and projected by two linear layers.

    Args:
        config: of the model; reads ``projector``, the tower's width and the language model's.
    """

    def __init__(self, config: LlavaUHDConfig) -> None:
        super().__init__()
        self.side = config.projector.unshuffle
        joined = config.vision_config.hidden_size * self.side**2
        self.norm = nn.LayerNorm(joined, eps=config.projector.layer_norm_eps)
        self.layers = mlp_layers(joined, config.hidden_size, 2)

    def forward(
        self,
        features: torch.Tensor,
        view_grids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Projects all views in one call.

        Args:
            features: (P, C) patch features of all views, one after another.
            view_grids: (V, 2) integer (rows, columns).
            pixel_values: unused.

        Returns:
            (N, D): tokens of each view row by row.
        """
        grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
        views = features.split([rows * columns for rows, columns in grids])
        joined = [self._join(view, *grid) for view, grid in zip(views, grids, strict=True)]
        projected: torch.Tensor = self.layers(self.norm(torch.cat(joined)))
        return projected

    def _join(self, view: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """(rows * columns, C) to (squares, side * side * C)."""
        side = self.side
        padding = (0, 0, 0, -columns % side, 0, -rows % side)
        padded = nn.functional.pad(view.unflatten(0, (rows, columns)), padding)
        squares = padded.unflatten(1, (-1, side)).unflatten(0, (-1, side))  # (r, s, c, s, C)
        return squares.transpose(1, 2).flatten(0, 1).flatten(1)
