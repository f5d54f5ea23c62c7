"""Writing a checkpoint in a published layout, or a published one in ours.

A published configuration has fewer words than ours: what it cannot say is a constant of the
published code. So the values are written, read back, and compared; a model that would come back as
another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llava_uhd.checkpoint.load import build_model, open_checkpoint
from llava_uhd.checkpoint.manifest import read_manifest, write_manifest, write_whole
from llava_uhd.checkpoint.parts import (
    PROJECTOR_FILE,
    PUBLISHED_PROJECTOR_FILE,
    read_model_config,
    read_projector,
    read_tokenizer,
)
from llava_uhd.checkpoint.published import LAYOUTS, Layout, key_map, published_key
from llava_uhd.checkpoint.published.towers import hub_name, tower_habits
from llava_uhd.checkpoint.published.values import common_values, text_values
from llava_uhd.checkpoint.published_folder import stored_names
from llava_uhd.checkpoint.tokenizer_files import (
    check_tokenizer,
    holds_tokenizer,
    write_tokenizer,
)
from llava_uhd.checkpoint.weights import (
    Tensors,
    read_folder,
    read_json,
    read_tensors,
    weight_files,
)
from llava_uhd.config.model import NORMALISATION, LlavaUHDConfig, make_config
from llava_uhd.errors import UserError, make_folder
from llava_uhd.registry import nearest_hint
from llava_uhd.text.layout import single_token_id
from llava_uhd.vision.towers import num_built_layers

OURS = "llava_uhd"
TARGETS = (*(layout.slug for layout in LAYOUTS), OURS)
MAX_SHARD = "5GB"

# Settings of ours that change no weight and no usual number: noted, not refused.
_FREE = {"image.bounded", "image.max_slices", "image.long_side"}
_SKIPPED = {"image.image_token_id", "projector.form", "projector.train_positions"}
_SKIPPED |= {"projector.round_boxes", "projector.initializer_range"}
_HOUSEKEEPING = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class ExportOptions:
    """How `export_checkpoint` writes.

    Attributes:
        keep_unused: published folder from which weights that the model does not use are taken
            along, so that the published code can load strictly; None leaves them out.
        tokenizer: folder whose tokenizer files are copied; None takes those of ``keep_unused`` or
            of the language model that the checkpoint was trained from, where they are at hand, or
            else writes the checkpoint's own.
        vision_tower: path or hub id that is recorded as the tower's; None chooses: the hub id of a
            known tower, else a folder that is written beside the weights.
        dtype: of the written weights; None keeps the stored one.
    """

    keep_unused: Path | None = None
    tokenizer: Path | None = None
    vision_tower: str | None = None
    dtype: torch.dtype | None = None


def export_checkpoint(
    source: Path, target: str, out: Path, options: ExportOptions | None = None
) -> list[str]:
    """Writes a checkpoint in another layout.

    Args:
        source: folder of a whole model, ours or published, or of a projector of ours.
        target: one of `TARGETS`.
        out: new or empty folder.
        options: see there.

    Returns:
        What the new layout does not say, as one line each.

    Raises:
        UserError: the layout cannot hold the model, or ``out`` holds something.
    """
    options = options or ExportOptions()
    if target not in TARGETS:
        hint = nearest_hint(target, list(TARGETS))
        raise UserError(f"unknown layout '{target}'{hint} (known: {', '.join(TARGETS)})")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder")
    config, state, tokenizer, processor = _open(source)
    if options.dtype is not None:
        state = {key: _cast(tensor, options.dtype) for key, tensor in state.items()}
    if target == OURS:
        if processor is None:
            raise UserError(f"{source} holds a projector only: it is in our layout already")
        _write_ours(source, out, config, state, processor)
        return []
    layout = next(each for each in LAYOUTS if each.slug == target)
    if options.tokenizer is not None:  # before the large files are written
        check_tokenizer(options.tokenizer, tokenizer)
    weights = {published_key(key, config): tensor for key, tensor in state.items()}
    tower = options.vision_tower or _known_tower(config)
    values = _published_values(layout, config, tower or tower_folder(config), weights)
    if tokenizer.model_max_length < 10**9:  # libraries write "none" as a huge number
        values["tokenizer_model_max_length"] = tokenizer.model_max_length
    notes = _compare(layout, values, config, weights, tokenizer)
    if options.keep_unused is not None:
        weights |= _unused_weights(layout, config, options.keep_unused, weights, options.dtype)
    make_folder(out, "output folder")
    write_whole(out / "config.json", _json(values))
    if tower is None:
        _write_tower(out / tower_folder(config), config)
    _write_weights(out, weights, whole=processor is not None)
    folder = options.tokenizer or _tokenizer_source(source, tokenizer, options)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    return notes + write_tokenizer(out, tokenizer, folder, config.text_config.model_type)


def _open(source: Path) -> tuple[LlavaUHDConfig, Tensors, PreTrainedTokenizerBase, Any]:
    """Configuration, weights, tokenizer, and the processor unless it is a projector only."""
    if not weight_files(source) and (source / PROJECTOR_FILE).is_file():
        config = read_model_config(source)
        return config, read_projector(source, config), read_tokenizer(source), None
    config, state, processor = open_checkpoint(source)
    return config, state, processor.tokenizer, processor


def _write_ours(
    source: Path, out: Path, config: LlavaUHDConfig, state: Tensors, processor: Any
) -> None:
    dtypes = {tensor.dtype for tensor in state.values()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    model = build_model(config, state, what=f"checkpoint {source}", dtype=dtype)
    make_folder(out, "output folder")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_manifest(out, kind="model", finished=True, template=config.template, source=str(source))


def _tokenizer_source(
    source: Path, tokenizer: PreTrainedTokenizerBase, options: ExportOptions
) -> Path | None:
    """A folder at hand with the published files of this tokenizer."""
    recorded = read_manifest(source).get("language_model")
    candidates = [options.keep_unused, Path(recorded) if isinstance(recorded, str) else None]
    if read_json(source / "config.json").get("model_type") != OURS:
        candidates.insert(0, source)
    return next((each for each in candidates if each and holds_tokenizer(each, tokenizer)), None)


# --- configuration --------------------------------------------------------------------------------


def _published_values(
    layout: Layout, config: LlavaUHDConfig, tower: str, weights: Tensors
) -> dict[str, Any]:
    if config.compression.method != "none":
        raise UserError(
            f"the {layout.name} layout has no compression, this model uses "
            f"'{config.compression.method}'"
        )
    dtype = next(iter(weights.values())).dtype
    return {
        **text_values(config),
        **common_values(config, tower),
        **layout.write_config(config),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tower_folder(config: LlavaUHDConfig) -> str:
    """Name of the folder that describes a tower; the published code knows the family by it."""
    return f"{tower_habits(config.vision_config).name}-vision-tower"


def _known_tower(config: LlavaUHDConfig) -> str | None:
    """Hub id of a well-known tower, if images are prepared as it is used to."""
    vision = config.vision_config
    usual = NORMALISATION.get(vision.model_type)
    return hub_name(vision) if config.image.normalisation == usual else None


def _compare(
    layout: Layout,
    values: dict[str, Any],
    config: LlavaUHDConfig,
    weights: Tensors,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """What a reader of ``values`` would take for granted against what the model says.

    Returns:
        Notes on harmless differences.

    Raises:
        UserError: a difference that makes another model of it.
    """
    vision = make_config(config.vision_config, "vision_config")
    vision.image_mean, vision.image_std = config.image.normalisation
    again = layout.make_config(values, vision, list(weights))
    for name, text in (("comma_id", ","), ("newline_id", "\n")):
        if getattr(again.image, name) is None:
            setattr(again.image, name, single_token_id(tokenizer, text))
    notes: list[str] = []
    refused: list[str] = []
    for name, own, read in _settings(config, again):
        line = f"{name} is {own}, the layout means {read}"
        (notes if name in _FREE or name == "template" else refused).append(line)
    if refused:
        raise UserError(f"the {layout.name} layout cannot hold this model: {'; '.join(refused)}")
    return notes


def _settings(own: LlavaUHDConfig, read: LlavaUHDConfig) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of every setting in which two configurations differ."""
    if own.template != read.template:
        yield "template", own.template, read.template
    depths = [
        num_built_layers(each.vision_config.num_hidden_layers, each.select_layer)
        for each in (own, read)
    ]
    if depths[0] != depths[1]:
        yield "select_layer", own.select_layer, read.select_layer
    for part in ("image", "projector"):
        pairs = [dataclasses.asdict(getattr(each, part)) for each in (own, read)]
        for values, each in zip(pairs, (own, read), strict=True):
            if part == "projector":
                values["num_heads"] = values["num_heads"] or max(each.hidden_size // 128, 1)
                if values["type"] != "hiwin":
                    values["scales"] = None  # read by nothing
        for key, value in pairs[0].items():
            if f"{part}.{key}" not in _SKIPPED and value != pairs[1][key]:
                yield f"{part}.{key}", value, pairs[1][key]
    first, second = (_plain_text(each.text_config) for each in (own, read))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield f"text_config.{key}", first.get(key), second.get(key)


def _plain_text(text: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in text.to_dict().items() if key not in _HOUSEKEEPING}


# --- files ----------------------------------------------------------------------------------------


def _unused_weights(
    layout: Layout,
    config: LlavaUHDConfig,
    folder: Path,
    weights: Tensors,
    dtype: torch.dtype | None,
) -> Tensors:
    """Weights of a published folder that the layout lists as unused."""
    names = stored_names(folder)
    if not names:
        raise UserError(f"--keep-unused {folder} has no published weights")
    try:
        used = key_map(layout, names, config)
    except UserError as error:
        raise UserError(f"--keep-unused {folder}: {error}") from None
    dead = set(names) - used.keys() - weights.keys()
    if weight_files(folder):
        found = read_folder(folder, dead.__contains__)
    else:
        tensors = read_tensors(folder / PUBLISHED_PROJECTOR_FILE)
        found = {key: tensor for key, tensor in tensors if key in dead}
    if dtype is not None:
        found = {key: _cast(tensor, dtype) for key, tensor in found.items()}
    return found


def _write_weights(out: Path, weights: Tensors, whole: bool) -> None:
    kept = {key: tensor.contiguous() for key, tensor in weights.items()}
    if whole:
        save_torch_state_dict(kept, out, max_shard_size=MAX_SHARD, metadata={"format": "pt"})
    else:
        torch.save(kept, out / PUBLISHED_PROJECTOR_FILE)


def _write_tower(folder: Path, config: LlavaUHDConfig) -> None:
    """Shape and normalisation of the tower; its weights are in the checkpoint."""
    make_folder(folder, "output folder")
    vision = config.vision_config
    mean, std = config.image.normalisation
    side = vision.image_size
    values = {key: value for key, value in vision.to_dict().items() if key not in _HOUSEKEEPING}
    write_whole(folder / "config.json", _json(values))
    pixels = {
        "image_processor_type": f"{'CLIP' if 'clip' in vision.model_type else 'Siglip'}"
        "ImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    write_whole(folder / "preprocessor_config.json", _json(pixels))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, default=str, ensure_ascii=False) + "\n"
