"""Batched answers: left padding, like lengths together, one bad item never takes others along."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

from PIL import Image
from transformers import BatchFeature

from llava_uhd.errors import UserError
from llava_uhd.eval.answers import Answer
from llava_uhd.eval.task import Item
from llava_uhd.images.pixels import ImageSource
from llava_uhd.images.stored import StoredFile
from llava_uhd.images.video import VideoSource, frame_size, num_frames
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.prompting import StopOnText, cut_at_stop, extra_stops, prompt_text
from llava_uhd.text.templates import Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How answers are generated.

    Attributes:
        max_new_tokens: most tokens of an answer.
        beams: of beam search; 1 is greedy.
        batch_size: questions answered together; it does not change the answers.
    """

    max_new_tokens: int = 128
    beams: int = 1
    batch_size: int = 8


@dataclass(frozen=True)
class Failure:
    """A question that got no answer, and why."""

    id: str | int
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Result of one batch.

    Attributes:
        answers: of the items that worked.
        failures: of the others.
        seconds: spent in generation.
    """

    answers: list[Answer]
    failures: list[Failure]
    seconds: float


@dataclass(frozen=True)
class _Batch:
    items: list[Item]
    prompts: list[str]
    inputs: BatchFeature | None
    failures: list[Failure]


class Prompts(Protocol):
    """Writes the prompts of items: a `Task`, or an adapter of another harness."""

    def turns(self, item: Item) -> list[Turn]:
        """The conversation that is sent."""
        ...


class Answerer:
    """Answers the items of a task with a model.

    Args:
        model: in evaluation mode, on its device.
        processor: of the model.
        task: writes the prompts.
        limits: of generation.
    """

    def __init__(
        self,
        model: LlavaUHDForConditionalGeneration,
        processor: LlavaUHDProcessor,
        task: Prompts,
        limits: Limits,
    ) -> None:
        self.model = model
        self.processor = processor
        self.task = task
        self.limits = limits
        self.stops = extra_stops(processor.template, processor.tokenizer)
        self.context = getattr(model.config.text_config, "max_position_embeddings", None)

    def length(self, item: Item) -> int:
        """Estimated tokens of a prompt: image sizes from file headers, four characters a token."""
        total = sum(len(turn.text) for turn in self.task.turns(item)) // 4
        for source in item.images:
            size = image_size(source)
            total += self.processor.num_image_tokens(*size) if size else 0
        return total + sum(self._video_length(video) for video in item.videos)

    def _video_length(self, video: VideoSource) -> int:
        try:
            frames = num_frames(video, self.processor.video_config)
            return self.processor.num_video_tokens(frames, *frame_size(video))
        except (OSError, UserError):
            return 0  # answering it will say why

    def run(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Answers items in batches, in the order given.

        The next batch is read and sliced while the model works on this one: only then are its
        items taken out of the sequence, which may make them at that moment.
        """
        size = self.limits.batch_size
        starts = range(0, len(items), size)
        if not starts:
            return

        def read(start: int) -> _Batch:
            return self._encode(list(items[start : start + size]))

        with ThreadPoolExecutor(max_workers=1) as reader:
            ready = reader.submit(read, starts[0])
            for following in [*starts[1:], None]:
                batch = ready.result()
                if following is not None:
                    ready = reader.submit(read, following)
                yield self._answer(batch)

    def _prompt(self, item: Item) -> str:
        return prompt_text(self.processor.template, self.task.turns(item))

    def _inputs(self, items: Sequence[Item]) -> tuple[list[str], BatchFeature]:
        prompts = [self._prompt(item) for item in items]
        images = [list(item.images) for item in items]
        videos = [list(item.videos) for item in items]
        inputs = self.processor(
            text=prompts,
            images=images if any(images) else None,
            videos=videos if any(videos) else None,
        )
        longest = int(inputs["attention_mask"].sum(1).max())
        if self.context is not None and longest > self.context:
            raise UserError(f"the prompt has {longest} tokens, the model takes {self.context}")
        return prompts, inputs

    def _encode(self, items: list[Item]) -> _Batch:
        try:
            return _Batch(items, *self._inputs(items), [])
        except Exception as error:  # whatever one item does, the others are answered
            if len(items) == 1:
                return _Batch([], [], None, [_failure(items[0], error)])
        good, failures = [], []
        for item in items:
            try:
                self._inputs([item])
                good.append(item)
            except Exception as error:
                failures.append(_failure(item, error))
        if not good:
            return _Batch([], [], None, failures)
        return _Batch(good, *self._inputs(good), failures)

    def _answer(self, batch: _Batch) -> Outcome:
        start = time.perf_counter()
        answers: list[Answer] = []
        failures = list(batch.failures)
        again: list[Item] = []
        if batch.inputs is not None:
            try:
                answers = self._generate(batch.items, batch.prompts, batch.inputs)
            except Exception as error:  # see `_encode`
                if len(batch.items) == 1:
                    failures.append(_failure(batch.items[0], error))
                else:
                    logger.warning("a batch of %d failed (%s): one by one", len(batch.items), error)
                    again = batch.items
        # Not inside the handler: the error holds the memory of the failed batch.
        for item in again:
            alone = self._answer(self._encode([item]))
            answers += alone.answers
            failures += alone.failures
        return Outcome(answers, failures, time.perf_counter() - start)

    def decoding(self) -> dict[str, Any]:
        """Options of the library's ``generate``."""
        return {
            "do_sample": False,
            "num_beams": self.limits.beams,
            "max_new_tokens": self.limits.max_new_tokens,
        }

    def _generate(
        self, items: Sequence[Item], prompts: Sequence[str], inputs: BatchFeature
    ) -> list[Answer]:
        tokenizer = self.processor.tokenizer
        width = inputs["input_ids"].shape[1]
        stopping = [StopOnText(tokenizer, self.stops, width)] if self.stops else None
        rows = self.model.generate(
            **inputs.to(self.model.device), **self.decoding(), stopping_criteria=stopping
        )[:, width:].cpu()
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        lengths = inputs["attention_mask"].sum(1).tolist()
        settings = self.model.generation_config
        found = settings.eos_token_id if settings else None
        ends = set(found if isinstance(found, list) else [found])
        used = [count_new(row.tolist(), ends, tokenizer.pad_token_id) for row in rows]
        return [
            Answer(item.id, prompt, cut_at_stop(text, self.stops).strip(), length, count)
            for item, prompt, text, length, count in zip(
                items, prompts, texts, lengths, used, strict=True
            )
        ]


def image_size(source: ImageSource) -> tuple[int, int] | None:
    """(width, height) from the header of a picture, or None if that cannot be read."""
    if isinstance(source, Image.Image):
        return source.size
    if not isinstance(source, str | PathLike | StoredFile):
        return None
    try:
        with Image.open(source.open() if isinstance(source, StoredFile) else source) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # answering it will say why


def count_new(row: Sequence[int], ends: Collection[int | None], pad: int | None) -> int:
    """Generated tokens of a row, without the padding behind its end.

    Example: ``count_new([5, 6, 2, 0, 0], {2}, 0)`` is 3.
    """
    for index, token in enumerate(row):
        if token in ends:
            return index + 1
    count = len(row)
    while count and row[count - 1] == pad:
        count -= 1
    return count


def _failure(item: Item, error: Exception) -> Failure:
    reason = (str(error).strip().splitlines() or [""])[0]
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return Failure(item.id, f"{name}{reason}")
