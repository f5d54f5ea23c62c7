"""Whether a written checkpoint computes what its source does: the logits of both, side by side."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.parts import quiet_library
from llava_uhd.checkpoint.weights import weight_files
from llava_uhd.config.model import CompressionConfig
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor

# Logits are compared at the last positions of each prompt.
POSITIONS = 16
# Largest difference that counts as the same, relative to the largest logit. Half precision rounds
# differently wherever two programs add in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Prompt = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart.

    Attributes:
        difference: largest difference of two logits.
        scale: largest logit.
        dtype: in which both were computed.
        prompts: what was asked.
    """

    difference: float
    scale: float
    dtype: torch.dtype
    prompts: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether that is rounding."""
        return self.difference <= TOLERANCE[self.dtype] * max(self.scale, 1.0)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"logits differ by {self.difference:.1e} at most (largest {self.scale:.1f}, {name}; "
            f"{', '.join(self.prompts)})"
        )


def prompts(processor: LlavaUHDProcessor, videos: bool) -> dict[str, Prompt]:
    """Small built-in inputs of each kind that a model reads, by name.

    Args:
        processor: of the model.
        videos: the model knows videos.
    """
    wide, high, small = _picture(500, 90), _picture(40, 70), _picture(60, 40)
    found: dict[str, Prompt] = {
        "text": ("Why is the sky blue?", {}),
        "picture": ("<image>\nWhat is shown here?", {"images": [wide]}),
        "two pictures": ("First <image>, then <image>.", {"images": [high, small]}),
    }
    if videos:
        frames = [_picture(64, 48), _picture(64, 48, turn=1)]
        found["video"] = ("<video>\nWhat happens?", {"videos": [frames]})
    return found


def _picture(width: int, height: int, turn: int = 0) -> Image.Image:
    """Three gradients, which leave no two places alike."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    stacked = np.stack(channels[turn:] + channels[:turn], axis=-1)
    return Image.fromarray(stacked.astype(np.uint8))


def knows_videos(processor: LlavaUHDProcessor) -> bool:
    """Whether a model was made for videos, too: it pools their frames."""
    return processor.video_config.pool_stride > 1


def our_logits(
    folder: Path, dtype: torch.dtype, rounded: torch.dtype | None, videos: bool
) -> dict[str, torch.Tensor]:
    """Logits (positions, vocabulary) of a folder that `load_pretrained` reads, by prompt.

    Args:
        folder: ours or published.
        dtype: of the computation.
        rounded: dtype that the weights pass first, or None.
        videos: with a video.
    """
    model, processor = load_pretrained(folder, dtype=rounded or dtype)
    model = model.to(dtype)

    def run(prompt: Prompt) -> torch.Tensor:
        text, given = prompt
        inputs = processor(text=text, **given)
        # Other layouts cannot say that a model compresses: its weights are what is compared.
        off = CompressionConfig()
        return model(**inputs, logits_to_keep=POSITIONS, compression=off).logits[0]

    return _run_all(run, prompts(processor, videos))


def library_logits(
    folder: Path, processor: LlavaUHDProcessor, dtype: torch.dtype, videos: bool
) -> dict[str, torch.Tensor]:
    """The same of a folder that transformers' own classes read.

    Args:
        folder: written for them.
        processor: ours of the same model, which makes the inputs: what differs is the model alone.
        dtype: of the computation.
        videos: with a video.

    Raises:
        UserError: the classes miss weights, or do not know some.
    """
    from transformers import AutoModelForImageTextToText

    with quiet_library():
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise UserError(f"{folder}: {type(model).__name__} misses or does not know {wrong[:8]}")
    model = model.eval()

    def run(prompt: Prompt) -> torch.Tensor:
        inputs = library_inputs(model.config, processor, *prompt)
        logits: torch.Tensor = model(**inputs, logits_to_keep=POSITIONS).logits[0]
        return logits

    return _run_all(run, prompts(processor, videos))


def _run_all(
    run: Callable[[Prompt], torch.Tensor], asked: dict[str, Prompt]
) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return {name: run(prompt).float() for name, prompt in asked.items()}


def compare_logits(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], dtype: torch.dtype
) -> Agreement:
    """How far the logits of two models are apart.

    Args:
        first: (positions, vocabulary) by prompt.
        second: of the other; a larger vocabulary has rows for placeholders behind the words.
        dtype: in which both were computed.

    Raises:
        UserError: the two tokenizers differ.
    """
    difference = scale = 0.0
    for name, own in first.items():
        if len(own) != len(second[name]):
            raise UserError(f"the two models read the prompt '{name}' as other numbers of tokens")
        words = min(own.shape[-1], second[name].shape[-1])
        apart = (own[:, :words] - second[name][:, :words]).abs().max()
        # A NaN on one side must not pass for agreement.
        difference = max(difference, float(torch.nan_to_num(apart, nan=torch.inf)))
        scale = max(scale, float(own[:, :words].abs().max()))
    return Agreement(difference, scale, dtype, tuple(first))


def check_agreement(
    source: Path,
    out: Path,
    processor: LlavaUHDProcessor,
    *,
    library: bool,
    videos: bool,
    rounded: torch.dtype | None = None,
) -> Agreement:
    """Computes the logits of both, one after the other.

    Args:
        source: folder that was converted.
        out: what was written.
        processor: of the source.
        library: ``out`` is for transformers' own classes, which then compute it.
        videos: both know videos, and read them alike.
        rounded: dtype that the weights were converted to, or None.

    Raises:
        UserError: they differ by more than rounding.
    """
    dtype = checked_dtype(out)
    first = our_logits(source, dtype, rounded, videos)
    gc.collect()
    if library:
        second = library_logits(out, processor, dtype, videos)
    else:
        second = our_logits(out, dtype, None, videos)
    found = compare_logits(first, second, dtype)
    if not found.holds:
        raise UserError(
            f"{out} was written but does not compute what {source} does: {found}; do not use it, "
            "and report the two configurations"
        )
    return found


def checked_dtype(folder: Path) -> torch.dtype:
    """float32 where such a model fits in half of the free memory, else bfloat16."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    # At most twice as large in float32 as it is stored in half precision.
    return torch.float32 if 2 * size <= _free_memory() / 2 else torch.bfloat16


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 16 * 10**9  # a system that does not tell


# --- inputs of transformers' classes --------------------------------------------------------------


def library_inputs(
    config: Any, processor: LlavaUHDProcessor, text: str, given: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """A prompt of one row as the classes take it, from the views that our processor cuts.

    Args:
        config: of the class.
        processor: ours, with the same placeholder.
        text: see `LlavaUHDProcessor`.
        given: ``images`` or ``videos`` as it takes them, or neither.
    """
    inputs = processor(text=text, **given)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": mask}
    if not given:
        return found
    views = torch.stack(list(_views(inputs, processor.image_config)))
    if "videos" in given:
        found["input_ids"] = ids.masked_fill(ids == config.image_token_id, config.video_token_id)
        found["pixel_values_videos"] = views.unsqueeze(0)
        return found
    if config.model_type == "llava":
        found["pixel_values"] = views
        return found
    images = given["images"]
    sizes = [image.size for image in images]
    several = len(images) > 1
    plans = [processor.plan(width, height, several=several) for width, height in sizes]
    counts = [plan.num_views for plan in plans]
    pieces = [
        torch.nn.functional.pad(piece, (0,) * 7 + (max(counts) - len(piece),))
        for piece in views.split(counts)
    ]
    found["pixel_values"] = torch.stack(pieces)
    found["image_sizes"] = torch.tensor([[height, width] for width, height in sizes])
    if config.model_type == "llava_onevision":
        found["batch_num_images"] = torch.tensor([len(images)])
    return found


def _views(inputs: Any, image: Any) -> Iterator[torch.Tensor]:
    """(3, side, side) pictures of packed patches; a rest of a patch, which is not read, is zero."""
    side, patch = image.scale_resolution, image.patch_size
    start = 0
    for rows, columns in inputs["view_grids"].tolist():
        patches = inputs["pixel_values"][start : start + rows * columns]
        start += rows * columns
        tiles = patches.reshape(rows, columns, 3, patch, patch).permute(2, 0, 3, 1, 4)
        picture = tiles.reshape(3, rows * patch, columns * patch)
        rest = (0, side - columns * patch, 0, side - rows * patch)
        yield torch.nn.functional.pad(picture, rest)
