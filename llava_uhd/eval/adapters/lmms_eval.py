"""Plug-in for lmms-eval: ``lmms_eval --model llava_uhd --model_args pretrained=DIR --tasks ...``.

The harness finds `manifest` through the entry point group ``lmms_eval.models`` and then takes
`LlavaUHDChat` (messages; its default) or `LlavaUHDSimple` (``--force_simple``) out of this module.
Both are made when they are asked for, since their base class is the harness's: importing this
module does not need it. Interface: lmms-eval 0.7.3.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from llava_uhd.errors import UserError
from llava_uhd.eval.adapters.conversation import (
    Message,
    Part,
    failed_item,
    image_source,
    make_item,
    video_source,
    visual_part,
)
from llava_uhd.eval.adapters.engine import Engine, Settings, read_decoding
from llava_uhd.eval.task import Item

logger = logging.getLogger(__name__)

MODEL_ID = "llava_uhd"
# Options of the published wrapper of LLaVA-OneVision that say nothing here: the checkpoint knows.
_UNUSED = ("model_name", "use_cache", "truncation", "trust_remote_code", "max_batch_size")


def manifest() -> Any:
    """What the harness registers.

    Returns:
        Its ``ModelManifest``, with both classes.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{__name__}.LlavaUHDSimple",
        chat_class_path=f"{__name__}.LlavaUHDChat",
        aliases=("llava-uhd",),
    )


def read_model_args(given: Mapping[str, Any]) -> Settings:
    """``--model_args`` of a command line.

    ``max_frames`` bounds the frames of a video; ``max_frames_num``, as the published wrapper calls
    it, takes as many of every video. ``device_map`` names a device, or "auto" the best one: a model
    is not spread over several.

    Raises:
        UserError: no checkpoint, an unknown option, or a bad value.
    """
    options = {name: value for name, value in given.items() if value not in (None, "")}
    ignored = [name for name in _UNUSED if options.pop(name, None) is not None]
    if ignored:
        logger.info("model_args that the checkpoint knows itself: %s", ", ".join(ignored))
    if "pretrained" not in options:
        raise UserError("model_args: pretrained=CHECKPOINT_DIR is missing")
    device, placed = options.pop("device", None), options.pop("device_map", None)
    if placed not in (None, "auto", "balanced", "sequential"):
        device = placed
    every, most = options.pop("max_frames_num", None), options.pop("max_frames", None)
    frames = most if every is None else every
    try:
        return Settings(
            pretrained=str(options.pop("pretrained")),
            template=options.pop("conv_template", None),
            device=None if device is None else str(device),
            max_frames=None if frames is None else int(frames),
            all_frames=every is not None,
            **_only_known(options),
        )
    except ValueError as error:
        raise UserError(f"model_args: {error}") from None


def _only_known(options: Mapping[str, Any]) -> dict[str, Any]:
    known = ("model_base", "vision_tower", "attn_implementation", "dtype", "protocol")
    unknown = sorted(set(options) - set(known))
    if unknown:
        others = ("pretrained", "conv_template", "device_map", "max_frames", "max_frames_num")
        raise UserError(
            f"unknown option {', '.join(unknown)} (known: {', '.join((*others, *known))})"
        )
    return dict(options)


def batch_size_of(value: Any) -> int:
    """``--batch_size`` of a command line; "auto" is 1.

    Raises:
        UserError: no positive number.
    """
    try:
        size = 1 if str(value).startswith("auto") else int(value)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise UserError(f"batch_size {value!r} must be a whole number of at least 1, or auto")
    return size


class _Lazy(Sequence[Item]):
    """Items that are made when their batch is read: their images take memory only then."""

    def __init__(self, requests: Sequence[Any], make: Callable[[int, Any], Item]) -> None:
        self.requests = requests
        self.make = make

    def __len__(self) -> int:
        return len(self.requests)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """An item, or those of a batch; their ids are their places."""
        if isinstance(index, int):
            try:
                return self.make(index, self.requests[index])
            except Exception as error:  # whatever one question does, the others are answered
                return failed_item(index, error)
        return [self[place] for place in range(*index.indices(len(self)))]


class HarnessModel:
    """What both classes share; lmms-eval's ``lmms`` is the other base.

    Args:
        batch_size: questions answered together; it does not change greedy answers.
        **options: see `read_model_args`.

    Attributes:
        engine: the loaded checkpoint.
    """

    # Of the harness.
    task_dict: Any
    cache_hook: Any
    is_simple: bool

    def __init__(self, batch_size: Any = 1, **options: Any) -> None:
        super().__init__()
        settings = read_model_args(options)
        self.batch_size_per_gpu = batch_size_of(batch_size)
        self.pretrained = settings.pretrained
        self.engine = Engine(settings)

    @property
    def batch_size(self) -> int:
        """Questions answered together."""
        return self.batch_size_per_gpu

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.engine.device

    @property
    def model(self) -> Any:
        """The model."""
        return self.engine.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.engine.processor.tokenizer

    def split_args(self, args: tuple[Any, ...]) -> tuple[Mapping[str, Any], Any]:
        """Generation options and the function that makes a question of a document."""
        raise NotImplementedError

    def make_item(self, place: int, args: tuple[Any, ...], metadata: Mapping[str, Any]) -> Item:
        """The item of a request."""
        raise NotImplementedError

    def document(self, args: tuple[Any, ...]) -> Any:
        """The row of the data that a request is about."""
        doc_id, task, split = args[3:6]
        return self.task_dict[task][split][doc_id]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            UserError: questions that could not be answered, when all others are.
        """
        if not requests:
            return []
        from lmms_eval.utils import Collator

        # Long questions first: what does not fit into the memory fails at once.
        collator = Collator(
            [(*request.args, getattr(request, "metadata", None)) for request in requests],
            lambda args: (-len(args[0]), args[0]),
            group_fn=lambda args: self.split_args(args)[0],
            grouping=True,
        )
        answers: list[str] = []
        failures: list[str] = []
        for chunk in self._groups(collator.get_batched(n=self.batch_size)):
            found = self._answer(chunk, failures)
            answers += found
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            raise UserError(
                f"{len(failures)} of {len(requests)} questions failed: {failures[0]}{more}"
            )
        return list(collator.get_original(answers))

    def _groups(self, chunks: Iterator[Sequence[Any]]) -> Iterator[list[Any]]:
        """Batches in a row with the same options as one list: the engine forms them again."""
        group: list[Any] = []
        for chunk in chunks:
            # A short batch ends a group, or the next group would begin inside it.
            same = group and self.split_args(group[0])[0] == self.split_args(chunk[0])[0]
            if group and (not same or len(group) % self.batch_size):
                yield group
                group = []
            group += chunk
        if group:
            yield group

    def _answer(self, group: Sequence[Any], failures: list[str]) -> list[str]:
        options = self.split_args(group[0])[0]
        items = _Lazy(group, lambda place, args: self.make_item(place, args[:-1], args[-1] or {}))
        texts: dict[Any, str] = {}
        for outcome in self.engine.answer(items, read_decoding(options), self.batch_size):
            for answer in outcome.answers:
                texts[answer.id] = answer.text
                context = group[int(answer.id)][0]
                self.cache_hook.add_partial("generate_until", (context, options), answer.text)
            for each in outcome.failures:
                doc_id, task, _ = group[int(each.id)][3:6]
                failures.append(f"{task} {doc_id}: {each.reason}")
                logger.error("failed: %s", failures[-1])
        return [texts.get(place, "") for place in range(len(group))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Mean cross entropy of each given answer, and whether greedy decoding gives it.

        As in the harness's other wrappers of LLaVA: its scores of choices take the smallest.
        """
        results = []
        for request in requests:
            context, target, to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            answer = target if isinstance(target, str) else target(document)
            parts = visual_parts(to_visual(document) if to_visual else None, {})
            message = Message("user", [*parts, Part("text", context)])
            results.append(self.engine.loss(make_item(0, [message]), answer))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Tasks of several rounds are not answered.

        Raises:
            UserError: always.
        """
        raise UserError("llava_uhd does not answer tasks of several rounds: leave them out")


class SimpleModel(HarnessModel):
    """Contexts, with images or videos beside them."""

    is_simple = True

    def split_args(self, args: tuple[Any, ...]) -> tuple[Mapping[str, Any], Any]:
        """See `HarnessModel`."""
        return args[1] or {}, args[2]

    def make_item(self, place: int, args: tuple[Any, ...], metadata: Mapping[str, Any]) -> Item:
        """Images or videos, then the context."""
        to_visual = self.split_args(args)[1]
        visuals = to_visual(self.document(args)) if to_visual else None
        parts = [*visual_parts(visuals, metadata), Part("text", args[0])]
        return make_item(place, [Message("user", parts)])


class ChatModel(HarnessModel):
    """Messages: texts, images and videos in any order."""

    is_simple = False

    def split_args(self, args: tuple[Any, ...]) -> tuple[Mapping[str, Any], Any]:
        """See `HarnessModel`."""
        return args[2] or {}, args[1]

    def make_item(self, place: int, args: tuple[Any, ...], metadata: Mapping[str, Any]) -> Item:
        """All messages of a document."""
        from lmms_eval.protocol import ChatMessages

        to_messages = self.split_args(args)[1]
        chat = ChatMessages(messages=to_messages(self.document(args)))
        if chat.extract_media()[2]:
            raise UserError("the question has a sound, which the model cannot hear")
        messages = [_message(each) for each in chat.to_hf_messages()]
        if _frames_of(metadata):
            messages = [_as_video(each, metadata) for each in messages]
        return make_item(place, messages)


def _as_video(message: Message, metadata: Mapping[str, Any]) -> Message:
    """The images of a message as the frames of one video, in front of the texts."""
    images = [part.value for part in message.parts if part.kind == "image"]
    others = [part for part in message.parts if part.kind != "image"]
    return Message(message.role, [*visual_parts(images, metadata), *others])


def _message(given: Mapping[str, Any]) -> Message:
    parts = []
    for content in given["content"]:
        kind = content["type"]
        if kind == "text":
            parts.append(Part("text", content["text"]))
        elif kind == "image":
            parts.append(Part("image", image_source(content["image"])))
        elif kind == "video":
            if content.get("video_start") is not None or content.get("video_end") is not None:
                raise UserError("a part of a video is asked for (video_start): cut the file first")
            parts.append(Part("video", video_source(content["video"])))
        else:
            raise UserError(f"a message has a part of the kind '{kind}'")
    return Message(given["role"], parts)


def visual_parts(visuals: Any, metadata: Mapping[str, Any]) -> list[Part]:
    """Images and videos of a document.

    Args:
        visuals: what ``doc_to_visual`` gives, None for a text alone.
        metadata: of the task; where it says ``task_type: video`` and ``sample_frames: N``, the
            images are frames of one video, of which N are taken at even distances.
    """
    if visuals is None:
        return []
    given = list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    count = _frames_of(metadata)
    if given and count:
        places = np.linspace(0, len(given) - 1, count, dtype=int)
        return [Part("video", video_source([given[place] for place in places]))]
    return [visual_part(each) for each in given]


def _frames_of(metadata: Mapping[str, Any]) -> int:
    """Frames to take where a task gives a video as images, else 0."""
    return int(metadata.get("sample_frames") or 0) if metadata.get("task_type") == "video" else 0


@functools.cache
def _classes() -> dict[str, type]:
    from lmms_eval.api.model import lmms

    bases = {"LlavaUHDSimple": SimpleModel, "LlavaUHDChat": ChatModel}
    return {
        name: type(name, (base, lmms), {"__module__": __name__, "__doc__": base.__doc__})
        for name, base in bases.items()
    }


def __getattr__(name: str) -> type:
    if name in ("LlavaUHDSimple", "LlavaUHDChat"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
