"""What a training run reads, and how samples are prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_uhd.errors import UserError


@dataclass
class DataConfig:
    """What is read and how samples are prepared.

    Attributes:
        path: LLaVA JSON or JSONL file, shards, parquet tables, a YAML mixture of such files, or
            several.
        image_folder: image paths are relative to it and must stay inside it.
        video_folder: the same for videos; None: `image_folder`.
        embedded: name of a data set that the package draws itself, instead of `path`.
        overview_only: drop the slices (first stage of LLaVA-UHD v1).
        on_broken_image: what an image or video that cannot be read does: "error" stops; "skip"
            leaves the sample out, counted and logged.
        on_wrong_record: what a record that is not as it should be does (a role, an order or a
            number of images that is wrong, an empty conversation): "error" or "skip", likewise.
        max_broken: with "skip", the largest share of samples that may be left out, in [0, 1].
        image_first: True: a turn with one ``<image>`` gets it moved to its front, as published;
            turns with several keep them where they are. False moves none. To the letter:
            "llava_1_5" also collapses the several of a turn into one; "onevision" leaves a marker
            that the turn begins with as it is, and removes a leftover label of published videos.
        textvqa_long_side: resize images whose path contains "textvqa" or "TextVQA" to this long
            side in pixels.
        textvqa_only_enlarge: leave those that are larger already as they are, as in the published
            LLaVA-UHD v2 Vicuna-7B.
        six_slice_probability: share of samples resized to about six slices (published: 0.1).
        max_length: most tokens of a sample, or None.
        overlong: "error" stops when the cut at `max_length` would lose an image; "drop" removes
            whole images from the cut on, counted.
        batching: "padded": samples in rows of their own, padded to the longest one; "packed": side
            by side in rows of at most `pack_tokens` tokens, without padding.
        pack_tokens: tokens of a packed row, one per device and forward pass; None: as many as
            ``trainer.per_device_train_batch_size`` samples have on average, at least those of the
            longest sample.
        shuffle: "global" draws each sample from all; "shards" keeps neighbours of a file near each
            other, so that few shards or row groups are read at a time.
        holdout: samples that are kept from training and evaluated: a share below 1, or a number.
        holdout_path: data that are evaluated, like `path`; instead of `holdout`.
        holdout_samples: so many of them are answered at each evaluation, and shown.
        check_files: look for every image file before training; switch off for huge data on slow
            disks.
        follow_links: allow links inside `image_folder` and `video_folder` that lead out of them.
        preview: so many samples are shown with their learned tokens before training.
        max_unlearned: the run is refused if more than this share of the samples that are checked
            before training, in [0, 1], has no learned token.
    """

    path: str | list[str] | None = None
    image_folder: str | None = None
    video_folder: str | None = None
    embedded: str | None = None
    overview_only: bool = False
    on_broken_image: Literal["error", "skip"] = "error"
    on_wrong_record: Literal["error", "skip"] = "error"
    max_broken: float = 0.01
    image_first: bool | Literal["llava_1_5", "onevision"] = True
    textvqa_long_side: int | None = None
    textvqa_only_enlarge: bool = False
    six_slice_probability: float = 0.0
    max_length: int | None = 2048
    overlong: Literal["error", "drop"] = "error"
    batching: Literal["padded", "packed"] = "padded"
    pack_tokens: int | None = None
    shuffle: Literal["global", "shards"] = "global"
    holdout: float | None = None
    holdout_path: str | list[str] | None = None
    holdout_samples: int = 4
    check_files: bool = True
    follow_links: bool = False
    preview: int = 2
    max_unlearned: float = 0.1

    def __post_init__(self) -> None:
        for name in ("max_broken", "six_slice_probability", "max_unlearned"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("textvqa_long_side", "max_length", "pack_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} must be at least 1 or null, got {value}")
        if self.preview < 0:
            raise UserError(f"data.preview must be at least 0, got {self.preview}")
        self._check_held_out()
        if self.shuffle == "shards" and self.batching == "packed":
            raise UserError(
                "data.shuffle: shards and data.batching: packed exclude each other: set one of them"
            )
        if self.path is not None and self.embedded is not None:
            raise UserError("data.path and data.embedded exclude each other: set one of them")

    def _check_held_out(self) -> None:
        share = self.holdout
        if share is not None and not (0 < share < 1 or (share >= 1 and share == int(share))):
            raise UserError(
                f"data.holdout must be a share below 1 or a whole number of samples, got {share}"
            )
        if share is not None and self.holdout_path is not None:
            raise UserError(
                "data.holdout and data.holdout_path exclude each other: set one of them"
            )
        if self.holdout_samples < 0:
            raise UserError(f"data.holdout_samples must be at least 0, got {self.holdout_samples}")

    @property
    def holds_out(self) -> bool:
        """Whether something is kept from training and evaluated."""
        return self.holdout is not None or self.holdout_path is not None

    @property
    def paths(self) -> list[str]:
        """The data files as a list."""
        if self.path is None:
            return []
        return [self.path] if isinstance(self.path, str) else list(self.path)
