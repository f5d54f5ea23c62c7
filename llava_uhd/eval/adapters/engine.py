"""A checkpoint that answers what other harnesses ask: loading, decoding, batches."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_uhd.checkpoint.load import load_pretrained, parse_dtype
from llava_uhd.checkpoint.sources import find_checkpoint, resolve_folder
from llava_uhd.errors import UserError
from llava_uhd.eval.adapters.conversation import Asked
from llava_uhd.eval.generate import Answerer, Limits, Outcome
from llava_uhd.eval.protocols import OWN, PROTOCOLS, Measure, processor_for
from llava_uhd.eval.task import Item
from llava_uhd.model.devices import choose_device, choose_dtype
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import TEMPLATES, Turn

logger = logging.getLogger(__name__)

NEW_TOKENS = 1024  # where a harness sets no bound; so did the published wrappers
# The harness's default end of an answer, a blank line, which no published wrapper of LLaVA heeds.
USUAL_END = "\n\n"
# Passed on to the library as they are.
_PASSED = ("top_k", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_READ = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "until")


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is loaded.

    Attributes:
        pretrained: folder, name under ``checkpoints/``, or hub id.
        model_base: base of a projector-only or LoRA checkpoint.
        vision_tower: folder of a tower that replaces the checkpoint's own.
        template: conversation template in place of the checkpoint's.
        attn_implementation: "sdpa", "flash_attention_2", "eager"; None: the library's choice.
        device: "cuda", "cuda:1", "cpu", ...; None or "auto" chooses, and takes the GPU of this
            process where there are several.
        dtype: name; None or "auto" chooses by device.
        max_frames: most frames of a video; None: the checkpoint's own.
        all_frames: take as many frames of every video, some more than once if it is short.
        protocol: images as a published system was measured.
        measured_as: the benchmark whose measure in the protocol counts.
    """

    pretrained: str
    model_base: str | None = None
    vision_tower: str | None = None
    template: str | None = None
    attn_implementation: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_frames: int | None = None
    all_frames: bool = False
    protocol: str = OWN
    measured_as: str = "ocrbench"

    @property
    def measure(self) -> Measure:
        """How the protocol answers."""
        return PROTOCOLS.get(self.protocol).measure(self.measured_as)


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated.

    Attributes:
        max_new_tokens: most tokens.
        beams: of beam search.
        stops: texts that end an answer beside those of the template.
        sampling: options of the library, empty for greedy.
    """

    max_new_tokens: int = NEW_TOKENS
    beams: int = 1
    stops: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_decoding(given: Mapping[str, Any]) -> Decoding:
    """Generation options of a harness.

    ``until`` ends an answer, except a blank line, which stands there unless a task says otherwise.
    Answers are sampled where ``do_sample`` or, without it, a temperature above 0 asks for that.

    Raises:
        UserError: a value that is no number.
    """
    try:
        tokens, beams = (
            int(given.get("max_new_tokens") or NEW_TOKENS),
            int(given.get("num_beams") or 1),
        )
        temperature = float(given.get("temperature") or 0)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation options {dict(given)}: {error}") from None
    if tokens < 1 or beams < 1:
        raise UserError(f"max_new_tokens {tokens} and num_beams {beams} must be at least 1")
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    options = {name: given[name] for name in _PASSED if given.get(name) is not None}
    if temperature > 0 and given.get("do_sample", True):
        options |= {"do_sample": True, "temperature": temperature}
        options["top_p"] = 1.0 if given.get("top_p") is None else float(given["top_p"])
    else:
        options.pop("top_k", None)
    unknown = sorted(set(given) - {*_READ, *_PASSED})
    if unknown:
        logger.warning("generation options that are not used: %s", ", ".join(unknown))
    return Decoding(tokens, beams, tuple(s for s in stops if s and s != USUAL_END), options)


class HarnessAnswerer(Answerer):
    """`Answerer` under the options of a harness."""

    def __init__(
        self,
        model: LlavaUHDForConditionalGeneration,
        processor: LlavaUHDProcessor,
        decoding: Decoding,
        batch_size: int,
    ) -> None:
        limits = Limits(decoding.max_new_tokens, decoding.beams, batch_size)
        super().__init__(model, processor, Asked(), limits)
        self.stops = (*self.stops, *decoding.stops)
        self.sampling = decoding.sampling

    def decoding(self) -> dict[str, Any]:
        """Options of the library."""
        return {**super().decoding(), **self.sampling}


class Engine:
    """A loaded checkpoint.

    Args:
        settings: which one, and how.

    Attributes:
        model: in evaluation mode, on its device.
        processor: of the model, with the template and frames that were asked for.
    """

    def __init__(self, settings: Settings) -> None:
        device = choose_device(_of_this_process(settings.device))
        automatic = settings.dtype in (None, "auto")
        dtype = choose_dtype(device) if automatic else parse_dtype(settings.dtype)
        folder = resolve_folder(find_checkpoint(settings.pretrained), "checkpoint")
        self.model, processor = load_pretrained(
            folder,
            settings.model_base,
            settings.vision_tower,
            dtype=dtype,
            device=device,
            attn_implementation=settings.attn_implementation,
        )
        self.processor = adjusted(processor, settings)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def answer(
        self, items: Sequence[Item], decoding: Decoding, batch_size: int = 1
    ) -> Iterator[Outcome]:
        """Answers items in batches, in their order; an item is read when its batch is."""
        return HarnessAnswerer(self.model, self.processor, decoding, batch_size).run(items)

    @torch.inference_mode()
    def loss(self, item: Item, answer: str) -> tuple[float, bool]:
        """How well an answer fits: mean cross entropy of its tokens, and whether greedy gives it.

        The text that ends an answer counts too, as in training.
        """
        turns = [*item.history, Turn("human", item.question), Turn("gpt", answer)]
        sample = self.processor.encode_conversation(turns, item.images, item.videos)
        names = ("pixel_values", "view_grids", "token_maps")
        inputs = {name: sample[name].to(self.device) for name in names if name in sample}
        ids = sample["input_ids"][None].to(self.device)
        logits = self.model(input_ids=ids, logits_to_keep=0, **inputs).logits[0, :-1].float()
        start, end = last_run((sample["labels"] >= 0).tolist())
        wanted, found = ids[0, start:end], logits[start - 1 : end - 1]
        loss = torch.nn.functional.cross_entropy(found, wanted)
        return float(loss), bool((found.argmax(-1) == wanted).all())


def last_run(flags: Sequence[bool]) -> tuple[int, int]:
    """Begin and end of the last run of True; equal where there is none.

    Example: ``last_run([True, False, True, True, False])`` is ``(2, 4)``.
    """
    end = len(flags)
    while end and not flags[end - 1]:
        end -= 1
    start = end
    while start and flags[start - 1]:
        start -= 1
    return start, end


def adjusted(processor: LlavaUHDProcessor, settings: Settings) -> LlavaUHDProcessor:
    """The processor with the template, frames and images that the settings ask for.

    Raises:
        UserError: an unknown template or a number of frames that cannot be.
    """
    video = processor.video_config
    if settings.max_frames is not None:
        force = settings.all_frames or video.force_sample
        video = dataclasses.replace(video, max_frames=settings.max_frames, force_sample=force)
    template = settings.template or processor.template_name
    TEMPLATES.get(template)
    if template != processor.template_name or video != processor.video_config:
        same = TEMPLATES.get(template) == processor.template
        processor = LlavaUHDProcessor(
            processor.tokenizer,
            dataclasses.asdict(processor.image_config),
            dataclasses.asdict(processor.projector_config),
            template,
            processor.chat_template if same else None,
            processor.template_mode,
            dataclasses.asdict(video),
        )
    image = dataclasses.replace(processor.image_config, **settings.measure.image)
    return processor_for(processor, image)


def _of_this_process(name: str | None) -> str | None:
    """The GPU of this process where there are several processes; else what the user said."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name in (None, "", "auto", "cuda") and several and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return name
