"""Visual context compression between two decoder layers, for any batch.

Source: LLaVolta (arXiv 2406.20092). The published code assumes one image of 576 tokens in every row
and no padding at the left. Here a table says for every position which new one it becomes; rows of
any make-up, any number of runs and both sides of padding follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llava_uhd.config.model import CompressionConfig
from llava_uhd.language.compressors import COMPRESSORS
from llava_uhd.language.runs import Run

IGNORE_INDEX = -100


@dataclass(frozen=True)
class IndexMap:
    """Where each position of a batch goes.

    Attributes:
        new_index: int64 (B, T): new position in the row, -1 for padding and dropped tokens.
        visual: bool (B, T): tokens of runs that were shortened.
        mask: bool (B, T'): new positions that hold a token.
    """

    new_index: torch.Tensor
    visual: torch.Tensor
    mask: torch.Tensor

    @property
    def changes(self) -> bool:
        """Whether anything becomes shorter."""
        return bool(self.visual.any())

    def _flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(old, new) flat indices of all tokens that go somewhere."""
        old = (self.new_index >= 0).flatten().nonzero()[:, 0]
        width = self.mask.shape[1]
        rows = torch.arange(len(self.mask), device=self.new_index.device)[:, None] * width
        return old, (self.new_index + rows).flatten()[old]

    def states(self, hidden: torch.Tensor) -> torch.Tensor:
        """Averages the states of each group, in float32 at least, rounded once.

        Args:
            hidden: (B, T, D).

        Returns:
            (B, T', D) in the same dtype; zero at padding.
        """
        old, new = self._flat()
        exact = torch.promote_types(hidden.dtype, torch.float32)
        options: dict[str, Any] = {"device": hidden.device, "dtype": exact}
        sums = torch.zeros(self.mask.numel(), hidden.shape[-1], **options)
        sums = sums.index_add(0, new, hidden.flatten(0, 1)[old].to(exact))
        counts = torch.zeros(len(sums), **options)
        counts = counts.index_add_(0, new, torch.ones(len(new), **options)).clamp_(min=1)
        return (sums / counts[:, None]).to(hidden.dtype).unflatten(0, self.mask.shape)

    def positions(self, positions: torch.Tensor, half: bool) -> torch.Tensor:
        """Positions of the new tokens: the mean of each group's, rounded down.

        Args:
            positions: int64 (B, T).
            half: through float16, as the published code computes it: alike below 1024, then up to
                a step of its precision apart.

        Returns:
            int64 (B, T'); 0 at padding.
        """
        old, new = self._flat()
        values = positions.flatten()[old]
        size = self.mask.numel()
        counts = torch.zeros(size, dtype=torch.long, device=positions.device)
        counts = counts.index_add_(0, new, torch.ones_like(new)).clamp(min=1)
        if half:
            rounded = values.half().float()
            sums = torch.zeros(size, device=positions.device).index_add_(0, new, rounded)
            means = (sums / counts).half().long()
        else:
            sums = torch.zeros(size, dtype=torch.long, device=positions.device)
            means = sums.index_add_(0, new, values) // counts
        # Text keeps its position to the letter.
        text = ~self.visual.flatten()[old]
        means[new[text]] = values[text]
        return means.unflatten(0, self.mask.shape)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T') of labels (B, T): text keeps its own, visual tokens have none."""
        old, new = self._flat()
        text = ~self.visual.flatten()[old]
        kept = labels.new_full((self.mask.numel(),), IGNORE_INDEX)
        kept[new[text]] = labels.flatten()[old][text]
        return kept.unflatten(0, self.mask.shape)

    def carry(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """Values (B, T) that are equal inside a run, such as numbers of samples, to (B, T')."""
        old, new = self._flat()
        kept = values.new_full((self.mask.numel(),), fill)
        kept[new] = values.flatten()[old]
        return kept.unflatten(0, self.mask.shape)


def _drawn(size: int, seed: int | None) -> torch.Tensor:
    """float32 (size,) in [0, 1); with a seed always the same ones."""
    if seed is None:
        return torch.rand(size)
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def build_map(
    config: CompressionConfig,
    runs: torch.Tensor,
    valid: torch.Tensor,
    scores: torch.Tensor | None = None,
    training: bool = False,
) -> IndexMap:
    """The table of a batch.

    Args:
        config: method, stride and remainder.
        runs: int64 (B, R, 3), from `place_runs`.
        valid: bool (B, T): positions that hold a token.
        scores: (B, T) attention of one token in each row, for methods that need it.
        training: methods that draw do so anew; else the draw of a run depends on nothing but its
            number in the row, so that answers can be repeated.

    Returns:
        Padding is moved to the side where it was.
    """
    compressor, keep = COMPRESSORS.get(config.method), config.remainder == "keep"
    device = valid.device
    valid_rows, length = valid.cpu(), valid.shape[1]
    table = torch.full(valid.shape, -1, dtype=torch.long)
    visual = torch.zeros(valid.shape, dtype=torch.bool)
    totals = []
    for row, places in enumerate(runs.tolist()):
        kept, count, at = table[row], 0, 0
        for number, (start, size, columns) in enumerate((*places, (length, 0, 0))):
            if size == 0 and start != length:
                continue
            text = valid_rows[row, at:start]
            kept[at:start][text] = torch.arange(count, count + int(text.sum()))
            count += int(text.sum())
            if size:
                own = None if scores is None else scores[row, start : start + size]
                if compressor.draws:
                    own = _drawn(size, None if training else number)
                if size < config.stride and keep is False and size == 1:
                    groups = torch.zeros(1, dtype=torch.long)  # a newline
                else:
                    groups = compressor.groups(Run(size, columns), config.stride, keep, own)
                shortened = bool(size > 1 and config.stride > 1)
                kept[start : start + size] = torch.where(groups >= 0, groups + count, -1)
                visual[row, start : start + size] = shortened
                count += int(groups.max()) + 1
            at = start + size
        totals.append(count)
    longest = max(totals)
    at_left = bool((~valid_rows[:, 0]).any())
    if at_left:
        shift = torch.tensor([longest - total for total in totals])[:, None]
        table = torch.where(table >= 0, table + shift, -1)
    places_ = torch.arange(longest)[None]
    sizes = torch.tensor(totals)[:, None]
    mask = places_ >= longest - sizes if at_left else places_ < sizes
    return IndexMap(table.to(device), visual.to(device), mask.to(device))
