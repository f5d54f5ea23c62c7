"""The table of projectors.

A projector is an ``nn.Module`` built from the model's configuration with
``forward(features (P, C), view_grids (V, 2), pixel_values) -> tokens (N, D)``. How many tokens a
view gets is the pure rule registered under the same name in `llava_uhd.images.tokens`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.registry import Registry

PROJECTORS: Registry[Callable[[LlavaUHDConfig], nn.Module]] = Registry("projector")
