"""Small Hiwin projectors and views for them."""

from __future__ import annotations

import torch

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.projectors import build_projector
from llava_uhd.projectors.hiwin import HiwinProjector

Grid = tuple[int, int]
HiwinInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PATCH = 4
MIXED = [(4, 6), (4, 6), (5, 3), (3, 3), (4, 6), (2, 7)]


def make_config(kv_width: int, width: int, **projector: object) -> LlavaUHDConfig:
    return LlavaUHDConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": kv_width,
            "num_attention_heads": 1,
        },
        text_config={"model_type": "llama", "hidden_size": width, "num_attention_heads": 1},
        projector={"type": "hiwin", "num_queries": 16, "num_heads": 2, **projector},
    )


def make_hiwin(kv_width: int = 8, width: int = 32, **projector: object) -> HiwinProjector:
    """A small projector whose parameters are all at random values."""
    module = build_projector(make_config(kv_width, width, **projector))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            random = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + random if name.endswith("sigma_spatial") else random)
    assert isinstance(module, HiwinProjector)
    return module.eval()


def views(grids: list[Grid], kv_width: int = 8, seed: int = 0) -> HiwinInputs:
    """Features, grids and pixels; the features share a large common part, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows * columns for rows, columns in grids)
    features = torch.randn(count, kv_width, generator=generator)
    features = features + 2 * torch.randn(kv_width, generator=generator)
    pixels = torch.randn(count, 3 * PATCH**2, generator=generator)
    return features, torch.tensor(grids), pixels
