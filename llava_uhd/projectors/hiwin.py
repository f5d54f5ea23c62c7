"""The Hiwin projector of LLaVA-UHD v2 (published as ``adapt_spatial_resampler_v2``).

A fixed grid of windows over feature maps of several resolutions, made by a learned upsampler
under the guidance of the image. In each window the query of each of four sets attends to the
window's pooled cells at all scales; the four answers are joined into one token.
"""

from __future__ import annotations

import torch

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.projectors.hiwin_fast import fast_tokens
from llava_uhd.projectors.hiwin_plain import plain_tokens
from llava_uhd.projectors.hiwin_weights import HiwinWeights
from llava_uhd.projectors.registry import PROJECTORS

FORMS = {"fast": fast_tokens, "plain": plain_tokens}


@PROJECTORS.register("hiwin")
class HiwinProjector(HiwinWeights):
    """``num_queries`` tokens for every view, whatever its shape.

    Both values of ``projector.form`` compute the same numbers of the same parameters: "fast" is
    `llava_uhd.projectors.hiwin_fast`, "plain" is `llava_uhd.projectors.hiwin_plain`.

    Args:
        config: of the model; reads ``projector``, the tower's width and the language model's.

    Raises:
        UserError: ``num_queries`` is not a square, or the width does not fit the heads or the
            position table.
    """

    def __init__(self, config: LlavaUHDConfig) -> None:
        super().__init__(config)
        self.form = config.projector.form

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
            pixel_values: (P, 3 * p * p) packed normalised patches, the upsampler's guidance;
                needed unless the tower's own map is the only scale.

        Returns:
            (V * num_queries, D): tokens of each view in row order of the query grid.
        """
        grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
        features = features.to(self.proj.dtype)
        return FORMS[self.form](self, features, pixel_values, grids)
