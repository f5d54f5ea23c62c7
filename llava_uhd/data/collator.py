"""Samples to a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_uhd.data.dataset import BrokenSample
from llava_uhd.text.encoding import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Pads on the right and joins the views of the batch in row order.

    Broken samples are left out; if nothing remains, the batch is one text row without a learned
    token, so that every rank of a distributed run still takes part in the step.

    Attributes:
        pad_token_id: fills ``input_ids``; its positions are masked by their place, not their id,
            so the id may also occur in texts.
    """

    pad_token_id: int

    def __call__(
        self, samples: Sequence[Mapping[str, Any] | BrokenSample]
    ) -> dict[str, torch.Tensor]:
        """Makes a batch of B samples, the longest of T tokens.

        Returns:
            ``input_ids``, ``labels`` (-100: not learned) and ``attention_mask``, int64 (B, T).
            When a sample has images also ``pixel_values`` float32 (P, 3 * p * p) and
            ``view_grids`` int64 (V, 2), of all samples one after another, and ``token_maps``
            int64 (M, 10) where the model joins or pools views.
        """
        rows = [sample for sample in samples if not isinstance(sample, BrokenSample)]
        if not rows:
            return self._nothing()
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
        }
        for position, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][position, :length] = row["input_ids"]
            batch["labels"][position, :length] = row["labels"]
            batch["attention_mask"][position, :length] = 1
        for key in ("pixel_values", "view_grids", "token_maps"):
            parts = [row[key] for row in rows if row.get(key) is not None]
            if parts:
                batch[key] = torch.cat(parts)
        return batch

    def _nothing(self) -> dict[str, torch.Tensor]:
        # Two positions: labels are shifted by one, and an empty row would have no logits at all.
        ids = torch.full((1, 2), self.pad_token_id, dtype=torch.long)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORE_INDEX),
        }
