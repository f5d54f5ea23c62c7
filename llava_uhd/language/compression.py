"""Visual context compression between two decoder layers, for any batch.

Source: LLaVolta (arXiv 2406.20092). The published code assumes one image of 576 tokens in every row
and no padding at the left. Here a table says for every position which new one it becomes; rows of
any make-up, any number of runs and both sides of padding follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_uhd.config.model import CompressionConfig
from llava_uhd.language.compressors import compressor_of
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
        scores: (B, T) attention of one token in each row, for methods that need it. None: only the
            numbers of kept tokens are right, as a step behind a cache needs them.
        training: methods that draw do so anew; else the draw of a run depends on nothing but its
            number in the row, so that answers can be repeated.

    Returns:
        Padding is moved to the side where it was.
    """
    held, runs = valid.cpu(), runs.cpu().long()
    row, number = runs[..., 1].nonzero(as_tuple=True)  # (N,) each, in reading order
    start, sizes, columns = runs[row, number].unbind(-1)
    first = row * held.shape[1] + start
    inside = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    places = first.repeat_interleave(sizes) + inside
    lengths = sizes.tolist()
    groups, counts = _groups(
        config,
        [Run(*each) for each in zip(lengths, columns.tolist(), strict=True)],
        number.tolist(),
        None if scores is None else scores.flatten()[places.to(scores.device)].split(lengths),
        training,
    )
    # Text takes one new place; the first token of a run takes those of all of it.
    taken = held.long().flatten()
    taken[places] = 0
    taken[first] = counts
    taken = taken.view_as(held)
    before = taken.cumsum(1) - taken
    table = torch.where(held, before, -1).flatten()
    base = before.flatten()[first].repeat_interleave(sizes)
    table[places] = torch.where(groups >= 0, groups + base, -1)
    visual = torch.zeros(held.numel(), dtype=torch.bool)
    visual[places] = ((sizes > 1) & (config.stride > 1)).repeat_interleave(sizes)
    return _aligned(table.view_as(held), visual.view_as(held), taken.sum(1), held, valid.device)


def _groups(
    config: CompressionConfig,
    runs: list[Run],
    numbers: list[int],
    scores: Sequence[torch.Tensor] | None,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of all tokens of runs, one after another, and how many each run has: (S,), (N,)."""
    compressor, keep = compressor_of(config.method), config.remainder == "keep"
    known: dict[Any, tuple[torch.Tensor, int]] = {}
    found = []
    for index, run in enumerate(runs):
        own = None
        # Runs alike are cut alike; there may be hundreds of them, in every step of a generation.
        key: Any = run
        if compressor.draws:
            key = (run, index if training else numbers[index])
            own = _drawn(run.length, None if training else numbers[index])
        elif compressor.needs_scores and scores is not None:
            key, own = index, scores[index]
        elif compressor.needs_scores:
            own = torch.zeros(run.length)
        if key not in known:
            # A single token is a newline, or all that a view has.
            alone = torch.zeros(1, dtype=torch.long)
            made = alone if run.length == 1 else compressor.groups(run, config.stride, keep, own)
            known[key] = made, int(made.max()) + 1
        found.append(known[key])
    if not found:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return torch.cat([groups for groups, _ in found]), torch.tensor([count for _, count in found])


def _aligned(
    table: torch.Tensor,
    visual: torch.Tensor,
    totals: torch.Tensor,
    held: torch.Tensor,
    device: torch.device,
) -> IndexMap:
    """Rows of different lengths (B,) side by side, with padding where it was."""
    longest = int(totals.max())
    at_left = bool((~held[:, 0]).any())
    places, sizes = torch.arange(longest)[None], totals[:, None]
    mask = places < sizes
    if at_left:
        table = torch.where(table >= 0, table + longest - sizes, -1)
        mask = places >= longest - sizes
    return IndexMap(table.to(device), visual.to(device), mask.to(device))
