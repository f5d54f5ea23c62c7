"""One conversation with a model: what was said, what was shown, and the answer as it comes.

Everything that talks to a user goes through `ChatEngine`. A conversation holds clean text and
pictures only; each request is rendered with the template of the checkpoint and encoded anew, as in
training.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, TextIteratorStreamer

from llava_uhd.config.model import VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import ImageSource, open_image
from llava_uhd.images.video import Video, VideoSource, read_video, time_instruction
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.prompting import StopOnText, extra_stops, prompt_text, until_stop
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER, Turn


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 is greedy, anything above samples.
        top_p: smallest set of tokens with this probability is drawn from; None is all.
        max_new_tokens: most tokens of an answer.
        seed: of the random numbers; None leaves them as they are.
        stop: texts that end the answer, beside those of the template; they are not part of it.
    """

    temperature: float = 0.2
    top_p: float | None = None
    max_new_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if any(not stop for stop in self.stop):
            raise UserError("a stop text is empty")

    def arguments(self) -> dict[str, Any]:
        """For ``generate``."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0}


@dataclass
class Conversation:
    """What was said and shown so far.

    Attributes:
        turns: human and gpt in alternation; each image or video is a marker in its turn's text.
        images: of all turns, in order.
        videos: of all turns, in order.
        pending: shown, but not yet part of a turn: they go with the next question.
        pending_videos: the same.
    """

    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    pending: list[Image.Image] = field(default_factory=list)
    pending_videos: list[Video] = field(default_factory=list)

    def add_image(self, source: ImageSource) -> Image.Image:
        """Attaches a picture to the next question.

        Raises:
            UserError: it cannot be read.
        """
        image = open_image(source)
        self.pending.append(image)
        return image

    def add_video(self, source: VideoSource, config: VideoConfig) -> Video:
        """Attaches a video to the next question.

        Args:
            source: file, or folder of frames.
            config: which frames are taken.

        Raises:
            UserError: it cannot be read.
        """
        video = read_video(source, config)
        self.pending_videos.append(video)
        return video

    def clear(self) -> None:
        """Forgets everything."""
        for kept in (self.turns, self.images, self.videos, self.pending, self.pending_videos):
            kept.clear()

    def question(self, text: str, *, tell_times: bool = False) -> Turn:
        """The next human turn, with the pending images and videos.

        They stand in front of the text, each on its own line, as in training; or, if the text
        holds markers itself, where those are.

        Args:
            text: of the question.
            tell_times: say how long each pending video is and when its frames were taken.

        Raises:
            UserError: the text has markers, but not one for each pending image or video.
        """
        front = ""
        for marker, waiting, kind in (
            (IMAGE_MARKER, len(self.pending), "images"),
            (VIDEO_MARKER, len(self.pending_videos), "videos"),
        ):
            markers = text.count(marker)
            # Without a video the word is a word: questions about web pages have it.
            if markers and markers != waiting and (waiting or marker == IMAGE_MARKER):
                raise UserError(
                    f"the text has {markers} {marker} but {waiting} {kind} wait: "
                    "write one for each of them, or none"
                )
            front += "" if markers else f"{marker}\n" * waiting
        if tell_times:
            front += "".join(f"{time_instruction(video)}\n" for video in self.pending_videos)
        return Turn("human", front + text)

    def record(self, question: Turn, answer: str) -> None:
        """Stores a finished round; the pending images and videos now belong to it."""
        clean = answer.strip()
        # A marker that the model wrote itself must not be taken for an image.
        for marker in (IMAGE_MARKER, VIDEO_MARKER):
            clean = clean.replace(marker, marker.replace("<", "< "))
        self.turns += [question, Turn("gpt", clean)]
        self.images += self.pending
        self.videos += self.pending_videos
        self.pending, self.pending_videos = [], []


class _Cancel(StoppingCriteria):
    """Ends generation when asked from another thread."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


class ChatEngine:
    """Answers conversations with one model, one at a time.

    Args:
        model: in evaluation mode, on its device.
        processor: of the model.
    """

    def __init__(
        self, model: LlavaUHDForConditionalGeneration, processor: LlavaUHDProcessor
    ) -> None:
        self.model = model
        self.processor = processor
        self.stops = extra_stops(processor.template, processor.tokenizer)
        # The seed is the process's: two generations at a time would draw from each other's.
        self._lock = threading.Lock()

    def stream(
        self, conversation: Conversation, text: str, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Asks a question and yields the answer in pieces as it is generated.

        The round is added to the conversation when the answer ends. If the caller stops reading
        (closes the iterator), generation ends too and what was said so far is kept. After an error
        the conversation is as before.

        Args:
            conversation: is continued.
            text: the question.
            sampling: None takes the defaults.

        Raises:
            UserError: the conversation is too long for the model, or its images do not fit.
            Exception: whatever generation raised, in the caller's thread.
        """
        sampling = sampling or Sampling()
        tell_times = self.processor.video_config.time_instruction
        question = conversation.question(text, tell_times=tell_times)
        inputs = self.encode(
            [*conversation.turns, question],
            [*conversation.images, *conversation.pending],
            [*conversation.videos, *conversation.pending_videos],
        )
        said: list[str] = []
        pieces = self.generate(inputs, sampling)
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            pieces.close()
            if said:
                conversation.record(question, "".join(said))
            raise
        conversation.record(question, "".join(said))

    def reply(self, conversation: Conversation, text: str, sampling: Sampling | None = None) -> str:
        """Asks a question and returns the whole answer; see `stream`."""
        for _ in self.stream(conversation, text, sampling):
            pass
        return conversation.turns[-1].text

    def encode(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image.Image],
        videos: Sequence[Video] = (),
    ) -> BatchFeature:
        """Model inputs of a conversation that waits for an answer.

        Raises:
            UserError: it leaves no room for an answer.
        """
        prompt = prompt_text(self.processor.template, turns)
        inputs = self.processor(
            text=prompt, images=list(images) or None, videos=list(videos) or None
        )
        length, context = inputs["input_ids"].shape[1], self.context
        if context is not None and length >= context:
            placeholder = self.processor.image_token_id
            visual = int((inputs["input_ids"] == placeholder).sum())
            raise UserError(
                f"the conversation has {length} tokens, {visual} of them from images, and the "
                f"model takes {context}: start a new one, or show fewer or smaller images"
            )
        return inputs

    @property
    def context(self) -> int | None:
        """Most tokens that the model takes, or None if it does not say."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    def generate(self, inputs: BatchFeature, sampling: Sampling) -> Generator[str, None, None]:
        """Streams the text that follows encoded inputs, without the white space in front of it.

        Closing the generator ends the generation.
        """
        stops = (*self.stops, *sampling.stop)
        tokenizer = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        length, context = inputs["input_ids"].shape[1], self.context
        room = sampling.max_new_tokens if context is None else context - length
        cancel = _Cancel()
        failures: list[Exception] = []

        def work() -> None:
            try:
                with self._lock:
                    if sampling.seed is not None:
                        torch.manual_seed(sampling.seed)
                    self.model.generate(
                        **inputs.to(self.model.device),
                        **sampling.arguments(),
                        max_new_tokens=min(sampling.max_new_tokens, room),
                        stopping_criteria=[cancel, StopOnText(tokenizer, stops, length)],
                        streamer=streamer,
                    )
            except Exception as error:  # raised again where the answer is read
                failures.append(error)
            finally:
                # After an error the streamer itself would leave its reader waiting for ever.
                streamer.text_queue.put(streamer.stop_signal)

        worker = threading.Thread(target=work, name="llava_uhd chat", daemon=True)
        worker.start()
        begun = False
        try:
            for piece in until_stop(streamer, stops):
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                if piece:
                    yield piece
        finally:
            cancel.asked.set()
            worker.join()
        if failures:
            raise failures[0]
