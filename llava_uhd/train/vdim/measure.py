"""What the upsampler is worth on pictures that it did not learn from.

Two questions, asked of the learned maps and of plain bilinear and bicubic enlargement alike:

1. Reconstruction: jitter the map like the picture, shrink it, compare with the tower's features of
   the jittered picture. This is the training's own loss, in evaluation mode, on held-out pictures
   and views. Plain enlargement has a downsampler and an uncertainty net of its own, which learned
   from the same views (`vdim.control`); without them it borrows those of the learned maps.
2. Resolution: is the map what the tower itself says between its patches? The tower reads the
   picture shifted by parts of a patch, so that every pixel of the large map is the middle of a
   patch of one shifted picture ("shifted"); and it reads the four quarters of the picture, each
   enlarged to the full size ("enlarged"). The downsampler plays no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from llava_uhd.train.vdim.data import Source, Transform, batches
from llava_uhd.train.vdim.draws import Draws, seed_of
from llava_uhd.train.vdim.jitter import JitterRange, apply_jitter
from llava_uhd.train.vdim.losses import reconstruction_loss
from llava_uhd.train.vdim.module import (
    CONTROL,
    Projection,
    TowerFeatures,
    VdimModule,
    enlarge,
    shrink,
)
from llava_uhd.train.vdim.resample import Resampling

# Keeps the draws of a measurement apart from those of the training.
STREAM = 77


@dataclass(frozen=True)
class Candidate:
    """A way to enlarge features.

    Attributes:
        name: for the table.
        scale: of the learned map, or `CONTROL` for the tower's own.
        head: name of the head that shrinks it again.
        mode: of the enlargement to the picture's resolution.
    """

    name: str
    scale: int
    head: str
    mode: str = "bilinear"


@dataclass
class Sums:
    """Running sums of one candidate on one group of pictures."""

    loss: float = 0.0
    views: int = 0
    squared: float = 0.0
    resolution: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Spread:
    """Running variance of targets: what a constant guess would be wrong by."""

    count: int = 0
    total: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0

    def add(self, rows: torch.Tensor) -> None:
        """Takes features (B, C, h, w) into account."""
        rows = rows.double()
        self.count += rows.shape[0] * rows.shape[2] * rows.shape[3]
        self.total = self.total + rows.sum((0, 2, 3))
        self.squares = self.squares + rows.square().sum((0, 2, 3))

    @property
    def value(self) -> float:
        """Sum of squared distances from the mean of each channel."""
        spread = self.squares - torch.as_tensor(self.total).square() / max(self.count, 1)
        return float(torch.as_tensor(spread).sum())


def candidates(module: VdimModule) -> list[Candidate]:
    """What is compared, best known first."""
    name = module.head_name
    own = name(CONTROL) if module.config.control else name(module.config.scale)
    learned = [Candidate(f"learned {s}x", s, name(s)) for s in reversed(module.config.scales)]
    plain = [
        Candidate("bilinear", CONTROL, own, "bilinear"),
        Candidate("bicubic", CONTROL, own, "bicubic"),
    ]
    if module.config.control:
        same = name(module.config.scale)
        plain.append(Candidate(f"bilinear, {same} head", CONTROL, same, "bilinear"))
    return [*learned, *plain]


@torch.no_grad()
def measure(
    module: VdimModule,
    groups: Mapping[str, Sequence[Source]],
    transform: Transform,
    batch_size: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measures on groups of held-out pictures.

    Args:
        module: trained or not; it is left in the mode it came in.
        groups: name -> pictures.
        transform: of the recipe.
        batch_size: pictures at a time.
        seed: of views and projections, the same for every candidate.

    Returns:
        One row per group and candidate: ``group``, ``candidate``, ``pictures``, ``loss`` (the
        training's reconstruction loss per view), ``error`` (squared error of the reconstruction
        over the variance of its target, all channels), and for both targets of `resolution_targets`
        ``shifted_error``, ``shifted_cosine``, ``enlarged_error``, ``enlarged_cosine``.
    """
    mode = module.training
    module.eval()
    rows = []
    try:
        for group, sources in groups.items():
            rows += _measure_group(module, group, sources, transform, batch_size, seed)
    finally:
        module.train(mode)
    return rows


def _measure_group(
    module: VdimModule,
    group: str,
    sources: Sequence[Source],
    transform: Transform,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    device = next(module.parameters()).device
    sums = {candidate: Sums() for candidate in candidates(module)}
    spread = Spread()
    for number, pictures in enumerate(batches(sources, transform, batch_size)):
        pictures = pictures.to(device)
        source = module.features(pictures)
        maps = {**module.maps(pictures, source), CONTROL: source}
        for view in range(module.config.measure_views):
            draws = Draws(seed_of(seed, STREAM, number, view))
            _measure_view(module, pictures, maps, draws, sums, spread)
        _measure_resolution(module, pictures, maps, sums)
    return [
        {
            "group": group,
            "candidate": candidate.name,
            "pictures": len(sources),
            "loss": each.loss / each.views,
            "error": each.squared / spread.value,
            **{name: sum(values) / len(values) for name, values in each.resolution.items()},
        }
        for candidate, each in sums.items()
    ]


def _measure_view(
    module: VdimModule,
    pictures: torch.Tensor,
    maps: Mapping[int, torch.Tensor],
    draws: Draws,
    sums: Mapping[Candidate, Sums],
    spread: Spread,
) -> None:
    """One jittered view of a batch for every candidate."""
    config = module.config
    size = (int(pictures.shape[-2]), int(pictures.shape[-1]))
    jitter = draws.jitter(JitterRange(config.max_pad, config.max_zoom, config.use_flips), size)
    target = module.features(apply_jitter(pictures, jitter, config.max_pad))
    project = Projection.drawn(target, draws, config.random_projection)
    spread.add(target)
    for candidate, each in sums.items():
        head = module.head(candidate.head)
        shown = maps[candidate.scale].float()
        if candidate.mode != "bilinear":
            shown = enlarge(shown, size, candidate.mode)
        guess = shrink(head, shown, Resampling(size, jitter, config.max_pad))
        deviation = None if head.scale_net is None else head.scale_net(target)
        loss = reconstruction_loss(project(guess), project(target), deviation)
        # Batches need not be equally large.
        each.loss += float(loss) * len(pictures)
        each.views += len(pictures)
        each.squared += float((guess - target).double().square().sum())


def shifted_target(features: TowerFeatures, pictures: torch.Tensor, scale: int) -> torch.Tensor:
    """The tower's features at ``scale`` times its resolution, from shifted pictures.

    Every pixel of the result is the middle (to half a pixel of the picture) of one patch of one of
    ``scale ** 2`` shifted pictures, whose borders are reflected.

    Returns:
        (B, C, scale * h, scale * w).
    """
    patch = features.patch
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, [patch] * 4, mode="reflect")
    steps = [round(((index + 0.5) / scale - 0.5) * patch) for index in range(scale)]
    rows = []
    for down in steps:
        row = []
        for right in steps:
            top, left = patch + down, patch + right
            row.append(features(padded[..., top : top + height, left : left + width]))
        rows.append(torch.stack(row, -1).flatten(-2))  # (B, C, h, scale * w)
    return torch.stack(rows, -2).flatten(-3, -2)


def enlarged_target(features: TowerFeatures, pictures: torch.Tensor) -> torch.Tensor:
    """The tower's features at twice its resolution, from the four quarters of the picture.

    Returns:
        (B, C, 2h, 2w).
    """
    height, width = pictures.shape[-2:]
    twice = F.interpolate(pictures, scale_factor=2, mode="bicubic", align_corners=False)
    rows = []
    for top in (0, height):
        parts = [
            features(twice[..., top : top + height, left : left + width]) for left in (0, width)
        ]
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2)


def _measure_resolution(
    module: VdimModule,
    pictures: torch.Tensor,
    maps: Mapping[int, torch.Tensor],
    sums: Mapping[Candidate, Sums],
) -> None:
    """Compares maps with what the tower itself says at a higher resolution."""
    scale = module.config.scale
    targets = {
        "shifted": (shifted_target(module.features, pictures, scale), scale),
        "enlarged": (enlarged_target(module.features, pictures), 2),
    }
    for name, (target, factor) in targets.items():
        for candidate, each in sums.items():
            guess = resized(maps[candidate.scale].float(), target, candidate.mode)
            # Patches at the border of a shifted picture see reflections.
            error, cosine = agreement(guess, target, factor)
            each.resolution.setdefault(f"{name}_error", []).extend([error] * len(guess))
            each.resolution.setdefault(f"{name}_cosine", []).extend([cosine] * len(guess))


def resized(maps: torch.Tensor, like: torch.Tensor, mode: str) -> torch.Tensor:
    """Maps in the size of others: enlarged by a filter, or averaged down."""
    size = (int(like.shape[-2]), int(like.shape[-1]))
    if maps.shape[-1] > size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return enlarge(maps, size, mode)


def agreement(guess: torch.Tensor, target: torch.Tensor, border: int) -> tuple[float, float]:
    """(squared error over the target's variance, mean cosine), both after the target's mean is
    taken from the channels and a border is cut off.
    """
    inner = (..., slice(border, -border), slice(border, -border))
    mean = target[inner].mean((0, 2, 3), keepdim=True)
    guess, target = guess[inner] - mean, target[inner] - mean
    error = (guess - target).square().sum() / target.square().sum().clamp(min=1e-12)
    return float(error), float(F.cosine_similarity(guess, target, dim=1).mean())
