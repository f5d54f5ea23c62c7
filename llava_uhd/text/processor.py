"""Text and images in, model inputs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from llava_uhd.config.model import (
    ImageConfig,
    LlavaUHDConfig,
    ProjectorConfig,
    VideoConfig,
    make_part,
)
from llava_uhd.errors import UserError
from llava_uhd.images.anyres import expand_pinpoints
from llava_uhd.images.geometry import SlicePlan, map_side
from llava_uhd.images.maps import uses_maps
from llava_uhd.images.pixels import ImageSource
from llava_uhd.images.strategies import plan_image
from llava_uhd.images.tokens import view_token_counts
from llava_uhd.images.video import Video, VideoSource
from llava_uhd.text.encoding import IGNORE_INDEX, Encoding, encode_spans
from llava_uhd.text.faithful import encode_turns
from llava_uhd.text.layout import single_token_id
from llava_uhd.text.templates import (
    IMAGE_MARKER,
    TEMPLATES,
    VIDEO_MARKER,
    Span,
    Template,
    Turn,
)
from llava_uhd.text.visuals import EncodedVisual, VisualEncoder, vision_inputs


class LlavaUHDProcessor(ProcessorMixin):
    """Tokenizer, image plan, spatial schema and conversation template of one model.

    Args:
        tokenizer: a fast tokenizer.
        image_config: `ImageConfig` or dict, with the ids of placeholder and separators.
        projector_config: `ProjectorConfig` or dict; it decides how many tokens a view has.
        video_config: `VideoConfig` or dict.
        template_name: registered conversation template.
        template_mode: which labels `encode_conversation` makes: see `faithful.encode_turns`.
        chat_template: Jinja source; None takes the template's own.

    Use `from_parts` to make one for a new model: it fills the ids from the tokenizer.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_config: dict[str, Any] | None = None,
        projector_config: dict[str, Any] | None = None,
        template_name: str = "v1",
        chat_template: str | None = None,
        template_mode: str = "clean",
        video_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError("the processor needs a fast tokenizer (labels come from offsets)")
        # Plain dicts, because the library writes these attributes to processor_config.json.
        self._image = make_part(ImageConfig, image_config, "image_config")
        self._projector = make_part(ProjectorConfig, projector_config, "projector_config")
        self._video = make_part(VideoConfig, video_config, "video_config")
        self._visuals = VisualEncoder(self._image, self._video, self._projector)
        if self._image.layout == "rows":
            # Found before the first image: two views of different shape must have as many tokens.
            map_side(view_token_counts(self._projector, [(4, 5), (3, 7)]))
        if self._image.strategy == "anyres":  # as early, and not as a fault of the first image
            expand_pinpoints(self._image.pinpoints, self._image.scale_resolution)
        self.template_name = template_name
        self.template_mode = template_mode
        self.image_token = IMAGE_MARKER
        super().__init__(tokenizer, chat_template=chat_template or self.template.chat_template)

    @classmethod
    def from_parts(
        cls, tokenizer: PreTrainedTokenizerBase, config: LlavaUHDConfig
    ) -> LlavaUHDProcessor:
        """Makes the processor of a new model and writes the ids it chose into ``config.image``.

        The placeholder becomes a special token of the tokenizer, outside the model's vocabulary;
        ids that ``config.image`` holds already (from a checkpoint) are kept.

        Raises:
            UserError: the tokenizer does not write a separator as one token.
        """
        image = config.image
        if image.image_token_id is None:
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False
            )
            image.image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))
        if image.comma_id is None:
            image.comma_id = single_token_id(tokenizer, ",")
        if image.newline_id is None:
            image.newline_id = single_token_id(tokenizer, "\n")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        return cls(
            tokenizer,
            dataclasses.asdict(image),
            dataclasses.asdict(config.projector),
            config.template,
            video_config=dataclasses.asdict(config.video),
        )

    def to_dict(self) -> dict[str, Any]:
        """Adds the typed parts as plain dicts."""
        values = super().to_dict()
        values["image_config"] = dataclasses.asdict(self._image)
        values["projector_config"] = dataclasses.asdict(self._projector)
        values["video_config"] = dataclasses.asdict(self._video)
        return values

    @property
    def image_config(self) -> ImageConfig:
        """How images become views."""
        return self._image

    @property
    def projector_config(self) -> ProjectorConfig:
        """How views become tokens."""
        return self._projector

    @property
    def video_config(self) -> VideoConfig:
        """How videos are read."""
        return self._video

    @property
    def template(self) -> Template:
        """The conversation template."""
        return TEMPLATES.get(self.template_name)

    @property
    def image_token_id(self) -> int | None:
        """Id of the placeholder."""
        return self._image.image_token_id

    @property
    def model_input_names(self) -> list[str]:
        """Keys that `__call__` may return."""
        names = ["input_ids", "attention_mask", "pixel_values", "view_grids"]
        return [*names, "token_maps"] if self._with_maps else names

    @property
    def _with_maps(self) -> bool:
        return uses_maps(self._image, self._video)

    def plan(
        self, width: int, height: int, overview_only: bool = False, several: bool = False
    ) -> SlicePlan:
        """Plan of the views of an image of this size; ``several``: it is not the only one."""
        return plan_image(self._image, width, height, overview_only, several)

    def num_image_tokens(
        self, width: int, height: int, overview_only: bool = False, several: bool = False
    ) -> int:
        """Positions one image takes in the sequence, separators included.

        Example: 144 queries, 672 x 1008: 1014.
        """
        return len(self._visuals.image_ids(width, height, overview_only, several))

    def num_video_tokens(self, frames: int, width: int, height: int) -> int:
        """Positions a video of so many frames of this size takes in the sequence."""
        return len(self._visuals.video_ids(frames, width, height))

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: Any = None,
        videos: Any = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        overview_only: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts with images and videos to the inputs of ``generate``.

        Args:
            text: one prompt or several; each ``<image>`` takes the next image, each ``<video>`` the
                next video.
            images: paths or PIL images in reading order, flat or one list per prompt.
            videos: the same for ``<video>``: files, folders of frames, or lists of PIL images (then
                one list of videos per prompt is needed).
            return_tensors: "pt", or None for lists of ids.
            padding: pad several prompts to the longest.
            padding_side: "left" (generation) or "right".
            add_special_tokens: begin with the tokenizer's begin token.
            overview_only: no slices (first training stage).
            **kwargs: accepted for the library's interface: none is used.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (B, T); with images also ``pixel_values``
            float32 (P, 3 * p * p) and ``view_grids`` int64 (V, 2), and ``token_maps`` int64 (M, 10)
            where the model joins or pools views.

        Raises:
            UserError: markers and images differ in number, or an image cannot be read.
        """
        if text is None or text == []:
            raise UserError("the processor needs text; an image alone is the text '<image>'")
        texts = [text] if isinstance(text, str) else list(text)
        given = _share(texts, IMAGE_MARKER, images)
        clips = _share(texts, VIDEO_MARKER, _one_video(videos))
        encodings = []
        visuals: list[EncodedVisual] = []
        for one, pictures, films in zip(texts, given, clips, strict=True):
            if VIDEO_MARKER in one and not films:
                raise UserError(f"the text has a {VIDEO_MARKER} but no video is given")
            found = self._visuals.encode_all(one, pictures, films, overview_only)
            marked = [Span(_as_images(one, films))]
            encoding = encode_spans(self.tokenizer, marked, [each.ids for each in found])
            if not add_special_tokens and encoding.input_ids[:1] == [self.tokenizer.bos_token_id]:
                encoding.input_ids = encoding.input_ids[1:]
            encodings.append(encoding)
            visuals += found
        data = self._pad(encodings, padding, padding_side)
        data |= vision_inputs(visuals, self._with_maps)
        if return_tensors is None:
            return BatchFeature(data)
        return BatchFeature(data, tensor_type=return_tensors)

    def _pad(self, encodings: list[Encoding], padding: bool, padding_side: str) -> dict[str, Any]:
        rows = [encoding.input_ids for encoding in encodings]
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids, masks = [], []
        for row in rows:
            gap = longest - len(row) if padding else 0
            left = gap if padding_side == "left" else 0
            ids.append([pad] * left + row + [pad] * (gap - left))
            masks.append([0] * left + [1] * len(row) + [0] * (gap - left))
        return {"input_ids": ids, "attention_mask": masks}

    def encode_conversation(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        overview_only: bool = False,
        max_length: int | None = None,
        overlong: str = "error",
    ) -> dict[str, Any]:
        """A training sample: ids, labels and pixels of one conversation.

        Args:
            turns: see `Template.spans`.
            images: one for each ``<image>`` of the turns, in order.
            videos: one for each ``<video>`` of the turns, in order.
            overview_only: no slices.
            max_length: most tokens, images included.
            overlong: see `Encoding.cut`.

        Returns:
            ``input_ids`` and ``labels`` int64 (T,), with images or videos ``pixel_values``,
            ``view_grids`` and, where the model needs them, ``token_maps``; ``num_visual_tokens``,
            ``dropped_images``, ``truncated_tokens`` ints.

        Raises:
            UserError: turns, markers or length do not fit.
        """
        if overlong not in ("error", "drop"):
            raise UserError(f"data.overlong must be 'error' or 'drop', got {overlong!r}")
        text = "".join(turn.text for turn in turns)
        visuals = self._visuals.encode_all(text, images, videos, overview_only)
        encoding = encode_turns(
            self.template_name,
            self.template_mode,
            self.tokenizer,
            [Turn(turn.role, _as_images(turn.text, videos)) for turn in turns],
            [each.ids for each in visuals],
            max_length=max_length,
        )
        truncated = dropped = 0
        if max_length is not None:
            truncated, dropped = encoding.cut(max_length, overlong)
        visuals = visuals[: len(encoding.runs)]
        sample: dict[str, Any] = {
            "input_ids": torch.tensor(encoding.input_ids, dtype=torch.long),
            "labels": torch.tensor(encoding.labels, dtype=torch.long),
            "num_visual_tokens": sum(each.num_tokens for each in visuals),
            "dropped_images": dropped,
            "truncated_tokens": truncated,
        }
        return sample | vision_inputs(visuals, self._with_maps)


def _as_images(text: str, videos: Sequence[Any]) -> str:
    """The text with one kind of marker: from here on a video is a visual like an image."""
    return text.replace(VIDEO_MARKER, IMAGE_MARKER) if videos else text


def _one_video(videos: Any) -> Any:
    """A single video, or a list of PIL frames, as a list of one video."""
    if isinstance(videos, Video):
        return [videos]
    if isinstance(videos, list | tuple) and videos and isinstance(videos[0], Image.Image):
        return [list(videos)]
    return videos


def _share(texts: list[str], marker: str, given: Any) -> list[list[Any]]:
    """Images or videos of each text, from a flat or a nested list.

    Raises:
        UserError: the numbers do not fit.
    """
    kind = "images" if marker == IMAGE_MARKER else "videos"
    counts = [text.count(marker) for text in texts]
    if given is None:
        if kind == "videos":
            return [[] for _ in texts]
        given = []
    elif isinstance(given, Video) or not isinstance(given, list | tuple):
        given = [given]
    if given and all(_is_list(item, kind) for item in given):
        nested = [list(item) for item in given]
        if len(nested) != len(texts):
            raise UserError(f"{len(texts)} texts but {len(nested)} lists of {kind}")
        return nested
    if sum(counts) != len(given):
        raise UserError(f"the text has {sum(counts)} {marker} but {len(given)} {kind} are given")
    remaining = iter(given)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _is_list(item: Any, kind: str) -> bool:
    """Whether an item is the list of one text, and not itself a video of frames."""
    if not isinstance(item, list | tuple) or isinstance(item, Video):
        return False
    return not (kind == "videos" and item and isinstance(item[0], Image.Image))


AutoProcessor.register(LlavaUHDConfig, LlavaUHDProcessor)

__all__ = ["IGNORE_INDEX", "LlavaUHDProcessor"]
