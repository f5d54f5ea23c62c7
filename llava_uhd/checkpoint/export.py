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
from llava_uhd.checkpoint.manifest import write_manifest, write_whole
from llava_uhd.checkpoint.parts import (
    PROJECTOR_FILE,
    PUBLISHED_PROJECTOR_FILE,
    read_model_config,
    read_projector,
    read_tokenizer,
)
from llava_uhd.checkpoint.published import LAYOUTS, Layout, our_key, published_key
from llava_uhd.checkpoint.published.towers import hub_name, tower_habits
from llava_uhd.checkpoint.published.values import common_values, text_values
from llava_uhd.checkpoint.weights import Tensors, read_folder, read_tensors, weight_files
from llava_uhd.config.model import NORMALISATION, LlavaUHDConfig, make_config
from llava_uhd.errors import UserError, make_folder
from llava_uhd.registry import nearest_hint
from llava_uhd.text.layout import single_token_id
from llava_uhd.text.templates import IMAGE_MARKER
from llava_uhd.vision.towers import num_built_layers

OURS = "llava_uhd"
TARGETS = (*(layout.slug for layout in LAYOUTS), OURS)
MAX_SHARD = "5GB"

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")

# Settings of ours that change no weight and no usual number: noted, not refused.
_FREE = {"image.bounded", "image.max_slices", "image.long_side"}
_SKIPPED = {"image.image_token_id", "projector.form", "projector.train_positions"}
_SKIPPED |= {"projector.round_boxes"}
_HOUSEKEEPING = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class ExportOptions:
    """How `export_checkpoint` writes.

    Attributes:
        keep_unused: published folder from which weights that the model does not use are taken
            along, so that the published code can load strictly; None leaves them out.
        tokenizer: folder whose tokenizer files are copied; None takes those of ``keep_unused``, or
            else writes the checkpoint's own.
        dtype: of the written weights; None keeps the stored one.
    """

    keep_unused: Path | None = None
    tokenizer: Path | None = None
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
    weights = {published_key(key, config): tensor for key, tensor in state.items()}
    tower = _tower_name(config)
    values = _published_values(layout, config, tower, weights)
    notes = _compare(layout, values, config, weights, tokenizer)
    if options.keep_unused is not None:
        weights |= _unused_weights(layout, config, options.keep_unused, weights, options.dtype)
    make_folder(out, "output folder")
    write_whole(out / "config.json", _json(values))
    if "/" not in tower:
        _write_tower(out / tower, config)
    _write_weights(out, weights, whole=processor is not None)
    _write_tokenizer(out, tokenizer, options)
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", out)
    return notes


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


def _tower_name(config: LlavaUHDConfig) -> str:
    """What ``mm_vision_tower`` says: the hub id of a known tower, else a folder beside the file."""
    vision = config.vision_config
    habits = tower_habits(vision)
    known = hub_name(vision)
    if known is not None and config.image.normalisation == NORMALISATION[vision.model_type]:
        return known
    return f"{habits.name}-vision-tower"


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
    notes, refused = [], []
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
    if weight_files(folder):
        found = read_folder(folder)
    elif (folder / PUBLISHED_PROJECTOR_FILE).is_file():
        found = dict(read_tensors(folder / PUBLISHED_PROJECTOR_FILE))
    else:
        raise UserError(f"--keep-unused {folder} has no published weights")
    unused: Tensors = {}
    for key, tensor in found.items():
        try:
            dead = our_key(layout, key, config) is None
        except KeyError:
            raise UserError(
                f"--keep-unused {folder}: its weight {key} is not part of the {layout.name} layout"
            ) from None
        if dead and key not in weights:
            unused[key] = tensor if dtype is None else _cast(tensor, dtype)
    return unused


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


def _write_tokenizer(out: Path, tokenizer: PreTrainedTokenizerBase, options: ExportOptions) -> None:
    """Published tokenizer files where there are some, else ours without the placeholder."""
    for folder in (options.tokenizer, options.keep_unused):
        files = [folder / name for name in _TOKENIZER_FILES] if folder is not None else []
        files = [file for file in files if file.is_file()]
        if files:
            for file in files:
                shutil.copy(file, out)
            return
        if folder is not None and folder == options.tokenizer:
            raise UserError(f"--tokenizer {folder} has no tokenizer files")
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = out / name
        if path.is_file():
            values = _without_marker(json.loads(path.read_text(encoding="utf-8")))
            write_whole(path, _json(values))


def _without_marker(value: Any) -> Any:
    """A tokenizer file's values without the image placeholder, which published ones do not have."""
    if isinstance(value, list):
        kept = [each for each in value if not _is_marker(each)]
        return [_without_marker(each) for each in kept]
    if isinstance(value, dict):
        return {key: _without_marker(each) for key, each in value.items() if not _is_marker(each)}
    return value


def _is_marker(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return content == IMAGE_MARKER


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, default=str, ensure_ascii=False) + "\n"
