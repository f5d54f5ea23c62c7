"""Order of the samples: shuffled, or in batches of like length and modality as published.

Every order is a function of (seed, epoch) alone, so a resumed run continues the same one. The
length grouping is that of LLaVA 1.5, which LLaVA-UHD v1 uses for its second stage; with a generator
seeded like the global one it gives the published order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(
    indices: Sequence[int], lengths: Sequence[int], num_chunks: int
) -> list[list[int]]:
    """Shares indices out so that chunks have equal counts and nearly equal total lengths.

    Each index goes to the chunk that is shortest so far (the first of equal ones); a chunk that has
    its count is closed. Counts that do not divide are dealt in turn instead.

    Args:
        indices: in the order they are dealt, usually by falling length.
        lengths: of all samples, addressed by the indices.
        num_chunks: how many chunks.

    Example: indices ``[2, 3, 0, 1]`` of lengths ``[11, 5, 35, 30]`` in two chunks:
    ``[[2, 1], [3, 0]]``.
    """
    if len(indices) % num_chunks:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0] * num_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == size:
            totals[shortest] = float("inf")
    return chunks


def length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Shuffles, then balances the lengths inside each mega-batch.

    Args:
        lengths: of all samples.
        batch_size: samples per device and forward pass.
        world_size: devices times accumulation steps; a mega-batch is ``batch_size * world_size``.
        generator: one permutation is drawn from it.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    indices: list[int] = []
    for megabatch in _cut(order, batch_size * world_size):
        falling = sorted(megabatch, key=lambda index: lengths[index], reverse=True)
        for chunk in split_to_even_chunks(falling, lengths, world_size):
            indices += chunk
    return indices


def modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """Length grouping with image and text samples in mega-batches of their own.

    The last mega-batch of both modalities, even a full one, stands merged and in file order at the
    end (as published).

    Args:
        lengths: positive for samples with images, negative for those without.
        batch_size: samples per device and forward pass.
        world_size: devices times accumulation steps.
        generator: permutations are drawn from it: images, texts, then mega-batches.

    Raises:
        ValueError: a length of zero, whose modality is unknown.
    """
    if any(length == 0 for length in lengths):
        raise ValueError("a length of 0 has no modality: count at least 1")
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return length_grouped_indices(lengths, batch_size, world_size, generator)
    size = batch_size * world_size
    full: list[list[int]] = []
    rest: list[int] = []
    for sign in (1, -1):
        own = [index for index, length in enumerate(lengths) if length * sign > 0]
        own_lengths = [lengths[index] * sign for index in own]
        grouped = length_grouped_indices(own_lengths, batch_size, world_size, generator)
        megabatches = _cut([own[position] for position in grouped], size)
        full += megabatches[:-1]
        rest += megabatches[-1]
    order = torch.randperm(len(full), generator=generator).tolist()
    return [index for position in order for index in full[position]] + sorted(rest)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class SeededSampler(Sampler[int]):
    """A new shuffle every epoch, decided by (seed, epoch) alone.

    Args:
        num_samples: of the data set.
        seed: of the run.
        on_epoch: called with each new epoch; give the data set's ``set_epoch``, because
            data loaders do not always pass the epoch on to it.
    """

    def __init__(
        self, num_samples: int, seed: int = 0, on_epoch: Callable[[int], None] | None = None
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0
        self.on_epoch = on_epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = epoch
        if self.on_epoch is not None:
            self.on_epoch(epoch)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # The generator uses 32 bits of its seed; a large odd factor keeps epochs of neighbouring
        # seeds apart.
        generator.manual_seed((self.seed + 1_000_003 * self.epoch) % 2**32)
        yield from self._order(generator)

    def _order(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(self.num_samples, generator=generator).tolist()


class BlockSampler(SeededSampler):
    """A shuffle that keeps neighbours near each other, decided by (seed, epoch) alone.

    The blocks are shuffled; then the samples of each few of them among themselves.

    Args:
        blocks: a number for each sample: those of the same block have the same.
        seed: of the run.
        on_epoch: see `SeededSampler`.
        window: blocks whose samples are mixed.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        seed: int = 0,
        on_epoch: Callable[[int], None] | None = None,
        window: int = 4,
    ) -> None:
        super().__init__(len(blocks), seed, on_epoch)
        self.window = window
        members: dict[int, list[int]] = {}
        for index, block in enumerate(blocks):
            members.setdefault(block, []).append(index)
        self.members = list(members.values())

    def _order(self, generator: torch.Generator) -> list[int]:
        blocks = torch.randperm(len(self.members), generator=generator).tolist()
        order: list[int] = []
        for window in _cut(blocks, self.window):
            near = [index for block in window for index in self.members[block]]
            places = torch.randperm(len(near), generator=generator).tolist()
            order += [near[place] for place in places]
        return order


class ModalityLengthSampler(SeededSampler):
    """The published ``group_by_modality_length`` order, decided by (seed, epoch).

    Args:
        modality_lengths: positive with images, negative without; see `Records.modality_lengths`.
        batch_size: samples per device and forward pass.
        world_size: devices times accumulation steps.
        seed: of the run.
        on_epoch: see `SeededSampler`.
    """

    def __init__(
        self,
        modality_lengths: Sequence[int],
        batch_size: int,
        world_size: int,
        seed: int = 0,
        on_epoch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(len(modality_lengths), seed, on_epoch)
        self.modality_lengths = list(modality_lengths)
        self.batch_size = batch_size
        self.world_size = world_size

    def _order(self, generator: torch.Generator) -> list[int]:
        return modality_length_grouped_indices(
            self.modality_lengths, self.batch_size, self.world_size, generator
        )
