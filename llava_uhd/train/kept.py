"""What a projector keeps for its backward pass, found by running it on a few views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from llava_uhd.images.geometry import Size

PIXELS = 3  # values of one
SHAPES = 3  # of views that are run


def projector_bytes(
    projector: nn.Module, width: int, patch: int, grids: Sequence[Size], size: int
) -> float:
    """Bytes that a projector which learns keeps of a micro-batch.

    A few views of different shapes are run, and twice as many; more are proportional to their
    patches. (A single view is never run alone: kernels may take another way then.)

    Args:
        projector: with its weights; they stay as they are.
        width: of the tower's features.
        patch: pixels of a patch's side.
        grids: (rows, columns) of patches of all views.
        size: bytes of a value in the computation. What the projector keeps in its own dtype shrinks
            with it.
    """
    if not grids:
        return 0.0
    shapes = [grid for grid, _ in Counter(grids).most_common(SHAPES)]
    few = shapes if len(shapes) > 1 else shapes * 2
    once, twice = (_kept(projector, width, patch, few * count) for count in (1, 2))
    times = _area(grids) / _area(few)
    own = next((each.element_size() for each in projector.parameters()), 4)
    return max(once + (twice - once) * (times - 1), 0.0) * min(size / own, 1.0)


def _area(grids: Sequence[Size]) -> int:
    return sum(rows * columns for rows, columns in grids)


def _kept(projector: nn.Module, width: int, patch: int, grids: list[Size]) -> float:
    """Bytes of different tensors, weights left out, that a pass over these views keeps."""
    weights = {each.untyped_storage().data_ptr() for each in projector.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and place not in kept:
            # Held, so that its place is not given away; a view counts with what it shows.
            kept[place] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    first = next(projector.parameters())
    patches = _area(grids)
    features = torch.zeros(patches, width, dtype=first.dtype, device=first.device)
    pixels = features.new_zeros(patches, PIXELS * patch**2)
    devices = [first.device] if first.is_cuda else []
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        projector(features, torch.tensor(grids, device=first.device), pixels)
    return float(sum(size for _, size in kept.values()))
