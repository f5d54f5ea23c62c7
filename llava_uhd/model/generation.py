"""Small helpers around the library's generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

# Fields that only mean something when sampling; the library refuses to save them otherwise.
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


class VocabularyLogitsProcessors(LogitsProcessorList):
    """Logits processors that never see the image placeholder, and never let it be generated.

    The placeholder's id lies outside the tokenizer's vocabulary; processors that index scores by
    the ids of the prompt (repetition penalty and the like) would fail on it. It is shown to them
    as id 0. A language model with more rows than tokens has a score for it, which is ruled out.

    Args:
        processors: of the library.
        image_token_id: the placeholder.
    """

    def __init__(self, processors: Iterable[Any], image_token_id: int | None) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """See ``transformers.LogitsProcessorList``."""
        if self.image_token_id is not None:
            if self.image_token_id < scores.shape[-1]:
                row = torch.tensor([self.image_token_id], device=scores.device)
                scores = scores.index_fill(-1, row, -torch.inf)
            input_ids = input_ids.masked_fill(input_ids == self.image_token_id, 0)
        return super().__call__(input_ids, scores, **kwargs)


def tidy_generation_config(config: GenerationConfig) -> None:
    """Drops sampling fields of a greedy configuration, in place.

    Some published language models (Vicuna) ship ``temperature`` and ``top_p`` together with
    ``do_sample: false``; current transformers refuse to save that. Greedy stays greedy.
    """
    if config.do_sample:
        return
    for name in _SAMPLING_FIELDS:
        setattr(config, name, None)
