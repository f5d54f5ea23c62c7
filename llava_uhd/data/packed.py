"""Rows of a plan as a data loader reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, Sampler

from llava_uhd.data.dataset import BrokenSample, ConversationDataset
from llava_uhd.data.packing import Packing


class PackedSampler(Sampler[tuple[int, ...]]):
    """Goes through the rows of each epoch's plan; a row is the indices of its samples.

    Args:
        packing: of the run.
        on_epoch: called with each new epoch.
    """

    def __init__(self, packing: Packing, on_epoch: Callable[[int], None] | None = None) -> None:
        self.packing = packing
        self.on_epoch = on_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = epoch
        if self.on_epoch is not None:
            self.on_epoch(epoch)

    def __len__(self) -> int:
        return self.packing.num_rows

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for row in self.packing.plan(self.epoch).rows():
            yield tuple(row)


class PackedSamples(Dataset[list[dict[str, Any] | BrokenSample]]):
    """A data set whose items are rows: it is asked for all samples of a row at once.

    The rows are in the questions, not in the data set, so that workers that outlive an epoch know
    those of the next one.

    Args:
        samples: single ones.
        packing: of the run.
    """

    def __init__(self, samples: ConversationDataset, packing: Packing) -> None:
        self.samples = samples
        self.packing = packing

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Sequence[int]) -> list[dict[str, Any] | BrokenSample]:
        """The samples of a row, which may be none."""
        return [self.samples[index] for index in row]

    def sampler(self) -> PackedSampler:
        """The order of the rows; it tells the samples which epoch begins."""
        return PackedSampler(self.packing, self.samples.set_epoch)

    @property
    def counts(self) -> dict[str, int]:
        """See `ConversationDataset.counts`."""
        return self.samples.counts
