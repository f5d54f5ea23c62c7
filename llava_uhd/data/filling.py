"""Filling rows of a fixed number of tokens with samples of any length."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence

import numpy as np

# Samples to choose from while a row is filled. More fill rows better, fewer keep closer to the
# shuffled order.
POOL = 512
# A row takes the oldest samples until so many average samples more would fit, then the best fits.
OPEN_SHARE = 1.5
# Pairs that are tried to close a row, and the share of it that may stay empty without trying on.
TRIES, TOLERANCE = 8, 0.002

_SHIFT = 40
_LAST = (1 << _SHIFT) - 1


class TooLongError(ValueError):
    """A sample does not fit into a row.

    Attributes:
        index: of the sample.
        tokens: of it.
    """

    def __init__(self, index: int, tokens: int, budget: int) -> None:
        super().__init__(f"sample {index} of {tokens} tokens does not fit into a row of {budget}")
        self.index = index
        self.tokens = tokens


class _Pool:
    """Samples that wait for a row, in order of their tokens and of their arrival.

    Args:
        tokens: of all samples.
        order: in which they arrive.
    """

    def __init__(self, tokens: Sequence[int], order: Sequence[int]) -> None:
        self.tokens = tokens
        self._coming = iter(order)
        self._keys: list[int] = []  # tokens and index in one number, ascending
        self._queue: deque[int] = deque()
        self._taken = bytearray(len(tokens))

    def fill(self) -> bool:
        """Lets samples in; False if there are none left."""
        while len(self._keys) < POOL:
            index = next(self._coming, None)
            if index is None:
                break
            insort(self._keys, self.tokens[index] << _SHIFT | index)
            self._queue.append(index)
        return bool(self._keys)

    def oldest(self) -> int | None:
        """The sample that has waited longest."""
        while self._queue and self._taken[self._queue[0]]:
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def take(self, index: int) -> int:
        """Takes a sample out; its tokens."""
        key = self.tokens[index] << _SHIFT | index
        self._keys.pop(bisect_right(self._keys, key) - 1)
        self._taken[index] = 1
        return self.tokens[index]

    def best_fit(self, room: int, spread: float) -> list[int]:
        """One or two samples that fill ``room`` tokens best; none if nothing fits.

        Args:
            room: tokens.
            spread: in [0, 1): where the pairs that are tried begin.
        """
        fits = self._fitting(room)
        if not fits:
            return []
        best = [fits - 1]
        empty = room - (self._keys[fits - 1] >> _SHIFT)
        for attempt in range(TRIES):
            if empty <= TOLERANCE * room:
                break
            one = int((spread + attempt / TRIES) % 1 * fits)
            left = room - (self._keys[one] >> _SHIFT)
            other = self._fitting(left) - 1
            other -= other == one
            if other >= 0 and left - (self._keys[other] >> _SHIFT) < empty:
                empty = left - (self._keys[other] >> _SHIFT)
                best = [one, other]
        return [self._keys[place] & _LAST for place in best]

    def _fitting(self, room: int) -> int:
        """How many samples have at most ``room`` tokens."""
        return bisect_right(self._keys, room << _SHIFT | _LAST) if room >= 0 else 0


def pack_rows(tokens: np.ndarray, budget: int, order: Sequence[int]) -> list[list[int]]:
    """Distributes all samples over rows of at most ``budget`` tokens.

    Args:
        tokens: (N,) integers of all samples, none above the budget.
        budget: tokens of a row.
        order: every sample's index once; a row begins with the first that waits.

    Returns:
        Indices of the samples of each row.

    Example: ``pack_rows(np.array([6, 3, 4, 7]), 10, range(4))`` is ``[[0, 2], [1, 3]]``.

    Raises:
        TooLongError: a sample does not fit into a row.
    """
    if len(tokens) and int(tokens.max()) > budget:
        longest = int(tokens.argmax())
        raise TooLongError(longest, int(tokens[longest]), budget)
    pool = _Pool(tokens.tolist(), order)
    ahead = OPEN_SHARE * float(tokens.mean()) if len(tokens) else 0.0
    rows: list[list[int]] = []
    while pool.fill():
        row: list[int] = []
        room = budget
        while (index := pool.oldest()) is not None:
            left = room - pool.tokens[index]
            if left < 0 or (row and left < ahead):
                break
            room -= pool.take(index)
            row.append(index)
        spread = len(rows) * 0.6180339887 % 1
        while chosen := pool.best_fit(room, spread):
            room -= sum(pool.take(index) for index in chosen)
            row += chosen
        rows.append(row)
    return rows
