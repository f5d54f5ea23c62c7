"""What a sample costs in training, so that devices get like shares: an estimate, from shapes.

Passes count as in `llava_uhd.images.cost`: a part that learns costs three forward passes, one that
only passes gradients on two, one at rest one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedConfig

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.cost import language_shape, tower_flops
from llava_uhd.images.cost_projectors import PROJECTOR_COSTS, Convention
from llava_uhd.images.geometry import Size

logger = logging.getLogger(__name__)


class VisionCost:
    """Operations of a forward pass of tower and projector.

    Args:
        config: of the model.
    """

    def __init__(self, config: LlavaUHDConfig) -> None:
        self.config = config
        self._of = lru_cache(maxsize=4096)(self._count)

    def __call__(self, grids: tuple[Size, ...]) -> tuple[float, float]:
        """Tower and projector, for the views of one image or video.

        Args:
            grids: (rows, columns) of patches of each view.
        """
        return self._of(grids)

    def _count(self, grids: tuple[Size, ...]) -> tuple[float, float]:
        projector = PROJECTOR_COSTS.get(self.config.projector.type)
        return (
            float(tower_flops(self.config, grids)),
            float(projector.flops(self.config, list(grids), Convention())),
        )


@dataclass(frozen=True)
class TrainingCost:
    """Operations of a training pass.

    Attributes:
        linear: of the language model for each token, forward.
        square: of it for each pair of tokens of a sample, forward.
        tower: passes through the vision tower.
        projector: passes through the projector.
        language: passes through the language model.
    """

    linear: float
    square: float
    tower: int = 1
    projector: int = 3
    language: int = 3

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        learn: Collection[str],
        adapters: bool = False,
        recomputes: bool = False,
    ) -> TrainingCost:
        """Of a stage.

        Args:
            config: of the language model.
            learn: parts that learn, see `llava_uhd.config.training.PARTS`.
            adapters: the language model learns through adapters.
            recomputes: gradient checkpointing: another forward pass of the language model.
        """
        tower = 3 if "vision_tower" in learn else 1
        makes_tokens = {"projector", "upsampler", "upsampler_fixup"} & set(learn)
        projector = 3 if makes_tokens else min(tower, 2)
        language = 3 if "language_model" in learn and not adapters else 2
        passes = (tower, projector, language + recomputes)
        try:
            shape = language_shape(config)
        except UserError:
            # Experts, say: devices are balanced as if the decoder were an ordinary one.
            width, layers = int(config.hidden_size), int(config.num_hidden_layers)
            logger.info("rows are balanced by an approximate cost: %s", config.model_type)
            return cls(24.0 * layers * width**2, 2.0 * layers * width, *passes)
        square = 2.0 * shape.layers * shape.heads * shape.head_width
        return cls(2.0 * shape.body_weights, square, *passes)

    def __call__(self, tokens: np.ndarray, tower: np.ndarray, projector: np.ndarray) -> np.ndarray:
        """(N,) float64 of samples.

        Args:
            tokens: (N,) of the samples.
            tower: (N,) operations of a forward pass through the tower.
            projector: (N,) the same for the projector.
        """
        length = tokens.astype(np.float64)
        language = self.linear * length + self.square * length**2
        return self.language * language + self.tower * tower + self.projector * projector
