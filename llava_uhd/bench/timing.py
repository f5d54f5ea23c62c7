"""Comparing equal computations: time, memory and error, side by side in one run.

Variants take turns, so that a machine whose speed drifts treats them alike. On a CPU the process's
own CPU time is read, which other programs disturb little; on CUDA the wall time between two
synchronisations.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Attributes:
        run: the timed part.
        common: brings the result of ``run`` into the form in which variants are compared; not
            timed.
    """

    run: Callable[[], Any]
    common: Callable[[Any], torch.Tensor] = lambda result: result


@dataclass(frozen=True)
class Measurement:
    """One variant.

    Attributes:
        name: of the variant.
        best_s: shortest run in seconds.
        median_s: median run in seconds.
        peak_bytes: most bytes that the variant's own tensors took at one time, inputs left out.
        error: largest absolute difference to the first variant.
        relative_error: the same divided by the first variant's largest absolute value.
    """

    name: str
    best_s: float
    median_s: float
    peak_bytes: int
    error: float
    relative_error: float


@dataclass(frozen=True)
class Comparison:
    """Variants of one computation; the first is the plain one.

    Attributes:
        title: what is computed.
        rows: one for each variant.
    """

    title: str
    rows: tuple[Measurement, ...]

    def speedup(self, row: Measurement) -> float:
        """How many times faster than the first variant, by the best runs."""
        return self.rows[0].best_s / row.best_s

    @property
    def worst_error(self) -> float:
        """Largest relative error."""
        return max(row.relative_error for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        rows = [{**asdict(row), "speedup": self.speedup(row)} for row in self.rows]
        return {"title": self.title, "rows": rows}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block that are still alive.

    Scratch memory inside a kernel is not seen.

    Attributes:
        live: bytes now.
        peak: largest value of ``live``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()
        self._active = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {self._storage_id(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            identity = self._storage_id(leaf)
            # A view or an in-place result shares its storage with an argument.
            if identity is None or identity in given or identity in self._seen:
                continue
            storage = leaf.untyped_storage()
            size = storage.nbytes()
            self._seen.add(identity)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, identity, size)
        return result

    @staticmethod
    def _storage_id(leaf: Any) -> int | None:
        return leaf.untyped_storage()._cdata if isinstance(leaf, torch.Tensor) else None

    def _free(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.live -= size


def peak_bytes(variant: Variant, device: torch.device) -> int:
    """Most bytes that the tensors of one run take at one time, those it is given left out."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counter:
        variant.run()
    return counter.peak


def run_seconds(variant: Variant, device: torch.device) -> float:
    """Time of one run: CPU time of this process, or wall time on CUDA."""
    if device.type != "cuda":
        start = time.process_time()
        variant.run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    variant.run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    title: str,
    variants: Mapping[str, Variant],
    *,
    repeats: int = 3,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Measures variants of one computation.

    Args:
        title: what is computed.
        variants: the first is the reference.
        repeats: timed runs of each variant, in turns.
        device: where they run.

    Raises:
        ValueError: fewer than one repeat, no variant, or results of different shapes.
    """
    if repeats < 1 or not variants:
        raise ValueError("compare needs at least one variant and one repeat")
    device = torch.device(device)
    names = list(variants)
    # These runs, for error and memory, also warm everything up.
    errors = _errors([variant.common(variant.run()) for variant in variants.values()])
    peaks = [peak_bytes(variants[name], device) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        # Another one begins each turn: nobody always runs on caches left by the same neighbour.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(run_seconds(variants[name], device))
    rows = [
        Measurement(name, min(times[name]), statistics.median(times[name]), peak, *error)
        for name, peak, error in zip(names, peaks, errors, strict=True)
    ]
    return Comparison(title, tuple(rows))


def _errors(results: Sequence[torch.Tensor]) -> list[tuple[float, float]]:
    """Absolute and relative difference of each result to the first."""
    first = results[0].detach().double()
    largest = first.abs().max().item() or 1.0
    errors = []
    for result in results:
        if result.shape != first.shape:
            raise ValueError(
                f"results differ in shape: {tuple(result.shape)}, {tuple(first.shape)}"
            )
        error = (result.detach().double() - first).abs().max().item()
        errors.append((error, error / largest))
    return errors
