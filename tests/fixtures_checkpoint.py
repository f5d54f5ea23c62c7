"""Checkpoints for tests: compared, copied, taken apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from fixtures_tiny import picture
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor

Parts = tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]

# Golden checkpoints of LLaVA-UHD v2, and the folder of the tower inside them.
V2_NAMES = ("full_llama", "full_llama_old", "full_qwen2")
V2_TOWER = "clip-tiny-patch14-336"


def logits(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(text="USER: <image>\nWhat? <image>", images=[picture(96, 64), picture(9, 9)])
    with torch.no_grad():
        return model(**inputs).logits


def assert_same(before: Any, after: Any) -> None:
    """Parameters and all buffers, the ones that files do not hold included."""
    for kind in ("named_parameters", "named_buffers"):
        first, second = dict(getattr(before, kind)()), dict(getattr(after, kind)())
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name


def save(folder: Path, parts: Parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def copy(published: Path, target: Path, *left_out: str, **changes: Any) -> Path:
    """A copy of the golden checkpoint without some of its entries, and with another config."""
    shutil.copytree(published, target, ignore=shutil.ignore_patterns(*left_out))
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return target


def disturb(file: Path) -> None:
    state = {key: tensor + 1 for key, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def split(folder: Path, binary: bool) -> None:
    """The single weight file of a folder as three shards with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, (key, tensor) in enumerate(sorted(state.items())):
        stem = "pytorch_model" if binary else "model"
        suffix = "bin" if binary else "safetensors"
        shards.setdefault(f"{stem}-0000{number % 3 + 1}-of-00003.{suffix}", {})[key] = tensor
    for name, part in shards.items():
        if binary:
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    table = {key: name for name, part in shards.items() for key in part}
    stem = "pytorch_model.bin" if binary else "model.safetensors"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def make_base(published: Path, folder: Path) -> Path:
    """The golden checkpoint's language model as a folder of its own."""
    state = load_file(published / "model.safetensors")
    kept = {k: v for k, v in state.items() if "mm_projector" not in k and "vision" not in k}
    values = json.loads((published / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings")
    model = LlamaForCausalLM(LlamaConfig(**{name: values[name] for name in names})).bfloat16()
    model.load_state_dict(kept)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(published / name, folder)
    return folder


def v2_folders(source: Path, target: Path) -> dict[str, Path]:
    """Whole golden folders; the one of the old dialect shares weights and tower with another."""
    old = target / "old"
    old.mkdir()
    for file in (source / "full_llama_old").iterdir():
        (old / file.name).symlink_to(file)
    for name in ("model.safetensors", V2_TOWER):
        (old / name).symlink_to(source / "full_llama" / name)
    return {name: source / name for name in V2_NAMES} | {"full_llama_old": old}
