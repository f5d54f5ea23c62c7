"""The configuration of a model: its tower, projector and language model, and its images."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from llava_uhd.config.compression import CompressionConfig as CompressionConfig
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
        layout: where the tokens of the views stand. "slices": one slice after another, a separator
            after each, the overview last. "rows": the token maps of all slices joined into one map,
            row by row (the published LLaVA-UHD v2 Vicuna-7B). "flat": one view after another,
            nothing between them (LLaVA-1.5). "unpad": the overview, then the joined map of the
            tiles without what stands for padding, a learned newline after each of its rows
            (LLaVA-NeXT and OneVision, published as ``spatial_unpad``); a single view ends with one
            newline. "spatial": the same without newlines and with the padding.
        max_slices: most slices beside the overview.
        scale_resolution: side in pixels of the square whose area a view aims at, and of a square
            view or tile.
        patch_size: side of a tower patch in pixels.
        bounded: keep views within 16:1 (False reproduces published plans for any shape).
        pinpoints: (width, height) in pixels of the canvases that "anyres" chooses from, multiples
            of `scale_resolution`; a list, or the published text ``"(1x1),...,(6x6)"`` in tiles.
        max_tiles: "anyres" shrinks the joined map by interpolation to about the tokens of this many
            tiles (the N of the published ``anyres_max_N``); None keeps every token.
        several: how the images of a sample with more than one are read: "same" as a single one, or
            "pad", one padded square view each (LLaVA-OneVision).
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
    layout: Literal["slices", "rows", "flat", "unpad", "spatial"] = "slices"
    max_slices: int = 7
    scale_resolution: int = 336
    patch_size: int = 14
    bounded: bool = True
    pinpoints: tuple[tuple[int, int], ...] | str | None = None
    max_tiles: int | None = None
    several: Literal["same", "pad"] = "same"
    long_side: int | None = None
    detail_side: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_token_id: int | None = None
    comma_id: int | None = None
    newline_id: int | None = None

    def __post_init__(self) -> None:
        if self.pinpoints is not None and not isinstance(self.pinpoints, str):
            self.pinpoints = tuple((int(width), int(height)) for width, height in self.pinpoints)
        self.mean = None if self.mean is None else tuple(self.mean)
        self.std = None if self.std is None else tuple(self.std)
        for name in ("max_slices", "patch_size", "long_side", "detail_side", "max_tiles"):
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
        unshuffle: side of the squares of patches that "pixel_unshuffle_mlp" joins into a token.
        initializer_range: standard deviation of the linear layers of a new multi-scale projector.
            The published 0.02 suits widths of some thousands; a narrow projector that starts with
            it is overwritten by its first steps.
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
    unshuffle: int = 2
    initializer_range: float = 0.02
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
        if self.unshuffle < 1:
            raise UserError(f"projector.unshuffle must be at least 1, got {self.unshuffle}")
        if self.initializer_range <= 0:
            raise UserError(
                f"projector.initializer_range must be above 0, got {self.initializer_range}"
            )
        if self.num_heads is not None and self.num_heads < 1:
            raise UserError(f"projector.num_heads must be at least 1 or null, got {self.num_heads}")


@dataclass
class VideoConfig:
    """Which frames of a video are taken, and what becomes of their tokens.

    Attributes:
        fps: frames taken per second of a video file (published ``video_fps``), by whole steps of
            its frames; of a folder or list of frames all are taken.
        max_frames: with more of them, or with `force_sample`, this many are taken at even distances
            (published ``frames_upbound``); 0 sets no bound.
        force_sample: always take `max_frames` frames, some of a short video more than once.
        strategy: registered image strategy of a frame, which is always one view; None: that of the
            model's images, without slices or tiles.
        time_instruction: tell the length of the video and the times of its frames before the first
            question.
        pool_stride: side of the squares of tokens that are pooled into one; 1 keeps every token.
        pool_mode: how they are pooled.
        newline: where the learned newline of the layout "unpad" stands: after the last frame
            ("one_token"), after each row of each frame ("grid"), after each frame ("frame"), or
            nowhere ("no_token").
    """

    fps: float = 1.0
    max_frames: int = 32
    force_sample: bool = False
    strategy: str | None = None
    time_instruction: bool = False
    pool_stride: int = 1
    pool_mode: Literal["bilinear", "average", "max"] = "bilinear"
    newline: Literal["one_token", "grid", "frame", "no_token"] = "one_token"

    def __post_init__(self) -> None:
        if not 0 < self.fps < 1000:
            raise UserError(f"video.fps must be above 0 and below 1000, got {self.fps}")
        if self.max_frames < 0 or (self.force_sample and self.max_frames == 0):
            raise UserError(
                f"video.max_frames must be at least 1 (or 0 for no bound, without "
                f"video.force_sample), got {self.max_frames}"
            )
        if self.pool_stride < 1:
            raise UserError(f"video.pool_stride must be at least 1, got {self.pool_stride}")


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
        video: `VideoConfig` or dict.
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
        video: VideoConfig | dict[str, Any] | None = None,
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
        self.video = make_part(VideoConfig, video, "video")
        self.compression = make_part(CompressionConfig, compression, "compression")
        self.template = template
        self.select_layer = convert(select_layer, int, "select_layer")
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def has_newline(self) -> bool:
        """Whether the model has a learned newline, as the layout "unpad" needs."""
        return self.image.layout == "unpad"

    @property
    def hidden_size(self) -> int:
        """Width of the language model (DeepSpeed sizes its buckets by it)."""
        return int(self.text_config.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """Serialises the typed parts as plain dicts."""
        values = super().to_dict()
        for name in ("image", "projector", "video", "compression"):
            part = getattr(self, name)
            values[name] = {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(part).items()
            }
        return values
