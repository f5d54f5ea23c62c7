"""Projectors: patch features of the tower to tokens of the language model."""

from torch import nn

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.projectors import hiwin as hiwin
from llava_uhd.projectors import mlp as mlp
from llava_uhd.projectors import resampler as resampler
from llava_uhd.projectors.registry import PROJECTORS

__all__ = ["PROJECTORS", "build_projector"]


def build_projector(config: LlavaUHDConfig) -> nn.Module:
    """Builds the projector that ``config.projector.type`` names.

    Raises:
        UserError: unknown projector.
    """
    return PROJECTORS.get(config.projector.type)(config)
