"""Vision towers over packed views of any mix of sizes.

A tower is built from its transformers configuration and the library's encoder layers; only the
embedding (positions per view shape) and the packing are ours. Adding a tower is one `TowerSpec`
registered under its ``model_type``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry
from llava_uhd.vision.attention import PACKED_VIEWS, ViewGroups
from llava_uhd.vision.position import PositionTable


@dataclass(frozen=True)
class TowerSpec:
    """What distinguishes one family of vision transformers from another.

    Attributes:
        layer: encoder layer class of transformers, built from the configuration.
        class_token: a learned token stands before the patches of each view.
        pre_norm: a norm follows the embedding (its published name is ``pre_layrnorm``).
        patch_bias: the patch embedding has a bias.
    """

    layer: Callable[[PreTrainedConfig], nn.Module]
    class_token: bool
    pre_norm: bool
    patch_bias: bool


TOWERS: Registry[TowerSpec] = Registry("vision tower")
TOWERS.add(
    "clip_vision_model",
    TowerSpec(CLIPEncoderLayer, class_token=True, pre_norm=True, patch_bias=False),
)
TOWERS.add(
    "siglip_vision_model",
    TowerSpec(SiglipEncoderLayer, class_token=False, pre_norm=False, patch_bias=True),
)


def num_built_layers(num_layers: int, select_layer: int) -> int:
    """Layers needed for hidden state ``select_layer`` of a tower (index 0 is the embedding).

    Example: 24 layers and -2 need 23.

    Raises:
        UserError: the index is outside the tower.
    """
    count = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= count <= num_layers:
        raise UserError(
            f"select_layer {select_layer} is outside a tower of {num_layers} layers: "
            f"use {-num_layers - 1} to {num_layers}"
        )
    return count


class PatchEmbedding(nn.Module):
    """The strided patch convolution, as the matrix product it is on packed patches."""

    def __init__(self, config: PreTrainedConfig, bias: bool) -> None:
        super().__init__()
        side, width = config.patch_size, config.hidden_size
        self.weight = nn.Parameter(torch.empty(width, config.num_channels, side, side))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def reset_weights(self) -> None:
        """Normal weights, zero bias."""
        init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(P, 3 * p * p) to (P, C)."""
        return nn.functional.linear(pixel_values, self.weight.flatten(1), self.bias)


class ViewEmbeddings(nn.Module):
    """Patches, class tokens and positions of packed views."""

    def __init__(self, config: PreTrainedConfig, spec: TowerSpec) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(width)) if spec.class_token else None
        self.patch_embedding = PatchEmbedding(config, spec.patch_bias)
        self.position_embedding = PositionTable(int(spec.class_token), num_patches, width)

    def reset_weights(self) -> None:
        """Class token scaled as in CLIP."""
        if self.class_embedding is not None:
            init.normal_(self.class_embedding, std=self.class_embedding.shape[0] ** -0.5)

    def forward(
        self, pixel_values: torch.Tensor, grids: list[tuple[int, int]], order: list[int]
    ) -> torch.Tensor:
        """Embeds the views in the given order.

        Args:
            pixel_values: (P, 3 * p * p), views in their own order.
            grids: (rows, columns) of each view.
            order: which view comes first, second, ... in the result.

        Returns:
            (N, C): for each view its class token, if any, then its patches.
        """
        patches = self.patch_embedding(pixel_values)  # (P, C)
        views = patches.split([rows * columns for rows, columns in grids])
        pieces: list[torch.Tensor] = []
        for index in order:
            if self.class_embedding is not None:
                pieces.append(self.class_embedding.unsqueeze(0))
            pieces.append(views[index])
        return torch.cat(pieces) + self.position_embedding([grids[index] for index in order])


class VisionTower(nn.Module):
    """A vision transformer cut after the layer whose output is used.

    Args:
        config: transformers configuration of the whole tower.
        select_layer: hidden state that is returned; the layers behind it are not built.
        backend: attention backend of `ViewGroups`.

    Raises:
        UserError: unknown tower, or ``select_layer`` outside it.
    """

    def __init__(
        self, config: PreTrainedConfig, select_layer: int = -2, backend: str = "grouped"
    ) -> None:
        super().__init__()
        spec = TOWERS.get(config.model_type)
        # The layers read the attention backend from the configuration they were built with; a copy
        # keeps the model's own configuration (and any later change to it) out of this.
        config = copy.deepcopy(config)
        config._attn_implementation = PACKED_VIEWS
        self.config = config
        self.backend = backend
        self.num_prefix = int(spec.class_token)
        self.embeddings = ViewEmbeddings(config, spec)
        self.pre_layrnorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if spec.pre_norm
            else nn.Identity()
        )
        depth = num_built_layers(config.num_hidden_layers, select_layer)
        self.layers = nn.ModuleList([spec.layer(config) for _ in range(depth)])

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.embeddings.patch_embedding.weight.dtype

    @property
    def trainable(self) -> bool:
        """Whether any parameter learns."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, pixel_values: torch.Tensor, view_grids: torch.Tensor) -> torch.Tensor:
        """Encodes all views in one pass; a view's features do not depend on the others.

        Args:
            pixel_values: (P, 3 * p * p) packed patches, any float dtype.
            view_grids: (V, 2) integer (rows, columns) of each view.

        Returns:
            (P, C) features of the patches, in the order given, in the parameters' dtype.

        Raises:
            ValueError: the grids do not add up to the patches.
        """
        grids = [(int(rows), int(columns)) for rows, columns in view_grids.tolist()]
        sizes = [rows * columns for rows, columns in grids]
        if sum(sizes) != pixel_values.shape[0]:
            raise ValueError(
                f"view_grids describe {sum(sizes)} patches in {len(grids)} views, "
                f"pixel_values has {pixel_values.shape[0]}"
            )
        # Without a learning parameter there is nothing to keep for the backward pass.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self._encode(pixel_values.to(self.dtype), grids, sizes)

    def _encode(
        self, pixel_values: torch.Tensor, grids: list[tuple[int, int]], sizes: list[int]
    ) -> torch.Tensor:
        order = sorted(range(len(grids)), key=lambda index: sizes[index])
        hidden = self.embeddings(pixel_values, grids, order)  # (N, C)
        hidden = self.pre_layrnorm(hidden).unsqueeze(0)  # (1, N, C)
        groups: dict[int, int] = {}
        for index in order:
            groups[sizes[index]] = groups.get(sizes[index], 0) + 1
        layout = ViewGroups(
            tuple((count, size + self.num_prefix) for size, count in groups.items()), self.backend
        )
        for layer in self.layers:
            output = layer(hidden, attention_mask=layout)
            hidden = output[0] if isinstance(output, tuple) else output
        pieces: list[torch.Tensor] = [hidden] * len(order)
        for index, view in zip(order, hidden[0].split(layout.lengths), strict=True):
            pieces[index] = view[self.num_prefix :]
        return torch.cat(pieces)  # (P, C)
