"""Records to training samples: images and videos opened when needed, resized, encoded."""

from __future__ import annotations

import logging
import random
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from llava_uhd.config.training import DataConfig
from llava_uhd.data.files import ImageRoot
from llava_uhd.data.headers import Headers, image_size
from llava_uhd.data.reading import open_records as open_records
from llava_uhd.data.records import Record, Records
from llava_uhd.data.times import tell_times as tell_times
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Size, fit_long_side, six_slice_size
from llava_uhd.images.pixels import open_image
from llava_uhd.images.stored import MediaFile, StoredFile
from llava_uhd.images.video import (
    Video,
    frame_size,
    frame_times,
    num_frames,
    read_video,
    time_instruction,
    time_sentence,
)
from llava_uhd.text.encoding import Encoding
from llava_uhd.text.faithful import encode_turns
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER, Turn
from llava_uhd.text.visuals import marked

logger = logging.getLogger(__name__)

# Rows of the shared table of counts: the main process and this many workers less one.
MAX_WORKERS = 128
COUNTS = ("samples", "broken", "dropped_images", "truncated_samples", "truncated_tokens")
EPOCH, EPOCH_BROKEN = len(COUNTS), len(COUNTS) + 1


class BrokenSample(NamedTuple):
    """Stands for a sample whose image or video cannot be read; the collator leaves it out."""

    where: str
    reason: str


class BrokenFileError(UserError):
    """An image or video cannot be read."""


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
            What `LlavaUHDProcessor.encode_conversation` returns, or a `BrokenSample` if an image or
            video is broken and ``data.on_broken_image`` is "skip".

        Raises:
            UserError: a broken image or video, too many of them, or a sample that does not fit; the
                message has file, index and id.
            RuntimeError: anything else, with the same.
        """
        try:
            return self._sample(index)
        except UserError:
            raise
        except Exception as error:
            where, kind = self.records.where(index), type(error).__name__
            raise RuntimeError(f"{where}: {kind}: {error}") from error

    def _sample(self, index: int) -> dict[str, Any] | BrokenSample:
        record = self.records[index]
        try:
            images = [self._open(path, index) for path in record.images]
            videos = [self._open_video(path, index) for path in record.videos]
        except UserError as error:
            if self.config.on_broken_image == "error":
                raise UserError(f"{self.records.where(index)}: {error}") from error
            return self._skip(index, str(error))
        try:
            told = videos if self.processor.video_config.time_instruction else []
            sample = self.processor.encode_conversation(
                tell_times(record.turns, [time_instruction(video) for video in told]),
                images,
                videos,
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
        """True number of tokens of a sample before any cut, see `encoding`."""
        return len(self.encoding(index).input_ids)

    def encoding(self, index: int) -> Encoding:
        """Ids and labels of a sample before any cut, without its pixels.

        Sizes of images come from their headers, numbers and times of frames from those of videos.
        All frames of a video count as being of one size. Separators inside an image stand as
        placeholders.

        Raises:
            BrokenFileError: a header cannot be read.
            UserError: the sample does not fit; the message has file, index and id.
        """
        headers = self.headers(index)
        where = self.records.where(index)
        try:
            pairs = zip(self.records[index].images, headers.images, strict=True)
            sizes = [self._target_size(path, size, index) for path, size in pairs]
        except UserError as error:
            raise BrokenFileError(f"{where}: {error}") from error
        return self.encode_headers(index, headers._replace(images=sizes))

    def headers(self, index: int) -> Headers:
        """Reads the headers of a sample's files.

        Raises:
            BrokenFileError: one cannot be read.
        """
        record, video = self.records[index], self.processor.video_config
        try:
            return Headers(
                [self._size(path, index) for path in record.images],
                [self._video_size(path, index) for path in record.videos],
                [
                    time_sentence(*frame_times(path, video))
                    for path in record.videos
                    if video.time_instruction
                ],
            )
        except UserError as error:
            raise BrokenFileError(f"{self.records.where(index)}: {error}") from error

    def encode_headers(self, index: int, headers: Headers | None) -> Encoding:
        """Ids and labels of a sample before any cut.

        Args:
            index: of the sample.
            headers: with the sizes of images after the training resizes; None leaves every image
                and video out.

        Raises:
            UserError: the sample does not fit; the message has file, index and id.
        """
        record = self.records[index]
        processor, placeholder = self.processor, self.processor.image_token_id or 0
        lengths = {IMAGE_MARKER: [0] * len(record.images), VIDEO_MARKER: [0] * len(record.videos)}
        try:
            if headers is not None:
                several = len(record.images) > 1
                lengths[IMAGE_MARKER] = [
                    processor.num_image_tokens(*size, self.config.overview_only, several)
                    for size in headers.images
                ]
                lengths[VIDEO_MARKER] = [
                    processor.num_video_tokens(frames, *size) for frames, size in headers.videos
                ]
            turns = tell_times(record.turns, [] if headers is None else headers.sentences)
            text = "".join(turn.text for turn in turns)
            found = marked(text, len(record.images), len(record.videos))
            return encode_turns(
                processor.template_name,
                processor.template_mode,
                processor.tokenizer,
                [_one_kind(turn, record) for turn in turns],
                [[placeholder] * lengths[marker][place] for marker, place in found],
                max_length=self.config.max_length,
            )
        except UserError as error:
            raise UserError(f"{self.records.where(index)}: {error}") from error

    def _guard(self, path: MediaFile, root: ImageRoot | None) -> None:
        """Looks at links that were not looked at up front."""
        if isinstance(path, StoredFile):
            return
        if root is not None and not self.config.check_files:
            root.check(path.relative_to(root.path).as_posix())

    def _size(self, path: MediaFile, index: int) -> Size:
        self._guard(path, self.records.roots(index).images)
        return image_size(path)

    def _open(self, path: MediaFile, index: int) -> Image.Image:
        self._guard(path, self.records.roots(index).images)
        image = open_image(path)
        size = self._target_size(path, image.size, index)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return image

    def _open_video(self, path: MediaFile, index: int) -> Video:
        self._guard(path, self.records.roots(index).videos)
        return read_video(path, self.processor.video_config)

    def _video_size(self, path: MediaFile, index: int) -> tuple[int, Size]:
        self._guard(path, self.records.roots(index).videos)
        return num_frames(path, self.processor.video_config), frame_size(path)

    def _name(self, path: MediaFile, index: int) -> str:
        """Path as the record gives it: the folder of all images has no say."""
        if isinstance(path, StoredFile):
            return path.path
        root = self.records.roots(index).images
        return str(path) if root is None else str(path.relative_to(root.path))

    def _is_textvqa(self, path: MediaFile, index: int) -> bool:
        name = self._name(path, index)
        return "textvqa" in name or "TextVQA" in name

    def _target_size(self, path: MediaFile, size: Size, index: int) -> Size:
        """Size after the published training resizes: TextVQA's, or else the six-slice one."""
        if self.config.six_slice_probability > 0 and self.draws_six_slices(path, index, self.epoch):
            drawn = self.six_slice_size(path, size, index)
            if drawn is not None:
                return drawn
        return self.fixed_size(path, size, index)

    def fixed_size(self, path: MediaFile, size: Size, index: int) -> Size:
        """Size of an image after the resizes that are the same in every epoch.

        Raises:
            UserError: it would become too thin.
        """
        config = self.config
        if config.textvqa_long_side is None or not self._is_textvqa(path, index):
            return size
        if config.textvqa_only_enlarge and max(size) >= config.textvqa_long_side:
            return size
        try:
            return fit_long_side(*size, config.textvqa_long_side)
        except ValueError as error:
            raise UserError(f"image {path}: {error}") from error

    def six_slice_size(self, path: MediaFile, size: Size, index: int) -> Size | None:
        """Size of an image where it is drawn to have about six slices; None: it never is."""
        config = self.config
        if config.six_slice_probability == 0:
            return None
        if config.textvqa_long_side is not None and self._is_textvqa(path, index):
            return None
        if self.processor.plan(*size).num_slices == 6:
            return None
        return six_slice_size(*size, self.processor.image_config.scale_resolution)

    def draws_six_slices(self, path: MediaFile, index: int, epoch: int) -> bool:
        """Whether an image is drawn in an epoch, see `six_slice_size`."""
        # A text as seed is hashed, alike on every machine and Python version.
        chance = random.Random(f"{self.seed} {epoch} {index} {path.name}").random()
        return chance < self.config.six_slice_probability

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


def _one_kind(turn: Turn, record: Record) -> Turn:
    """With the one kind of marker that templates know."""
    if not record.videos:
        return turn
    return Turn(turn.role, turn.text.replace(VIDEO_MARKER, IMAGE_MARKER))


def build_dataset(
    config: DataConfig, processor: LlavaUHDProcessor, seed: int = 0
) -> ConversationDataset:
    """Reads and checks the records of a recipe's data section, and prepares their samples.

    Raises:
        UserError: see `read_records`.
    """
    return ConversationDataset(open_records(config), processor, config, seed)
