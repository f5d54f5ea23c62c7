"""Loading a model and its processor from any supported folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llava_uhd.checkpoint.lora import is_lora, merged, open_lora
from llava_uhd.checkpoint.lora_base import Wanted
from llava_uhd.checkpoint.lora_layers import attach
from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.checkpoint.parts import (
    quiet_library,
    read_language_config,
    read_language_model,
    read_model_config,
    read_processor,
    read_projector,
)
from llava_uhd.checkpoint.published_folder import (
    open_published,
    replace_tower,
)
from llava_uhd.checkpoint.quantize import Quantization, library_settings
from llava_uhd.checkpoint.sources import resolve_folder
from llava_uhd.checkpoint.weights import (
    Tensors,
    check_state,
    first_line,
    read_folder,
    read_json,
    weight_files,
)
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.model.devices import choose_device
from llava_uhd.model.generation import tidy_generation_config
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor

Loaded = tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]
Opened = tuple[LlavaUHDConfig, Tensors, LlavaUHDProcessor]


def load_pretrained(
    path: str | Path,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    quantization: str | Quantization | None = None,
    attn_implementation: str | None = None,
    merge_lora: bool | None = None,
) -> Loaded:
    """Loads a model and its processor.

    Args:
        path: folder or hub id: one of ours, a published one (LLaVA-UHD v1 or v2, LLaVA-1.5,
            LLaVA-NeXT, LLaVA-OneVision, or transformers' own classes of the last three), a folder
            with only a projector or with a LoRA adapter, ours or published (the rest then comes
            from ``base``).
        base: language model of a projector-only or LoRA folder; of the latter also a whole
            multimodal checkpoint. None takes the recorded one.
        vision_tower: folder or hub id whose tower replaces the checkpoint's own.
        dtype: of the parameters; None means float32.
        device: where to put the model; None leaves it on the CPU.
        quantization: "4bit" or "8bit" (bitsandbytes; the language model's linear layers only).
        attn_implementation: of the language model ("sdpa", "eager", "flash_attention_2", ...).
        merge_lora: True merges an adapter into the weights (before they are quantised), False keeps
            it beside them (needs peft). None merges, except where ``quantization`` is given.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        UserError: missing files, unknown layout, or weights that do not fit; one line each.
    """
    folder = resolve_folder(path, "model")
    adapter = None
    if is_lora(folder):
        opened, adapter = open_lora(folder, Wanted(base, vision_tower, open_checkpoint))
        if quantization is None if merge_lora is None else merge_lora:
            opened, adapter = merged(opened, adapter, parse_dtype(dtype)), None
    else:
        opened = open_checkpoint(folder, base, vision_tower)
    config, state, processor = opened
    model = build_model(
        config,
        state,
        what=f"checkpoint {folder}",
        dtype=dtype,
        device=device,
        quantization=quantization,
        attn_implementation=attn_implementation,
    )
    if adapter is not None:
        attach(model, adapter)
    set_generation(model, processor.tokenizer, folder / "generation_config.json")
    return model.eval(), processor


def open_checkpoint(
    folder: Path, base: str | Path | None = None, vision_tower: str | Path | None = None
) -> Opened:
    """What `load_pretrained` builds a model from.

    Args:
        folder: see ``path`` there. An adapter is merged in the dtype of its base.
        base: see `load_pretrained`.
        vision_tower: see `load_pretrained`.

    Returns:
        The configuration, the weights under the model's names, and the processor.

    Raises:
        UserError: see `load_pretrained`.
    """
    if is_lora(folder):
        return merged(*open_lora(folder, Wanted(base, vision_tower, open_checkpoint)))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}/config.json does not exist: name the folder of a whole model, ours or a "
            "published one"
        )
    values = read_json(folder / "config.json")
    if values.get("model_type") == "llava_uhd":
        return _open_ours(folder, base, vision_tower)
    return open_published(folder, values, base, vision_tower)


def build_model(
    config: LlavaUHDConfig,
    state: Tensors,
    *,
    what: str,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    quantization: str | Quantization | None = None,
    attn_implementation: str | None = None,
    may_miss: tuple[str, ...] = (),
) -> LlavaUHDForConditionalGeneration:
    """Builds a model and fills it from tensors under its own names.

    Args:
        config: of the model.
        state: every parameter except those under ``may_miss``, which get their initial values.
        what: named in errors.
        dtype: see `load_pretrained`.
        device: see `load_pretrained`.
        quantization: see `load_pretrained`.
        attn_implementation: see `load_pretrained`.
        may_miss: prefixes of parameters that a new model initialises.

    Raises:
        UserError: the tensors do not fit the configuration.
    """
    if device is not None:
        device = choose_device(str(device))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skeleton = LlavaUHDForConditionalGeneration(config)
    check_state(skeleton, state, what, may_miss)
    options: dict[str, Any] = {"dtype": parse_dtype(dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = library_settings(quantization, options["dtype"])
        options["device_map"] = {"": str(device or "cpu")}
    try:
        # Its list of new parameters says nothing that was not checked before.
        with quiet_library():
            model, report = LlavaUHDForConditionalGeneration.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, **options
            )
    except (ValueError, ImportError) as error:
        if attn_implementation is None:
            raise
        reason = first_line(error)
        raise UserError(f"attn_implementation '{attn_implementation}': {reason:.200}") from error
    unexpected = sorted(report["unexpected_keys"])
    missing = [key for key in report["missing_keys"] if not key.startswith(may_miss or ("\0",))]
    if unexpected or missing:
        raise UserError(f"{what}: not loaded {missing[:8]}, not used {unexpected[:8]}")
    if device is not None and quantization is None:
        model = model.to(device)
    return model


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from a dtype, its name, or None (float32).

    Raises:
        UserError: unknown name.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype)
    found = getattr(torch, short, None)
    if short not in ("float32", "bfloat16", "float16", "float64") or found is None:
        raise UserError(f"dtype '{dtype}' is not one of float32, bfloat16, float16")
    return found


def _open_ours(folder: Path, base: str | Path | None, vision_tower: str | Path | None) -> Opened:
    config = read_model_config(folder)
    processor = read_processor(folder)
    if weight_files(folder):
        state = read_folder(folder)
    else:
        recorded = read_manifest(folder)
        language_model = base or recorded.get("language_model")
        tower = vision_tower or recorded.get("vision_tower")
        if not isinstance(language_model, str | Path) or not isinstance(tower, str | Path):
            raise UserError(
                f"{folder} has no model weights; if it holds a projector only, it does not say "
                "which language model and tower that belongs to: pass base and vision_tower"
            )
        state = _from_base(config, language_model, tower) | read_projector(folder, config)
    if vision_tower is not None:
        state = replace_tower(config, state, vision_tower)
    return config, state, processor


def _from_base(config: LlavaUHDConfig, base: str | Path, tower: str | Path) -> Tensors:
    folder = resolve_folder(base, "language model")
    width = read_language_config(folder).hidden_size
    if width != config.hidden_size:
        raise UserError(
            f"language model {folder} has width {width}, the projector was trained for "
            f"{config.hidden_size}"
        )
    return replace_tower(config, read_language_model(folder), tower)


def set_generation(
    model: LlavaUHDForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, file: Path
) -> None:
    """The checkpoint's own settings, if it has a ``generation_config.json``.

    Missing ids come from the tokenizer; sampling fields that contradict greedy are dropped.
    """
    settings = model.generation_config
    if settings is None:
        return
    if file.is_file():
        settings = model.generation_config = GenerationConfig.from_dict(read_json(file))
    settings.bos_token_id = tokenizer.bos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    tidy_generation_config(settings)
