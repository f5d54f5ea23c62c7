"""Records to training samples: images opened when needed, resized as published, encoded."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from llava_uhd.config.training import DataConfig
from llava_uhd.data.records import Record, Records, read_records
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Size, fit_long_side, six_slice_size
from llava_uhd.images.pixels import open_image
from llava_uhd.text.encoding import encode_spans
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import IMAGE_MARKER, Turn

logger = logging.getLogger(__name__)

# Rows of the shared table of counts: the main process and this many workers less one.
MAX_WORKERS = 128
COUNTS = ("samples", "broken", "dropped_images", "truncated_samples", "truncated_tokens")
EPOCH, EPOCH_BROKEN = len(COUNTS), len(COUNTS) + 1

# EXIF orientations that swap width and height.
TURNED = (5, 6, 7, 8)
ORIENTATION_TAG = 0x0112


class BrokenSample(NamedTuple):
    """Stands for a sample whose image cannot be read; the collator leaves it out."""

    where: str
    reason: str


def move_image_first(text: str) -> str:
    r"""Puts the single ``<image>`` of a turn on a line of its own at the front, as published.

    Turns with none or several markers stay as they are.

    Example: ``"What is it?\n<image>"`` becomes ``"<image>\nWhat is it?"``.
    """
    if text.count(IMAGE_MARKER) != 1:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


class ConversationDataset(Dataset[dict[str, Any] | BrokenSample]):
    """Training samples of checked records.

    What a sample looks like depends on (seed, epoch, index) alone: not on the number of workers,
    nor on what was read before, so a resumed run sees the same ones.

    Args:
        records: from `read_records`.
        processor: of the model.
        config: data section of the recipe.
        seed: of the random resizing.
    """

    def __init__(
        self, records: Records, processor: LlavaUHDProcessor, config: DataConfig, seed: int = 0
    ) -> None:
        self.records = records
        self.processor = processor
        self.config = config
        self.seed = seed
        # Shared with the workers, which may outlive an epoch. Each writes its own row.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._counts = torch.zeros(MAX_WORKERS, len(COUNTS) + 2, dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, also in running workers."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    @property
    def lengths(self) -> list[int]:
        """Published word counts, see `Records.lengths`."""
        return self.records.lengths

    @property
    def modality_lengths(self) -> list[int]:
        """Published signed word counts, see `Records.modality_lengths`."""
        return self.records.modality_lengths

    @property
    def counts(self) -> dict[str, int]:
        """What this process and its workers met so far, by the names in `COUNTS`."""
        sums = self._counts.sum(0).tolist()
        return dict(zip(COUNTS, sums, strict=False))

    def __getitem__(self, index: int) -> dict[str, Any] | BrokenSample:
        """Encodes one sample.

        Returns:
            What `LlavaUHDProcessor.encode_conversation` returns, or a `BrokenSample` if an image is
            broken and ``data.on_broken_image`` is "skip".

        Raises:
            UserError: a broken image, too many of them, or a sample that does not fit; the message
                has file, index and id.
        """
        record = self.records[index]
        try:
            images = [self._open(path, index) for path in record.images]
        except UserError as error:
            if self.config.on_broken_image == "error":
                raise UserError(f"{self.records.where(index)}: {error}") from error
            return self._skip(index, str(error))
        try:
            sample = self.processor.encode_conversation(
                self._turns(record),
                images,
                overview_only=self.config.overview_only,
                max_length=self.config.max_length,
                overlong=self.config.overlong,
            )
        except UserError as error:
            raise UserError(f"{self.records.where(index)}: {error}") from error
        truncated = sample["truncated_tokens"]
        self._count(1, 0, sample["dropped_images"], int(truncated > 0), truncated)
        return sample

    def token_length(self, index: int) -> int:
        """True number of tokens of a sample before any cut, from image headers and geometry.

        Raises:
            UserError: an image header cannot be read.
        """
        record = self.records[index]
        placeholders = []
        for path in record.images:
            size = self._target_size(path, _header_size(path), index)
            count = self.processor.num_image_tokens(*size, self.config.overview_only)
            placeholders.append([self.processor.image_config.image_token_id or 0] * count)
        spans = self.processor.template.spans(self._turns(record))
        return len(encode_spans(self.processor.tokenizer, spans, placeholders).input_ids)

    def _turns(self, record: Record) -> list[Turn]:
        if not self.config.image_first:
            return list(record.turns)
        return [Turn(turn.role, move_image_first(turn.text)) for turn in record.turns]

    def _open(self, path: Path, index: int) -> Image.Image:
        root = self.records.root
        if root is not None and not self.config.check_files:
            # Links were not looked at up front.
            root.check(path.relative_to(root.path).as_posix())
        image = open_image(path)
        size = self._target_size(path, image.size, index)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return image

    def _name(self, path: Path) -> str:
        """Path as the record gives it: the folder of all images has no say."""
        root = self.records.root
        return str(path) if root is None else str(path.relative_to(root.path))

    def _is_textvqa(self, path: Path) -> bool:
        name = self._name(path)
        return "textvqa" in name or "TextVQA" in name

    def _target_size(self, path: Path, size: Size, index: int) -> Size:
        """Size after the published training resizes: TextVQA's, or else the six-slice one."""
        config = self.config
        if config.textvqa_long_side is not None and self._is_textvqa(path):
            if config.textvqa_only_enlarge and max(size) >= config.textvqa_long_side:
                return size
            try:
                return fit_long_side(*size, config.textvqa_long_side)
            except ValueError as error:
                raise UserError(f"image {path}: {error}") from error
        if config.six_slice_probability > 0:
            # A text as seed is hashed, alike on every machine and Python version.
            chance = random.Random(f"{self.seed} {self.epoch} {index} {path.name}").random()
            drawn = chance < config.six_slice_probability
            if drawn and self.processor.plan(*size).num_slices != 6:
                return six_slice_size(*size, self.processor.image_config.scale_resolution)
        return size

    def _skip(self, index: int, reason: str) -> BrokenSample:
        self._count(1, 1, 0, 0, 0)
        current = self._counts[:, EPOCH] == self._epoch
        broken = int(self._counts[current, EPOCH_BROKEN].sum())
        allowed = int(self.config.max_broken * len(self.records))
        where = self.records.where(index)
        if broken > allowed:
            raise UserError(
                f"{where}: {reason}; that makes {broken} broken samples in this epoch, more than "
                f"the {allowed} that data.max_broken ({self.config.max_broken}) allows"
            )
        logger.warning("left out %s: %s (%d of at most %d)", where, reason, broken, allowed)
        return BrokenSample(where, reason)

    def _count(self, *amounts: int) -> None:
        worker = get_worker_info()
        # As an array over the same shared memory: single tensor elements are slow.
        row = self._counts.numpy()[(worker.id + 1) % MAX_WORKERS if worker else 0]
        row[: len(COUNTS)] += amounts
        if row[EPOCH] != self.epoch:
            row[EPOCH] = self.epoch
            row[EPOCH_BROKEN] = 0
        row[EPOCH_BROKEN] += amounts[COUNTS.index("broken")]


def _header_size(path: Path) -> Size:
    """Size of a picture as it will be seen upright, without decoding it."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION_TAG) in TURNED
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


def open_records(config: DataConfig) -> Records:
    """Reads and checks the records of a recipe's data section.

    Raises:
        UserError: see `read_records`.
    """
    return read_records(
        config.paths,
        config.image_folder,
        check_files=config.check_files,
        follow_links=config.follow_links,
        missing=config.on_broken_image,
        max_missing=config.max_broken,
    )


def build_dataset(
    config: DataConfig, processor: LlavaUHDProcessor, seed: int = 0
) -> ConversationDataset:
    """Reads and checks the records of a recipe's data section, and prepares their samples.

    Raises:
        UserError: see `read_records`.
    """
    return ConversationDataset(open_records(config), processor, config, seed)
