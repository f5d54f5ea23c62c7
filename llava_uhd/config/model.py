"""The configuration of a model: its tower, projector and language model, and its images."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from llava_uhd.config.typed import convert, field_types
from llava_uhd.errors import UserError
from llava_uhd.registry import nearest_hint

# Scales of feature maps: the tower's own, and those that upsampler stacks make.
SCALES = (1, 2, 4, 8)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Mean and standard deviation of the images that a tower family was trained on; CLIP's for the rest.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass
class ImageConfig:
    """How an image becomes views and where its tokens stand in the text.

    Attributes:
        strategy: registered image strategy (`llava_uhd.images.strategies`).
        layout: where the tokens of the slices stand: "slices" (one slice after another) or "rows"
            (the token maps of all slices joined into one map, row by row: the published
            LLaVA-UHD v2 Vicuna-7B).
        max_slices: most slices beside the overview.
        scale_resolution: side in pixels of the square whose area a view aims at.
        patch_size: side of a tower patch in pixels.
        bounded: keep views within 16:1 (False reproduces published plans for any shape).
        long_side: resize images to this long side before planning, or None. The published
            evaluation loader uses 1024.
        detail_side: shrink images to a square of this side and blow them up again before they are
            cut, or None. A control for experiments: every view and token stays, detail goes.
        mean: of the normalised channels, in [0, 1]; None: the tower's own.
        std: of the normalised channels, in [0, 1]; None: the tower's own.
        image_token_id: id of the placeholder in ``input_ids``; never embedded.
        comma_id: separator after a slice inside a row.
        newline_id: separator after the last slice of a row.
    """

    strategy: str = "slices"
    layout: Literal["slices", "rows"] = "slices"
    max_slices: int = 7
    scale_resolution: int = 336
    patch_size: int = 14
    bounded: bool = True
    long_side: int | None = None
    detail_side: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_token_id: int | None = None
    comma_id: int | None = None
    newline_id: int | None = None

    def __post_init__(self) -> None:
        self.mean = None if self.mean is None else tuple(self.mean)
        self.std = None if self.std is None else tuple(self.std)
        for name in ("max_slices", "patch_size", "long_side", "detail_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"image.{name} must be at least 1, got {value}")
        if self.scale_resolution < self.patch_size:
            raise UserError(
                f"image.scale_resolution {self.scale_resolution} must be at least "
                f"image.patch_size {self.patch_size}"
            )
        mean, std = self.normalisation
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError("image.mean and image.std must hold 3 numbers each, std above 0")

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation; CLIP's as long as no tower has been asked."""
        mean = CLIP_MEAN if self.mean is None else self.mean
        return mean, CLIP_STD if self.std is None else self.std

    def filled(self, vision: PreTrainedConfig) -> ImageConfig:
        """The same with a tower's normalisation where none is set.

        Args:
            vision: configuration of the tower. ``image_mean`` and ``image_std``, which it has when
                its folder brought a ``preprocessor_config.json``, go before those of its family.
        """
        if self.mean is not None and self.std is not None:
            return self
        mean, std = NORMALISATION.get(vision.model_type, (CLIP_MEAN, CLIP_STD))
        mean = getattr(vision, "image_mean", None) or mean
        std = getattr(vision, "image_std", None) or std
        return dataclasses.replace(
            self,
            mean=mean if self.mean is None else self.mean,
            std=std if self.std is None else self.std,
        )


@dataclass
class ProjectorConfig:
    """Which projector turns patch features into language-model tokens.

    Attributes:
        type: registered projector (`llava_uhd.projectors`).
        num_queries: tokens per view of a resampler; a square number.
        num_heads: attention heads; None means ``hidden_size // 128``, at least 1 (published).
        layer_norm_eps: of the projector's norms.
        train_positions: whether the query position table learns with the projector. In the
            published training it learns in the first stage only.
        scales: of the feature maps that a multi-scale projector reads: 1 is the tower's own map,
            2, 4 and 8 are made by the upsampler.
        form: "fast", or "plain" for the slow form that follows the publication step by step (the
            same numbers up to rounding).
        round_boxes: round the pooling windows to the feature dtype as the published
            half-precision code does, for bit-faithful bfloat16 comparisons.
    """

    type: str = "spatial_resampler"
    num_queries: int = 144
    num_heads: int | None = None
    layer_norm_eps: float = 1e-6
    train_positions: bool = True
    scales: tuple[int, ...] = (1,)
    form: Literal["fast", "plain"] = "fast"
    round_boxes: bool = False

    def __post_init__(self) -> None:
        self.scales = tuple(sorted(self.scales))
        if (
            not self.scales
            or set(self.scales) - set(SCALES)
            or len(set(self.scales)) < len(self.scales)
        ):
            raise UserError(f"projector.scales must be different ones of {SCALES}: {self.scales}")
        if self.num_heads is not None and self.num_heads < 1:
            raise UserError(f"projector.num_heads must be at least 1 or null, got {self.num_heads}")


@dataclass
class CompressionConfig:
    """Visual context compression inside the language model (`method` "none": off).

    Attributes:
        method: registered compressor.
        layer: compress after this many decoder layers; -1 means before the language model.
        stride: visual tokens merged into one.
        remainder: what happens to the last, incomplete group: "keep" or "drop" (published).
        positions: "integer", or "half" for the published half-precision positions.
        schedule: registered schedule of (layer, stride) over training, or None.
    """

    method: str = "none"
    layer: int = -1
    stride: int = 1
    remainder: str = "keep"
    positions: str = "integer"
    schedule: str | None = None


Part = TypeVar("Part")


def make_part(kind: type[Part], values: Part | dict[str, Any] | None, where: str) -> Part:
    """Builds a configuration dataclass from a dict, or passes an instance through.

    Raises:
        UserError: an unknown key; the message names the nearest valid one.
    """
    if isinstance(values, kind):
        return values
    if values is None:
        return kind()
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping, got {type(values).__name__}")
    known = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            hint = nearest_hint(key, known)
            raise UserError(f"unknown key '{where}.{key}'{hint} (known: {', '.join(known)})")
    types = field_types(kind)
    return kind(
        **{key: convert(each, types[key], f"{where}.{key}") for key, each in values.items()}
    )


def make_config(values: PreTrainedConfig | dict[str, Any], where: str) -> PreTrainedConfig:
    """Builds a transformers configuration from a dict that carries its ``model_type``.

    Raises:
        UserError: no or an unknown ``model_type``, or values that it does not take.
    """
    if isinstance(values, PreTrainedConfig):
        # A copy: the parent resets the attention backend of its parts, and a language model that
        # shared the object would go on without its causal mask.
        return copy.deepcopy(values)
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{where} has no 'model_type': it must name a transformers configuration")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} ({model_type}) is not usable: {reason:.200}") from error


class LlavaUHDConfig(PreTrainedConfig):
    """Configuration of `LlavaUHDForConditionalGeneration`.

    Args:
        vision_config: transformers configuration (or dict) of the tower, for instance
            ``clip_vision_model``. It describes the whole published tower; ``select_layer`` says
            how much of it is built.
        text_config: transformers configuration (or dict) of any causal language model.
        image: `ImageConfig` or dict.
        projector: `ProjectorConfig` or dict.
        compression: `CompressionConfig` or dict.
        template: registered conversation template the model was trained with.
        select_layer: which hidden state of the tower is used; -2 is the output of the last layer
            but one. Later layers are not built.
        max_length: most tokens of a training sample, for information.
    """

    model_type = "llava_uhd"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image: ImageConfig | dict[str, Any] | None = None,
        projector: ProjectorConfig | dict[str, Any] | None = None,
        compression: CompressionConfig | dict[str, Any] | None = None,
        template: str = "v1",
        select_layer: int = -2,
        **kwargs: Any,
    ) -> None:
        self.vision_config = make_config(
            vision_config or {"model_type": "clip_vision_model"}, "vision_config"
        )
        self.text_config = make_config(text_config or {"model_type": "llama"}, "text_config")
        self.image = make_part(ImageConfig, image, "image").filled(self.vision_config)
        self.projector = make_part(ProjectorConfig, projector, "projector")
        self.compression = make_part(CompressionConfig, compression, "compression")
        self.template = template
        self.select_layer = convert(select_layer, int, "select_layer")
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the language model (DeepSpeed sizes its buckets by it)."""
        return int(self.text_config.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """Serialises the typed parts as plain dicts."""
        values = super().to_dict()
        for name in ("image", "projector", "compression"):
            part = getattr(self, name)
            values[name] = {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(part).items()
            }
        return values
