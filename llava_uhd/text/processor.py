"""Text and images in, model inputs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from llava_uhd.config.model import ImageConfig, LlavaUHDConfig, ProjectorConfig, make_part
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import SlicePlan, map_side, num_schema_tokens
from llava_uhd.images.pixels import ImageSource, open_image, pack_views, remove_detail
from llava_uhd.images.strategies import plan_image, prepared_size
from llava_uhd.images.tokens import view_token_counts
from llava_uhd.text.encoding import IGNORE_INDEX, Encoding, encode_spans
from llava_uhd.text.faithful import encode_turns
from llava_uhd.text.layout import image_ids, single_token_id
from llava_uhd.text.templates import IMAGE_MARKER, TEMPLATES, Span, Template, Turn


class EncodedImage(NamedTuple):
    """One image as the model reads it.

    Attributes:
        ids: in the text, placeholders and separators.
        pixel_values: float32 (P, 3 * p * p) packed patches.
        view_grids: int64 (V, 2) (rows, columns) of the views.
        grid: (columns, rows) of the slices, (0, 0) unsliced.
    """

    ids: list[int]
    pixel_values: torch.Tensor
    view_grids: torch.Tensor
    grid: tuple[int, int]


class LlavaUHDProcessor(ProcessorMixin):
    """Tokenizer, image plan, spatial schema and conversation template of one model.

    Args:
        tokenizer: a fast tokenizer.
        image_config: `ImageConfig` or dict, with the ids of placeholder and separators.
        projector_config: `ProjectorConfig` or dict; it decides how many tokens a view has.
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
        **kwargs: Any,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError("the processor needs a fast tokenizer (labels come from offsets)")
        # Plain dicts, because the library writes these attributes to processor_config.json.
        self._image = make_part(ImageConfig, image_config, "image_config")
        self._projector = make_part(ProjectorConfig, projector_config, "projector_config")
        if self._image.layout == "rows":
            # Found before the first image: two views of different shape must have as many tokens.
            map_side(view_token_counts(self._projector, [(4, 5), (3, 7)]))
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
        )

    def to_dict(self) -> dict[str, Any]:
        """Adds the typed parts as plain dicts."""
        values = super().to_dict()
        values["image_config"] = dataclasses.asdict(self._image)
        values["projector_config"] = dataclasses.asdict(self._projector)
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
        return [*names, "image_grids"] if self._image.layout == "rows" else names

    def plan(self, width: int, height: int, overview_only: bool = False) -> SlicePlan:
        """Plan of the views of an image of this size."""
        return plan_image(self._image, width, height, overview_only)

    def num_image_tokens(self, width: int, height: int, overview_only: bool = False) -> int:
        """Positions one image takes in the sequence, separators included.

        Example: 144 queries, 672 x 1008: 1014.
        """
        plan = self.plan(width, height, overview_only)
        counts = view_token_counts(self._projector, plan.view_grids)
        return sum(counts) + num_schema_tokens(plan, self._image.layout, counts[0])

    def encode_images(
        self, images: Sequence[ImageSource], overview_only: bool = False
    ) -> list[EncodedImage]:
        """Plans, cuts and packs images, each on its own."""
        encoded = []
        for source in images:
            if isinstance(source, str) and source.startswith(("http://", "https://")):
                raise UserError(
                    f"the processor does not fetch {source}: download it, pass the file"
                )
            image = open_image(source)
            size = prepared_size(self._image, *image.size)
            if size != image.size:
                image = image.resize(size, resample=3)  # Pillow's bicubic filter
            if self._image.detail_side is not None:
                image = remove_detail(image, self._image.detail_side)
            unprepared = dataclasses.replace(self._image, long_side=None)
            plan = plan_image(unprepared, *size, overview_only)
            counts = view_token_counts(self._projector, plan.view_grids)
            ids = image_ids(plan, counts, self._image)
            pixels, view_grids = pack_views(image, plan, *self._image.normalisation)
            encoded.append(EncodedImage(ids, pixels, view_grids, plan.grid or (0, 0)))
        return encoded

    def _vision_inputs(self, images: Sequence[EncodedImage]) -> dict[str, torch.Tensor]:
        """What the model reads of images, one after another; empty without an image."""
        if not images:
            return {}
        inputs = {
            "pixel_values": torch.cat([image.pixel_values for image in images]),
            "view_grids": torch.cat([image.view_grids for image in images]),
        }
        if self._image.layout == "rows":
            inputs["image_grids"] = torch.tensor([image.grid for image in images])
        return inputs

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
        """Prompts with images to the inputs of ``generate``.

        Args:
            text: one prompt or several; each ``<image>`` takes the next image.
            images: paths or PIL images in reading order, flat or one list per prompt.
            videos: not supported by this model.
            return_tensors: "pt", or None for lists of ids.
            padding: pad several prompts to the longest.
            padding_side: "left" (generation) or "right".
            add_special_tokens: begin with the tokenizer's begin token.
            overview_only: no slices (first training stage).
            **kwargs: accepted for the library's interface: none is used.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (B, T); with images also ``pixel_values``
            float32 (P, 3 * p * p) and ``view_grids`` int64 (V, 2); in the layout "rows" also
            ``image_grids`` int64 (I, 2): (columns, rows) of each image's slices, (0, 0) unsliced.

        Raises:
            UserError: markers and images differ in number, or an image cannot be read.
        """
        if text is None or text == []:
            raise UserError("the processor needs text; an image alone is the text '<image>'")
        if videos:
            raise UserError("this model reads images only, not videos: pass frames as images")
        texts = [text] if isinstance(text, str) else list(text)
        per_text = self._share_images(texts, images)
        encodings = []
        pictures: list[EncodedImage] = []
        for one, members in zip(texts, per_text, strict=True):
            found = self.encode_images(members, overview_only)
            encoding = encode_spans(self.tokenizer, [Span(one)], [image.ids for image in found])
            if not add_special_tokens and encoding.input_ids[:1] == [self.tokenizer.bos_token_id]:
                encoding.input_ids = encoding.input_ids[1:]
            encodings.append(encoding)
            pictures += found
        data = self._pad(encodings, padding, padding_side) | self._vision_inputs(pictures)
        if return_tensors is None:
            return BatchFeature(data)
        return BatchFeature(data, tensor_type=return_tensors)

    def _share_images(self, texts: list[str], images: Any) -> list[list[ImageSource]]:
        """Images of each text, from a flat or a nested list."""
        counts = [text.count(IMAGE_MARKER) for text in texts]
        if images is None:
            images = []
        elif not isinstance(images, list | tuple):
            images = [images]
        if images and all(isinstance(item, list | tuple) for item in images):
            nested = [list(item) for item in images]
            if len(nested) != len(texts):
                raise UserError(f"{len(texts)} texts but {len(nested)} lists of images")
        else:
            if sum(counts) != len(images):
                raise UserError(
                    f"the text has {sum(counts)} {IMAGE_MARKER} but {len(images)} images are given"
                )
            remaining = iter(images)
            nested = [[next(remaining) for _ in range(count)] for count in counts]
        return nested

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
        *,
        overview_only: bool = False,
        max_length: int | None = None,
        overlong: str = "error",
    ) -> dict[str, Any]:
        """A training sample: ids, labels and pixels of one conversation.

        Args:
            turns: see `Template.spans`.
            images: one for each ``<image>`` of the turns, in order.
            overview_only: no slices.
            max_length: most tokens, images included.
            overlong: see `Encoding.cut`.

        Returns:
            ``input_ids`` and ``labels`` int64 (T,), with images ``pixel_values``, ``view_grids``
            and, in the layout "rows", ``image_grids``; ``num_visual_tokens``, ``dropped_images``,
            ``truncated_tokens`` ints.

        Raises:
            UserError: turns, markers or length do not fit.
        """
        if overlong not in ("error", "drop"):
            raise UserError(f"data.overlong must be 'error' or 'drop', got {overlong!r}")
        pictures = self.encode_images(images, overview_only)
        encoding = encode_turns(
            self.template_name,
            self.template_mode,
            self.tokenizer,
            turns,
            [image.ids for image in pictures],
        )
        truncated = dropped = 0
        if max_length is not None:
            truncated, dropped = encoding.cut(max_length, overlong)
        pictures = pictures[: len(encoding.runs)]
        placeholder = int(self._image.image_token_id or 0)
        sample: dict[str, Any] = {
            "input_ids": torch.tensor(encoding.input_ids, dtype=torch.long),
            "labels": torch.tensor(encoding.labels, dtype=torch.long),
            "num_visual_tokens": sum(image.ids.count(placeholder) for image in pictures),
            "dropped_images": dropped,
            "truncated_tokens": truncated,
        }
        return sample | self._vision_inputs(pictures)


AutoProcessor.register(LlavaUHDConfig, LlavaUHDProcessor)

__all__ = ["IGNORE_INDEX", "LlavaUHDProcessor"]
