"""Samples to a batch: padded rows, or one packed row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_uhd.data.dataset import BrokenSample
from llava_uhd.text.encoding import IGNORE_INDEX

Sample = Mapping[str, Any] | BrokenSample


@dataclass(frozen=True)
class Collator:
    """Brings samples side by side and joins their views in the same order.

    Broken samples are left out; if nothing remains, the batch is one text row without a learned
    token, so that every rank of a distributed run still takes part in the step.

    Attributes:
        pad_token_id: fills ``input_ids``; its positions are masked by their place, not their id,
            so the id may also occur in texts.
        packed: all samples in one row instead of a row each.
    """

    pad_token_id: int
    packed: bool = False

    def __call__(self, samples: Sequence[Sample | Sequence[Sample]]) -> dict[str, torch.Tensor]:
        """Makes a batch.

        Args:
            samples: of the batch. Packed ones may come in lists, as a data loader brings rows.

        Returns:
            ``input_ids`` and ``labels`` (-100: not learned), int64 (B, T). Padded on the right, the
            longest of T tokens, with ``attention_mask`` int64 (B, T); or packed, (1, T), without a
            mask: ``position_ids`` int64 (1, T) begin again at 0 with each sample, which tells the
            model where one ends, and no sample's first token is learned, because nothing before it
            belongs to it.
            When a sample has images also ``pixel_values`` float32 (P, 3 * p * p) and
            ``view_grids`` int64 (V, 2), of all samples one after another, and ``token_maps``
            int64 (M, 10) where the model joins or pools views.
        """
        rows = [sample for sample in _single(samples) if not isinstance(sample, BrokenSample)]
        if not rows:
            return self._nothing()
        batch = self._pack(rows) if self.packed else self._pad(rows)
        for key in ("pixel_values", "view_grids", "token_maps"):
            parts = [row[key] for row in rows if row.get(key) is not None]
            if parts:
                batch[key] = torch.cat(parts)
        return batch

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
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
        return batch

    def _pack(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
        labels = torch.cat([row["labels"] for row in rows])[None]
        return {
            "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
            "position_ids": positions,
            "labels": labels.masked_fill(positions == 0, IGNORE_INDEX),
        }

    def _nothing(self) -> dict[str, torch.Tensor]:
        # Two positions: labels are shifted by one, and an empty row would have no logits at all.
        ids = torch.full((1, 2), self.pad_token_id, dtype=torch.long)
        places = {"position_ids": torch.arange(2)[None]}
        masks = {"attention_mask": torch.ones_like(ids)}
        labels = torch.full_like(ids, IGNORE_INDEX)
        return {"input_ids": ids, **(places if self.packed else masks), "labels": labels}


def _single(samples: Iterable[Sample | Sequence[Sample]]) -> Iterator[Sample]:
    for each in samples:
        # A broken sample is a tuple, a row of samples is a list.
        if isinstance(each, list):
            yield from each
        else:
            yield each  # type: ignore[misc]
