"""What a training run is: the typed sections of a recipe."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from llava_uhd.config.data import DataConfig as DataConfig
from llava_uhd.config.lora import LoraSection
from llava_uhd.config.model import CompressionConfig, ImageConfig, ProjectorConfig, VideoConfig
from llava_uhd.config.packed import check_packed
from llava_uhd.config.ranges import check_ranges
from llava_uhd.config.resolved import Resolved
from llava_uhd.config.schema import Flat, build, leaf_types
from llava_uhd.errors import UserError
from llava_uhd.registry import nearest_hint

# Parts of a model that a stage can train. The projector's own part leaves out its upsampler:
# "upsampler" is the whole stack, "upsampler_fixup" only the 1x1 convolutions behind its stages.
# "image_newline" is the learned newline of the layout "unpad".
PARTS = (
    *("vision_tower", "projector", "upsampler", "upsampler_fixup"),
    *("image_newline", "language_model"),
)
UPSAMPLER_PARTS = ("upsampler", "upsampler_fixup")

# DeepSpeed configurations that ship under scripts/deepspeed.
DEEPSPEED_NAMES = ("zero2", "zero3", "zero3_offload")


@dataclass
class ModelSection:
    """Where the parts come from and how they are put together.

    Attributes:
        checkpoint: a whole checkpoint to go on from (ours or a published layout). It brings its own
            parts and configuration; `vision_tower` and `projector_file` then override single parts.
        language_model: folder or hub id of a causal language model, or the mapping of a
            transformers configuration (with ``model_type``) to start one from nothing.
        tokenizer: folder or hub id; None takes the language model's own.
        vision_tower: folder or hub id of a vision tower, or a configuration mapping as above.
        projector_file: output folder or file of a first stage.
        upsampler_file: pre-trained upsampler (VDIM) of a multi-scale projector; it replaces what
            `projector_file` holds.
        template: registered conversation template.
        template_mode: "clean" learns the answers; "faithful" learns what the published code of the
            template learned, its oddities included.
        select_layer: hidden state of the tower that is used.
        projector: its configuration.
        image: how images are read. Token ids are filled from the tokenizer.
        video: how videos are read.
        dtype: of the weights. "auto" keeps float32 weights, except where DeepSpeed keeps float32
            copies beside bfloat16 ones; FSDP keeps what learns in float32, the rest in bfloat16.
        attn_implementation: of the language model; None chooses what the machine has.
        given: dotted keys of this section that the recipe sets, also those that it sets to their
            default; None where the section was not made from a recipe. Over a whole checkpoint
            they decide, everything else follows the checkpoint.
    """

    checkpoint: str | None = None
    language_model: str | dict[str, Any] | None = None
    tokenizer: str | None = None
    vision_tower: str | dict[str, Any] | None = None
    projector_file: str | None = None
    upsampler_file: str | None = None
    template: str = "v1"
    template_mode: Literal["clean", "faithful"] = "clean"
    select_layer: int = -2
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str | None = None
    given: frozenset[str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.language_model is not None:
            raise UserError(
                "model.checkpoint and model.language_model exclude each other: "
                "a checkpoint brings its language model"
            )


@dataclass
class StageConfig:
    """What learns.

    Attributes:
        name: of the stage, written into the output folder.
        learn: part -> learning rate; None takes ``trainer.learning_rate``. Parts that are not
            listed are frozen. (In a recipe ``true`` means None and ``false`` removes a part.)
    """

    name: str = "finetune"
    learn: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, rate in self.learn.items():
            if part not in PARTS:
                hint = nearest_hint(part, list(PARTS))
                raise UserError(
                    f"stage.learn.{part}: no such part{hint} (known: {', '.join(PARTS)})"
                )
            if rate is not None and rate < 0:
                raise UserError(f"stage.learn.{part} must not be negative, got {rate}")
        if not self.learn:
            raise UserError(f"stage.learn is empty: name at least one of {', '.join(PARTS)}")


@cache
def training_argument_types() -> dict[str, Any]:
    """Name -> type of the ``TrainingArguments`` fields that a recipe may set.

    Left out are the ones that stand elsewhere in a recipe or are given by the launcher.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    taken = ("output_dir", "deepspeed", "fsdp", "fsdp_config", "debug", "local_rank")
    return {name: hints[name] for name in names if name not in taken}


@dataclass
class TrainerConfig:
    """How long, how fast, where to.

    Attributes:
        output_dir: everything is written there; None means ``checkpoints/<recipe name>``.
        global_batch_size: samples per optimizer step over all devices; kept when their number
            changes. None: per-device batch times accumulation times devices.
        group_by_modality_length: batches of like length and modality, the published sampler.
        max_grad_norm_stop: a gradient norm above it, before clipping, ends the run without taking
            the step; None: only one that is not finite does.
        check_room: refuse a run whose estimated memory or checkpoints do not fit.
        loss: how many logits exist at a time: "whole" those of all learned tokens of a micro-batch,
            "chunked" those of a piece of them, "auto" pieces where all would take more than 2 GiB
            in float32; "liger" takes the kernels of liger-kernel (CUDA).
        arguments: any other fields of transformers' ``TrainingArguments``. In a recipe they stand
            beside the keys above.
    """

    output_dir: str | None = None
    global_batch_size: int | None = None
    group_by_modality_length: bool = False
    max_grad_norm_stop: float | None = None
    check_room: bool = True
    loss: Literal["auto", "whole", "chunked", "liger"] = "auto"
    arguments: dict[str, Any] = field(
        default_factory=dict, metadata={"open_keys": training_argument_types}
    )

    def __post_init__(self) -> None:
        if self.output_dir is not None and not self.output_dir.strip():
            raise UserError("trainer.output_dir is empty: name a folder, or leave it out")
        if self.arguments.get("hub_token") is not None:
            raise UserError(
                "trainer.hub_token would be written into the output folder with the recipe: log in "
                "with 'hf auth login', or set HF_TOKEN"
            )
        rate = self.arguments.get("learning_rate")
        if rate is not None and rate < 0:
            raise UserError(f"trainer.learning_rate must not be negative, got {rate}")
        bound = self.max_grad_norm_stop
        if bound is not None and bound <= 0:
            raise UserError(f"trainer.max_grad_norm_stop must be above 0 or null, got {bound}")
        counts = {
            "global_batch_size": self.global_batch_size,
            "per_device_train_batch_size": self.arguments.get("per_device_train_batch_size"),
            "gradient_accumulation_steps": self.arguments.get("gradient_accumulation_steps"),
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"trainer.{name} must be at least 1, got {value}")
        check_ranges(self.arguments)

    def batch_plan(self, world_size: int) -> tuple[int, int]:
        """Per-device batch and accumulation steps that give the global batch.

        The per-device batch of the recipe is an upper bound: the largest batch below it that
        divides each device's share is taken.

        Example: global 128 and per-device 4 on 8 devices: ``(4, 4)``; on one device: ``(4, 32)``.

        Raises:
            UserError: the share is not whole, or an explicit accumulation contradicts it.
        """
        most = self.arguments.get("per_device_train_batch_size", 8)
        steps = self.arguments.get("gradient_accumulation_steps")
        total = self.global_batch_size
        if total is None:
            return most, steps or 1
        if total % world_size:
            raise UserError(
                f"trainer.global_batch_size {total} cannot be shared by {world_size} devices: "
                "use a number of devices that divides it, or change it"
            )
        share = total // world_size
        if steps is not None:
            if most * steps != share:
                raise UserError(
                    f"trainer.global_batch_size {total} is not per_device_train_batch_size {most} "
                    f"x gradient_accumulation_steps {steps} x {world_size} devices: leave "
                    "gradient_accumulation_steps out, it is derived"
                )
            return most, steps
        batch = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
        return batch, share // batch


@dataclass
class Recipe(Resolved):
    """A whole run. Made by `llava_uhd.config.recipe.load_recipe`.

    Attributes:
        name: of the recipe it was loaded from.
        model: parts.
        data: samples.
        stage: what learns.
        trainer: the rest.
        compression: visual context compression (short for ``model.compression``).
        lora: adapters instead of the language model's own weights.
        deepspeed: "zero2", "zero3", "zero3_offload", the path of a configuration, or None.
        fsdp: PyTorch's FSDP2 instead of DeepSpeed: "full_shard" shares weights, gradients and
            optimizer out, "shard_grad_op" keeps the weights whole between forward and backward
            pass, "full_shard_offload" keeps the shares in the memory of the host; None: no FSDP. In
            a recipe it takes the place of an inherited ``deepspeed``, and the other way round.
        debug: shrunken run on a tiny model.
        debug_base: recipes that ``--debug`` lays over this one after ``_base/debug``, so that the
            tiny model has the same kinds of parts.
    """

    name: str
    model: ModelSection
    data: DataConfig
    stage: StageConfig
    trainer: TrainerConfig
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    deepspeed: str | None = None
    fsdp: Literal["full_shard", "shard_grad_op", "full_shard_offload"] | None = None
    debug: bool = False
    debug_base: str | list[str] | None = None

    def __post_init__(self) -> None:
        if self.deepspeed not in (None, *DEEPSPEED_NAMES) and not str(self.deepspeed).endswith(
            ".json"
        ):
            names = ", ".join(DEEPSPEED_NAMES)
            raise UserError(f"deepspeed must be {names}, a .json file or null: {self.deepspeed!r}")
        if self.deepspeed is not None and self.fsdp is not None:
            raise UserError(
                f"deepspeed {self.deepspeed} and fsdp {self.fsdp} exclude each other: set one of "
                f"them (--fsdp {self.fsdp}, or --deepspeed {self.deepspeed})"
            )
        if self.data.path is None and self.data.embedded is None:
            raise UserError("data.path is missing: name the JSON file of the training samples")
        if self.model.checkpoint is None and self.model.language_model is None:
            raise UserError("model.language_model is missing (or give a whole model.checkpoint)")
        if self.lora.enabled and "language_model" not in self.stage.learn:
            raise UserError(
                "lora.r is set but stage.learn leaves the language model out: give its adapters "
                "a rate (--stage.learn.language_model 2e-4), or drop them (--lora_enable False)"
            )
        if self.data.batching == "packed":
            trainer = self.trainer
            by_modality, total = trainer.group_by_modality_length, trainer.global_batch_size
            check_packed(by_modality, total, trainer.arguments)
        if self.data.shuffle == "shards" and self.trainer.group_by_modality_length:
            raise UserError(
                "data.shuffle: shards and trainer.group_by_modality_length exclude each other: set "
                "one of them"
            )
        wanted = [f"stage.learn.{part}" for part in UPSAMPLER_PARTS if part in self.stage.learn]
        if self.model.upsampler_file is not None:
            wanted.append("model.upsampler_file")
        if wanted and self.model.checkpoint is None and max(self.model.projector.scales) == 1:
            raise UserError(
                f"{wanted[0]} needs an upsampler, but model.projector.scales is [1]: leave it out, "
                "or choose a multi-scale projector and its scales"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested form with every default filled in; `from_dict` reads it back.

        Over a whole checkpoint, settings of images and projector that the recipe does not make are
        left out: there the checkpoint's own count, not the defaults.
        """
        values = super().to_dict()
        given = values["model"].pop("given")
        if self.model.checkpoint is not None and given is not None:
            _keep_given(values["model"], given)
        return values

    @classmethod
    def from_flat(cls, flat: Flat) -> Recipe:
        """Builds a recipe from its dotted keys.

        Raises:
            UserError: an impossible value.
        """
        return make_recipe(flat)


@cache
def recipe_keys() -> dict[str, Any]:
    """Every dotted key that a recipe can hold, with its type."""
    return leaf_types(Recipe)


def make_recipe(flat: Flat) -> Recipe:
    """The recipe of dotted keys; it remembers which keys of ``model`` were set.

    Raises:
        UserError: impossible value or combination.
    """
    recipe = build(Recipe, flat, recipe_keys())
    prefix = "model."
    recipe.model.given = frozenset(
        key.removeprefix(prefix) for key in flat if key.startswith(prefix)
    )
    return recipe


def _keep_given(model: dict[str, Any], given: list[str]) -> None:
    """Drops what a recipe over a checkpoint does not set from the plain form of its section."""
    for part in ("image", "projector", "video"):
        model[part] = {k: v for k, v in model[part].items() if f"{part}.{k}" in given}
    if "select_layer" not in given:
        model.pop("select_layer", None)
