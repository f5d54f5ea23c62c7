"""From views to the visual tokens of the sequence: the part of the model before the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.maps import Newline, TokenMap, uses_maps, whole_map
from llava_uhd.images.tokens import view_token_shapes
from llava_uhd.language.runs import place_runs
from llava_uhd.model.packing import merge_views, placeholder_mask
from llava_uhd.model.visual_runs import runs_of_maps, runs_of_views
from llava_uhd.vision.towers import VisionTower


class VisualTokens:
    """What the model knows about visual tokens: their values, and where they stand.

    A mixin of `llava_uhd.model.modeling.LlavaUHDForConditionalGeneration`, which holds the modules.
    """

    config: LlavaUHDConfig
    training: bool
    device: Any
    vision_tower: VisionTower
    projector: nn.Module
    image_newline: nn.Parameter | None

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        view_grids: torch.Tensor,
        token_maps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encodes and projects packed views.

        Args:
            pixel_values: (P, 3 * p * p) packed patches.
            view_grids: (V, 2) integer (rows, columns).
            token_maps: (M, 10) integer, how the views' tokens become those of the sequence (the
                fields of `llava_uhd.images.maps.TokenMap`): needed where they are joined, pooled
                or have learned newlines.

        Returns:
            (N, D) tokens of all images and videos, in the order of the sequence.

        Raises:
            ValueError: ``token_maps`` are missing, or belong to other views.
        """
        features = self.vision_tower(pixel_values, view_grids)  # (P, C)
        tokens = self.projector(features, view_grids, pixel_values)
        if not uses_maps(self.config.image, self.config.video):
            return tokens
        if token_maps is None:
            raise ValueError(
                f"image.layout '{self.config.image.layout}' needs token_maps: pass all the "
                "processor returned"
            )
        grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
        shapes = view_token_shapes(self.config.projector, grids)
        newline = self.image_newline
        merged = merge_views(tokens, shapes, token_maps, newline)
        if newline is not None and self.training:
            # Part of the graph in every step, also where no map of the batch has a newline.
            merged = merged + newline.sum() * 0.0
        return merged

    def _vision_anchor(self) -> torch.Tensor:
        """Zero, connected to every tower and projector parameter, at the cost of four patches.

        A training batch without images still runs both modules once, so that gradients exist on
        every rank and sharded ranks make the same collective calls.
        """
        patch = self.config.vision_config.patch_size
        # An upsampler needs maps of at least 2 x 2.
        pixels = torch.zeros(4, 3 * patch * patch, device=self.device)
        (shape,) = view_token_shapes(self.config.projector, [(2, 2)])
        end = Newline.END if self.image_newline is not None else Newline.NONE
        one_view, one_map = torch.tensor([[2, 2]]), torch.tensor([whole_map(shape, newline=end)])
        return self.get_image_features(pixels, one_view, one_map).sum() * 0.0

    def get_visual_runs(
        self,
        input_ids: torch.Tensor,
        view_grids: torch.Tensor | None,
        token_maps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where the visual tokens of each view stand: the units of compression.

        Args:
            input_ids: (B, T) with placeholders.
            view_grids: (V, 2) of the whole batch.
            token_maps: see `get_image_features`.

        Returns:
            int64 (B, R, 3) on the CPU: (start, length, columns), filled up with zeros.

        Raises:
            ValueError: no views, or others than the placeholders are for.
        """
        if view_grids is None:
            raise ValueError("compression needs view_grids: pass all the processor returned")
        if token_maps is not None and uses_maps(self.config.image, self.config.video):
            maps = [TokenMap(*row) for row in token_maps.tolist()]
            runs = runs_of_maps(maps, separated=self.config.image.layout == "rows")
        else:
            grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
            runs = runs_of_views(view_token_shapes(self.config.projector, grids))
        return place_runs(placeholder_mask(input_ids, self.config.image.image_token_id), runs)
