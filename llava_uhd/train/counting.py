"""What a batch holds, counted where it is made: on the CPU, before it is copied anywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.geometry import Size
from llava_uhd.images.maps import TokenMap, uses_maps
from llava_uhd.images.tokens import view_token_shapes
from llava_uhd.language.runs import Run, place_runs
from llava_uhd.model.packing import placeholder_mask
from llava_uhd.model.visual_runs import runs_of_maps, runs_of_views
from llava_uhd.text.encoding import IGNORE_INDEX

# Key of a batch, beside the tensors of the model.
FACTS = "facts"


@dataclass(frozen=True)
class Facts:
    """Counts of a micro-batch.

    Attributes:
        lengths: tokens of each sample, padding left out.
        slots: positions that the language model computes, padding included.
        visual: tokens that the projector makes.
        learned: tokens that are learned, hence positions with logits.
        grids: (rows, columns) of patches of each view.
        runs: of each sample the runs of its visual tokens; empty where nothing compresses.
    """

    lengths: tuple[int, ...]
    slots: int
    visual: int
    learned: int
    grids: tuple[Size, ...]
    runs: tuple[tuple[Run, ...], ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all samples: visual ones, separators and text."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Counting:
    """A collator that adds `Facts` to its batches; `StageTrainer` takes them out again.

    Attributes:
        collate: makes the batch.
        config: of the model.
        compresses: runs of visual tokens are needed too.
    """

    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]
    config: LlavaUHDConfig
    compresses: bool = False

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Makes a batch."""
        batch = self.collate(samples)
        return {**batch, FACTS: facts_of(batch, self.config, self.compresses)}


def facts_of(
    batch: Mapping[str, torch.Tensor], config: LlavaUHDConfig, compresses: bool = False
) -> Facts:
    """Counts a batch of `llava_uhd.data.collator.Collator`, padded or packed.

    Args:
        batch: ``input_ids`` (B, T), ``labels`` (B, T), ``attention_mask`` (B, T) or
            ``position_ids`` (1, T), and the views.
        config: of the model.
        compresses: find the runs of visual tokens.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    starts: list[int] = []
    if mask is not None:
        lengths = mask.sum(1).tolist()
    else:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        lengths = [stop - start for start, stop in zip(starts, [*starts[1:], ids.shape[1]])]
    visual = placeholder_mask(ids, config.image.image_token_id)
    grids = batch.get("view_grids")
    pairs = [] if grids is None else [(int(rows), int(columns)) for rows, columns in grids.tolist()]
    runs: list[list[Run]] = [[] for _ in lengths] if compresses else []
    if compresses and pairs:
        table = place_runs(visual, _runs(pairs, batch.get("token_maps"), config))
        for row, found in enumerate(table.tolist()):
            for start, length, columns in found:
                if length:
                    sample = bisect_right(starts, start) - 1 if starts else row
                    runs[sample].append(Run(length, columns))
    return Facts(
        tuple(lengths),
        ids.numel(),
        int(visual.sum()),
        int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        tuple(pairs),
        tuple(tuple(each) for each in runs),
    )


def _runs(
    grids: Sequence[Size], token_maps: torch.Tensor | None, config: LlavaUHDConfig
) -> list[Run]:
    """Runs of a batch in reading order, as the model finds them."""
    if token_maps is not None and uses_maps(config.image, config.video):
        maps = [TokenMap(*row) for row in token_maps.tolist()]
        return runs_of_maps(maps, separated=config.image.layout == "rows")
    return runs_of_views(view_token_shapes(config.projector, grids))
