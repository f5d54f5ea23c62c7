"""True token counts of all samples, and what their images cost: before training, from headers.

The counts are those of `ConversationDataset`, cut at ``data.max_length``; no pixel is decoded. They
are kept in a file that knows what it was counted from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from torch.utils.data import DataLoader, Dataset

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.data.costs import TrainingCost, VisionCost
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.headers import Headers
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Size
from llava_uhd.images.strategies import plan_frame

logger = logging.getLogger(__name__)

COUNTS_FILE = "token_counts.npz"
FORMAT = 1  # raise when the same data would be counted otherwise

# Samples that a process counts at a time, and how many are worth other processes.
CHUNK = 256
WORTH_WORKERS = 4 * CHUNK
MAX_WORKERS = 32

Progress = Callable[[int], None]


class Redrawn(NamedTuple):
    """What changes where an image is drawn to have six slices.

    Attributes:
        place: of the image among those of its sample.
        tokens: more tokens (or fewer).
        tower: more operations of the tower.
        projector: the same for the projector.
    """

    place: int
    tokens: int
    tower: float
    projector: float


class Count(NamedTuple):
    """One sample.

    Attributes:
        tokens: as it is trained on; those of its text alone if a file is broken.
        uncut: before the cut at ``data.max_length``.
        tower: operations of a forward pass of the vision tower.
        projector: the same for the projector.
        broken: whether a file cannot be read.
        redrawn: images that may be drawn to have six slices.
    """

    tokens: int
    uncut: int
    tower: float
    projector: float
    broken: bool = False
    redrawn: tuple[Redrawn, ...] = ()


@dataclass(frozen=True)
class TokenCounts:
    """All samples, one after another.

    Attributes:
        tokens: (N,) int64, see `Count`.
        uncut: (N,) int64.
        tower: (N,) float64.
        projector: (N,) float64.
        broken: (N,) bool.
        redrawn_of: (M,) int64 samples of the images that may be drawn to have six slices.
        redrawn: (M, 4) float64, see `Redrawn`.
    """

    tokens: np.ndarray
    uncut: np.ndarray
    tower: np.ndarray
    projector: np.ndarray
    broken: np.ndarray
    redrawn_of: np.ndarray
    redrawn: np.ndarray

    @classmethod
    def of(cls, counts: list[Count]) -> TokenCounts:
        """Brings single counts into arrays."""
        numbers = np.array([count[:4] for count in counts], np.float64).reshape(-1, 4)
        redrawn = [(index, each) for index, one in enumerate(counts) for each in one.redrawn]
        return cls(
            numbers[:, 0].astype(np.int64),
            numbers[:, 1].astype(np.int64),
            numbers[:, 2].copy(),
            numbers[:, 3].copy(),
            np.array([count.broken for count in counts], bool),
            np.array([index for index, _ in redrawn], np.int64),
            np.array([each for _, each in redrawn], np.float64).reshape(-1, 4),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def longest(self, dataset: ConversationDataset) -> int:
        """Most tokens that a sample may have in any epoch.

        Args:
            dataset: that was counted.
        """
        uncut = self.uncut.copy()
        np.add.at(uncut, self.redrawn_of, np.maximum(self.redrawn[:, 1], 0).astype(np.int64))
        changed, most = np.unique(self.redrawn_of), dataset.config.max_length
        tokens = self.tokens.copy()
        tokens[changed] = uncut[changed] if most is None else np.minimum(uncut[changed], most)
        return int(tokens.max())

    def at(
        self, dataset: ConversationDataset, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (N,) int64, operations (N,) of tower and projector, in an epoch.

        Of a sample with a drawn image that is cut the tokens are an upper bound.

        Args:
            dataset: that was counted.
            epoch: of the run.
        """
        if not len(self.redrawn_of):
            return self.tokens, self.tower, self.projector
        drawn = np.zeros(len(self.redrawn_of), bool)
        for number, (index, place) in enumerate(
            zip(self.redrawn_of.tolist(), self.redrawn[:, 0].tolist(), strict=True)
        ):
            path = dataset.records[index].images[int(place)]
            drawn[number] = dataset.draws_six_slices(path, index, epoch)
        owners, changes = self.redrawn_of[drawn], self.redrawn[drawn]
        tokens, uncut = self.tokens.copy(), self.uncut.copy()
        np.add.at(uncut, owners, changes[:, 1].astype(np.int64))
        most = dataset.config.max_length
        changed = np.unique(owners)
        tokens[changed] = uncut[changed] if most is None else np.minimum(uncut[changed], most)
        tower, projector = self.tower.copy(), self.projector.copy()
        np.add.at(tower, owners, changes[:, 2])
        np.add.at(projector, owners, changes[:, 3])
        return tokens, tower, projector


class CountedEpochs:
    """Tokens and training costs of all samples by epoch, see `llava_uhd.data.packing`.

    Args:
        counts: of the data set.
        dataset: that was counted.
        cost: of the stage.
    """

    def __init__(
        self, counts: TokenCounts, dataset: ConversationDataset, cost: TrainingCost
    ) -> None:
        self.counts = counts
        self.dataset = dataset
        self.cost = cost
        self._last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (N,) and costs (N,) in an epoch."""
        if self._last is None or self._last[0] != epoch:
            tokens, tower, projector = self.counts.at(self.dataset, epoch)
            self._last = (epoch, (tokens, self.cost(tokens, tower, projector)))
        return self._last[1]


class Counter:
    """Counts single samples.

    Args:
        dataset: of the run.
        config: of its model.
    """

    def __init__(self, dataset: ConversationDataset, config: LlavaUHDConfig) -> None:
        self.dataset = dataset
        self.vision = VisionCost(config)

    def __call__(self, index: int) -> Count:
        """Counts a sample.

        Raises:
            UserError: it does not fit, or a file is broken and ``data.on_broken_image`` is "error".
        """
        dataset = self.dataset
        try:
            headers = dataset.headers(index)
            pairs = zip(dataset.records[index].images, headers.images, strict=True)
            fixed = [dataset.fixed_size(path, size, index) for path, size in pairs]
        except UserError:
            if dataset.config.on_broken_image == "error":
                raise
            tokens, uncut = self._tokens(index, None)
            return Count(tokens, uncut, 0.0, 0.0, broken=True)
        tokens, uncut = self._tokens(index, headers._replace(images=fixed))
        several = len(fixed) > 1
        costs = [self._image(size, several) for size in fixed]
        costs += [self._video(frames, size) for frames, size in headers.videos]
        tower, projector = (sum(cost[part] for cost in costs) for part in (0, 1))
        redrawn = self._redrawn(index, headers, several)
        return Count(tokens, uncut, tower, projector, redrawn=redrawn)

    def _tokens(self, index: int, headers: Headers | None) -> tuple[int, int]:
        """Tokens after and before the cut."""
        config = self.dataset.config
        encoding = self.dataset.encode_headers(index, headers)
        uncut = len(encoding.input_ids)
        if config.max_length is not None:
            try:
                encoding.cut(config.max_length, config.overlong)
            except UserError as error:
                raise UserError(f"{self.dataset.records.where(index)}: {error}") from error
        return len(encoding.input_ids), uncut

    def _image(self, size: Size, several: bool) -> tuple[float, float]:
        processor, overview_only = self.dataset.processor, self.dataset.config.overview_only
        return self.vision(tuple(processor.plan(*size, overview_only, several).view_grids))

    def _video(self, frames: int, size: Size) -> tuple[float, float]:
        processor = self.dataset.processor
        plan = plan_frame(processor.image_config, processor.video_config, *size)
        return self.vision(tuple(plan.view_grids) * frames)

    def _redrawn(self, index: int, headers: Headers, several: bool) -> tuple[Redrawn, ...]:
        """Images that may be drawn to have six slices, which are all at their own size else."""
        dataset, processor = self.dataset, self.dataset.processor
        overview_only, found = dataset.config.overview_only, []
        for place, path in enumerate(dataset.records[index].images):
            size = headers.images[place]
            drawn = dataset.six_slice_size(path, size, index)
            if drawn is None:
                continue
            before, after = (
                processor.num_image_tokens(*each, overview_only, several) for each in (size, drawn)
            )
            own, other = self._image(size, several), self._image(drawn, several)
            found.append(Redrawn(place, after - before, other[0] - own[0], other[1] - own[1]))
        return tuple(found)


class _Chunks(Dataset[Any]):
    """Counts of `CHUNK` samples at a time, or the mistake that was found."""

    def __init__(self, counter: Counter, total: int) -> None:
        self.counter = counter
        self.total = total

    def __len__(self) -> int:
        return -(-self.total // CHUNK)

    def __getitem__(self, number: int) -> list[Count] | UserError:
        stop = min((number + 1) * CHUNK, self.total)
        try:
            return [self.counter(index) for index in range(number * CHUNK, stop)]
        except UserError as error:
            return error


def count_tokens(
    dataset: ConversationDataset,
    config: LlavaUHDConfig,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenCounts:
    """Counts all samples.

    Args:
        dataset: of the run.
        config: of its model.
        workers: processes; None: all processors of the machine where the data are many.
        progress: called with the number of samples that were counted since the last call.

    Raises:
        UserError: see `Counter`.
    """
    if workers is None:
        workers = processors() if len(dataset) >= WORTH_WORKERS else 0
    chunks = _Chunks(Counter(dataset, config), len(dataset))
    found: list[Count] = []
    for chunk in DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=_as_is):
        if isinstance(chunk, UserError):
            raise chunk
        found += chunk
        if progress is not None:
            progress(len(chunk))
    return TokenCounts.of(found)


def processors() -> int:
    """Processes that are worth their while on this machine; 0: none beside this one."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(count, MAX_WORKERS) if count > 1 else 0


def _as_is(chunk: Any) -> Any:
    return chunk


def counted_from(dataset: ConversationDataset, config: LlavaUHDConfig) -> str:
    """SHA-256 of everything that the counts follow from, except the image files themselves."""
    data, processor = dataset.config, dataset.processor
    settings = {
        "format": FORMAT,
        "records": dataset.records.digest(),
        "image": processor.image_config,
        "projector": processor.projector_config,
        "video": processor.video_config,
        "template": [processor.template_name, processor.template_mode],
        "data": [
            *(data.overview_only, data.textvqa_long_side, data.textvqa_only_enlarge),
            *(data.six_slice_probability > 0, data.max_length, data.overlong),
        ],
        "vision": config.vision_config.to_dict(),
        "widths": [config.hidden_size, config.select_layer],
    }
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    digest.update(processor.tokenizer.backend_tokenizer.to_str().encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def load_counts(file: Path, digest: str) -> TokenCounts | None:
    """Counts from a file; None if there is none, or it was counted from other data."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            values = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile):
        return None
    if str(values.pop("counted_from", "")) != digest:
        return None
    return TokenCounts(**values)


def save_counts(file: Path, digest: str, counts: TokenCounts) -> None:
    """Writes counts so that a reader never finds half of them."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    with beside.open("wb") as stream:
        np.savez(stream, counted_from=np.array(digest), **vars(counts))
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def stored_counts(
    dataset: ConversationDataset,
    config: LlavaUHDConfig,
    file: Path,
    progress: Progress | None = None,
) -> TokenCounts:
    """Counts of a data set, from the file where they were counted before, else counted now.

    Args:
        dataset: of the run.
        config: of its model.
        file: written where it holds no counts of these data.
        progress: see `count_tokens`.

    Raises:
        UserError: see `Counter`, or the file cannot be written.
    """
    digest = counted_from(dataset, config)
    found = load_counts(file, digest)
    if found is not None:
        return found
    counts = count_tokens(dataset, config, progress=progress)
    try:
        save_counts(file, digest, counts)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
    return counts
