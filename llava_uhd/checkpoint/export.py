"""Writing a checkpoint in a published layout, in that of transformers, or a published one in ours.

A published configuration has fewer words than ours: what it cannot say is a constant of the
published code. So the values are written, read back, and compared; a model that would come back as
another one is refused. What was written is loaded again, and its logits are compared with those of
the source.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llava_uhd.checkpoint.agreement import Agreement, check_agreement, knows_videos
from llava_uhd.checkpoint.differences import compare
from llava_uhd.checkpoint.library_files import (
    add_unread,
    generation_settings,
    pixel_values,
    placeholder_values,
    with_placeholders,
    with_rows,
    write_processor,
    write_tokens,
)
from llava_uhd.checkpoint.load import open_checkpoint
from llava_uhd.checkpoint.manifest import read_manifest, write_manifest, write_whole
from llava_uhd.checkpoint.parts import (
    PROJECTOR_FILE,
    PUBLISHED_PROJECTOR_FILE,
    read_model_config,
    read_projector,
    read_tokenizer,
)
from llava_uhd.checkpoint.published import LAYOUTS, LIBRARY, Layout, find_layout, key_map
from llava_uhd.checkpoint.published.families import own_layout
from llava_uhd.checkpoint.published.library import PIXELS
from llava_uhd.checkpoint.published.values import common_values, text_values
from llava_uhd.checkpoint.published_folder import stored_names
from llava_uhd.checkpoint.shards import parse_size, write_shards
from llava_uhd.checkpoint.tokenizer_files import (
    WORD_STARTS,
    check_tokenizer,
    holds_tokenizer,
    write_tokenizer,
)
from llava_uhd.checkpoint.tower_files import known_tower, tower_folder, write_tower
from llava_uhd.checkpoint.weights import (
    Tensors,
    check_state,
    read_folder,
    read_json,
    read_tensors,
    weight_files,
)
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError, make_folder
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.registry import nearest_hint
from llava_uhd.text.processor import LlavaUHDProcessor

logger = logging.getLogger(__name__)

OURS, ORIGINAL = "llava_uhd", "original"
TARGETS = (*(layout.slug for layout in LAYOUTS), OURS, ORIGINAL)
MAX_SHARD = "5GB"
_TOKENS_OF_VIDEOS = ("video.pool", "video.newline", "video.strategy")


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
        max_shard: size of the largest file of weights, for instance ``2GB``; None: `MAX_SHARD`.
        check: load what was written and compare its logits with the source's.
    """

    keep_unused: Path | None = None
    tokenizer: Path | None = None
    vision_tower: str | None = None
    dtype: torch.dtype | None = None
    max_shard: str | None = None
    check: bool = True


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` did.

    Attributes:
        layout: slug of the written layout.
        notes: what the new layout does not say, as one line each.
        agreement: of the logits of both; None where nothing was compared.
    """

    layout: str
    notes: list[str] = field(default_factory=list)
    agreement: Agreement | None = None


@dataclass
class _Source:
    """What is converted: ``processor`` is None for a projector alone."""

    folder: Path
    config: LlavaUHDConfig
    state: Tensors
    tokenizer: PreTrainedTokenizerBase
    processor: LlavaUHDProcessor | None


def export_checkpoint(
    source: Path, target: str, out: Path, options: ExportOptions | None = None
) -> Exported:
    """Writes a checkpoint in another layout.

    Weights are mapped and written shard by shard. The check afterwards computes each model once.

    Args:
        source: folder of a whole model, ours or published (of an adapter, it is merged), or of a
            projector of ours.
        target: one of `TARGETS`; "original" is the layout of the system that the model belongs to.
        out: new or empty folder.
        options: see there.

    Raises:
        UserError: the layout cannot hold the model, ``out`` holds something, or what was written
            computes something else.
    """
    options = options or ExportOptions()
    if target not in TARGETS:
        hint = nearest_hint(target, list(TARGETS))
        raise UserError(f"unknown layout '{target}'{hint} (known: {', '.join(TARGETS)})")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder")
    parse_size(options.max_shard or MAX_SHARD)  # before anything large is read
    opened = _open(source)
    if target == OURS:
        layout, notes = None, _write_ours(opened, out, options)
    else:
        layout = _layout(target, opened)
        opened.config = layout.prepare(opened.config)
        write = _write_original if layout.additive else _write_library
        notes = write(layout, opened, out, options)
    agreement = None
    if options.check and opened.processor is not None:
        agreement = check_agreement(
            source,
            out,
            opened.processor,
            library=layout is LIBRARY,
            videos=knows_videos(opened.processor) and not _videos_differ(notes),
            rounded=options.dtype,
        )
    return Exported(layout.slug if layout else OURS, notes, agreement)


def _videos_differ(notes: list[str]) -> bool:
    """Whether the new layout says nothing of how frames become tokens."""
    return any(note.startswith(_TOKENS_OF_VIDEOS) for note in notes)


def _open(source: Path) -> _Source:
    if not weight_files(source) and (source / PROJECTOR_FILE).is_file():
        config = read_model_config(source)
        state = read_projector(source, config)
        return _Source(source, config, state, read_tokenizer(source), None)
    config, state, processor = open_checkpoint(source)
    return _Source(source, config, state, processor.tokenizer, processor)


def _layout(target: str, source: _Source) -> Layout:
    """The layout to write, which holds the model's kind of language model.

    Raises:
        UserError: it does not.
    """
    if target == ORIGINAL:
        values = read_json(source.folder / "config.json")
        own = find_layout(values, stored_names(source.folder))
        layout = own if own is not None and own is not LIBRARY else own_layout(source.config)
    else:
        layout = next(each for each in LAYOUTS if each.slug == target)
    kind = source.config.text_config.model_type
    if layout.languages is not None and kind not in layout.languages:
        raise UserError(
            f"the {layout.name} layout has no '{kind}' language model, only "
            f"{', '.join(layout.languages)}"
        )
    compression = source.config.compression
    if compression.method != "none" and compression.stride > 1:
        # It has no weights of its own, and the published files leave it to whoever loads them.
        logger.warning(
            "the %s layout cannot say that this model compresses visual tokens (%s): who loads it "
            "runs without, or sets --compression.layer %s --compression.stride %s",
            layout.name,
            compression.method,
            compression.layer,
            compression.stride,
        )
    return layout


def _renamed(layout: Layout, source: _Source) -> Tensors:
    """The weights under the layout's names; the source lets go of them."""
    config, state = source.config, source.state
    if config.text_config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)  # the table itself
    weights = {layout.keys.to_published(key, config): tensor for key, tensor in state.items()}
    state.clear()
    return weights


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _stored_dtype(weights: Tensors, options: ExportOptions) -> str:
    dtype = options.dtype or next(iter(weights.values())).dtype
    return str(dtype).removeprefix("torch.")


def _limit(options: ExportOptions) -> int:
    return parse_size(options.max_shard or MAX_SHARD)


# --- ours -----------------------------------------------------------------------------------------


def _write_ours(source: _Source, out: Path, options: ExportOptions) -> list[str]:
    if source.processor is None:
        raise UserError(f"{source.folder} holds a projector only: it is in our layout already")
    config, state = source.config, source.state
    with torch.device("meta"):
        check_state(LlavaUHDForConditionalGeneration(config), state, f"checkpoint {source.folder}")
    dtypes = {tensor.dtype for tensor in state.values()}
    dtype = options.dtype or (next(iter(dtypes)) if len(dtypes) == 1 else torch.float32)
    make_folder(out, "output folder")
    config.architectures = [LlavaUHDForConditionalGeneration.__name__]
    config.dtype = dtype
    config.save_pretrained(out)
    config.dtype = None
    if config.text_config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    write_shards(out, state, _limit(options), lambda _, tensor: _cast(tensor, dtype))
    _write_generation(source, out)
    source.processor.save_pretrained(out)
    write_manifest(
        out, kind="model", finished=True, template=config.template, source=str(source.folder)
    )
    return []


def _write_generation(source: _Source, out: Path) -> None:
    file = source.folder / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, out / file.name)
    elif source.processor is not None:
        generation_settings(source.processor).save_pretrained(out)


# --- transformers ---------------------------------------------------------------------------------


def _write_library(layout: Layout, source: _Source, out: Path, options: ExportOptions) -> list[str]:
    if source.processor is None:
        raise UserError(
            f"{source.folder} holds a projector only: train the whole model, or write {ORIGINAL}"
        )
    config = source.config
    values = layout.write_config(config)
    tokenizer = with_placeholders(source.tokenizer, config)
    values = placeholder_values(values, tokenizer, config)
    names = [layout.keys.to_published(key, config) for key in source.state]
    read = {**values, PIXELS: pixel_values(config)}
    notes = compare(layout, read, config, names, source.tokenizer)
    weights = _renamed(layout, source)
    add_unread(weights, config)
    values["torch_dtype"] = _stored_dtype(weights, options)
    rows = values["text_config"]["vocab_size"]
    make_folder(out, "output folder")
    write_whole(out / "config.json", _json(values))
    write_shards(
        out,
        weights,
        _limit(options),
        lambda key, tensor: with_rows(key, _cast(tensor, options.dtype), rows),
    )
    folder = options.tokenizer or _tokenizer_source(source, options)
    write_tokens(out, tokenizer, config, folder)
    write_processor(out, config, values, source.processor)
    _write_generation(source, out)
    if WORD_STARTS in tokenizer.init_kwargs:
        notes.append(
            "the tokenizer of the new folder starts a word behind every token of its own: as the "
            "original code does behind an image, unlike it behind the end of an earlier answer"
        )
    return notes


# --- original systems -----------------------------------------------------------------------------


def _write_original(
    layout: Layout, source: _Source, out: Path, options: ExportOptions
) -> list[str]:
    config, tokenizer = source.config, source.tokenizer
    if options.tokenizer is not None:  # before the large files are written
        check_tokenizer(options.tokenizer, tokenizer)
    weights = _renamed(layout, source)
    tower = options.vision_tower or known_tower(config)
    values = {
        **text_values(config),
        **common_values(config, tower or tower_folder(config)),
        **layout.write_config(config),
        "torch_dtype": _stored_dtype(weights, options),
    }
    if tokenizer.model_max_length < 10**9:  # libraries write "none" as a huge number
        values["tokenizer_model_max_length"] = tokenizer.model_max_length
    notes = compare(layout, values, config, list(weights), tokenizer)
    if options.keep_unused is not None:
        weights |= _unused_weights(layout, config, options.keep_unused, weights)
    make_folder(out, "output folder")
    write_whole(out / "config.json", _json(values))
    if tower is None:
        write_tower(out / tower_folder(config), config)
    if source.processor is not None:
        write_shards(out, weights, _limit(options), lambda _, each: _cast(each, options.dtype))
    else:
        kept = {key: _cast(each, options.dtype).contiguous() for key, each in weights.items()}
        torch.save(kept, out / PUBLISHED_PROJECTOR_FILE)
    folder = options.tokenizer or _tokenizer_source(source, options)
    file = source.folder / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, out / file.name)
    return notes + write_tokenizer(out, tokenizer, folder, config.text_config.model_type)


def _tokenizer_source(source: _Source, options: ExportOptions) -> Path | None:
    """A folder at hand with the published files of this tokenizer."""
    recorded = read_manifest(source.folder).get("language_model")
    candidates = [options.keep_unused, Path(recorded) if isinstance(recorded, str) else None]
    values = read_json(source.folder / "config.json")
    if values.get("model_type") != OURS and not LIBRARY.matches(values, ()):
        candidates.insert(0, source.folder)
    tokenizer = source.tokenizer
    return next((each for each in candidates if each and holds_tokenizer(each, tokenizer)), None)


def _unused_weights(
    layout: Layout, config: LlavaUHDConfig, folder: Path, weights: Tensors
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
        return read_folder(folder, dead.__contains__)
    tensors = read_tensors(folder / PUBLISHED_PROJECTOR_FILE)
    return {key: tensor for key, tensor in tensors if key in dead}


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, default=str, ensure_ascii=False) + "\n"
