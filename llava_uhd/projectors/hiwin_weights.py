"""Parameters and feature maps of the Hiwin projector, whichever form computes with them."""

from __future__ import annotations

from collections.abc import Collection
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.tokens import fixed_queries
from llava_uhd.projectors.resampler import attention_heads, sincos_table
from llava_uhd.vision.upsampler import UpsamplerStack, stack_scale

Grid = tuple[int, int]

NUM_SETS = 4

# Elements of the largest feature maps that are made at a time: one view of 24x24 at scale 4 and
# width 1024 on a CPU (64 MiB in float32), 28 of them on a GPU (512 MiB in bfloat16).
CPU_ELEMENTS, GPU_ELEMENTS = 2**24, 2**28

# A map of fewer cells along an axis cannot be padded by reflection when it is doubled.
MIN_SIDE = 2


class AttentionWeights(nn.Module):
    """Parameters of a multi-head attention, in the order query, key, value.

    Args:
        width: channels of queries, keys, values and output.
        num_heads: attention heads; divides ``width``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def reset_weights(self) -> None:
        """Xavier input projections, as in the published module."""
        init.xavier_uniform_(self.in_proj_weight)
        init.zeros_(self.in_proj_bias)


def whole_images(pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Puts packed patches together again.

    Args:
        pixel_values: (n, rows * columns, 3 * p * p), patches channel-first.
        grid: (rows, columns).

    Returns:
        (n, 3, rows * p, columns * p).
    """
    side = isqrt(pixel_values.shape[-1] // 3)
    tiles = pixel_values.unflatten(1, grid).unflatten(-1, (3, side, side))
    tiles = tiles.permute(0, 3, 1, 4, 2, 5)  # (n, 3, rows, p, columns, p)
    return tiles.flatten(4, 5).flatten(2, 3)


class HiwinWeights(nn.Module):
    """Parameters under their published names, and the maps that both forms read.

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
        self.scales = tuple(options.scales)
        self.round_boxes = options.round_boxes
        self.initializer_range = options.initializer_range
        eps = options.layer_norm_eps
        self.pos_embed = nn.Parameter(torch.empty(num_queries, width))
        for index in range(NUM_SETS):
            self.register_parameter(
                f"query_{index + 1}", nn.Parameter(torch.empty(num_queries, width))
            )
        for scale in self.scales:
            self.register_parameter(
                f"feature_{scale}x_embedding", nn.Parameter(torch.empty(1, 1, width))
            )
            self.add_module(f"features_{scale}x_projector", nn.Linear(kv_width, width))
        self.attn = AttentionWeights(width, num_heads)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.ln_proj = nn.LayerNorm(width, eps=eps)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.cat_proj = nn.Linear(NUM_SETS * width, width)
        self.proj = nn.Parameter(torch.empty(width, width))
        stack = stack_scale(self.scales)
        if stack is not None:
            self.upsampler = UpsamplerStack(kv_width, stack)

    def reset_weights(self) -> None:
        """Published initial values, up to ``projector.initializer_range``."""
        width = self.proj.shape[0]
        init.copy_(self.pos_embed, sincos_table(self.grid_size, width))
        for query in self.queries:
            init.trunc_normal_(query, std=0.02)
        linears = [self.cat_proj, self.attn.out_proj]
        for scale in self.scales:
            init.zeros_(self.scale_embedding(scale))
            linears.append(self.scale_projector(scale))
        for linear in linears:
            init.trunc_normal_(linear.weight, std=self.initializer_range)
            init.zeros_(linear.bias)
        init.normal_(self.proj, std=width**-0.5)

    @property
    def queries(self) -> list[torch.Tensor]:
        """The four query sets, (Q, D) each."""
        return [self.get_parameter(f"query_{index + 1}") for index in range(NUM_SETS)]

    def scale_embedding(self, scale: int) -> nn.Parameter:
        """(1, 1, D), added to the keys of one scale."""
        return self.get_parameter(f"feature_{scale}x_embedding")

    def scale_projector(self, scale: int) -> nn.Linear:
        """From the tower's width to D."""
        module = self.get_submodule(f"features_{scale}x_projector")
        assert isinstance(module, nn.Linear)
        return module

    def views_at_once(self, features: torch.Tensor, grid: Grid) -> int:
        """How many views of one grid the upsampler takes together, at least one.

        On a CPU few, so that their large maps stay small; a GPU likes many in one launch.
        """
        limit = CPU_ELEMENTS if features.device.type == "cpu" else GPU_ELEMENTS
        each = grid[0] * grid[1] * max(self.scales) ** 2 * features.shape[-1]
        return max(limit // each, 1)

    def feature_maps(
        self, features: torch.Tensor, pixel_values: torch.Tensor | None, grid: Grid
    ) -> dict[int, torch.Tensor]:
        """Maps of equal views at every scale in use.

        Args:
            features: (n, rows * columns, C) of the tower.
            pixel_values: (n, rows * columns, 3 * p * p) packed patches; read only if there is an
                upsampler.
            grid: (rows, columns).

        Returns:
            scale -> (n, scale * rows, scale * columns, C), ascending.

        Raises:
            ValueError: there is an upsampler and no pixels.
        """
        maps = {1: features.unflatten(1, grid)}
        above = [scale for scale in self.scales if scale > 1]
        if above:
            if pixel_values is None:
                raise ValueError("a projector with an upsampler needs pixel_values")
            maps |= self._upsample(maps[1], whole_images(pixel_values, grid), above)
        return {scale: maps[scale] for scale in self.scales}

    def _upsample(
        self, source: torch.Tensor, guidance: torch.Tensor, wanted: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """(n, rows, columns, C) and (n, 3, H, W) to the wanted scales, channels last."""
        rows, columns = source.shape[1:3]
        height, width = guidance.shape[2] // rows, guidance.shape[3] // columns
        down, right = max(MIN_SIDE - rows, 0), max(MIN_SIDE - columns, 0)
        source = source.permute(0, 3, 1, 2)
        if down or right:  # the last row or column goes on, and is cut off again below
            source = F.pad(source, (0, right, 0, down), mode="replicate")
            guidance = F.pad(guidance, (0, right * width, 0, down * height), mode="replicate")
        maps = self.upsampler.forward(source, guidance, wanted)  # without hooks, see `call`
        return {
            scale: maps[scale].permute(0, 2, 3, 1)[:, : scale * rows, : scale * columns]
            for scale in wanted
        }
