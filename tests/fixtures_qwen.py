"""Tiny Qwen folders as transformers writes them: byte-level tokenizer, language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from fixtures_tiny import LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

QWEN2: dict[str, Any] = {**LLAMA, "model_type": "qwen2"}
QWEN3: dict[str, Any] = {**LLAMA, "model_type": "qwen3", "head_dim": 24}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Word starts are "\u0120", newlines "\u010a": the printable names of those bytes.
MERGES = ["\u010a \u010a", "\u0120 a", "h e", "t he", "\u0120 the", "e d", "r ed"]


def byte_names() -> list[str]:
    """The 256 bytes in the order and with the names of GPT-2 and Qwen: printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(rest))]


def save_tokenizer(folder: Path, eos: str = "<|im_end|>") -> PreTrainedTokenizerBase:
    """Writes a Qwen2 tokenizer of 266 pieces; comma and newline have their published ids."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*byte_names(), *(merge.replace(" ", "") for merge in MERGES)]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    added = {
        str(len(pieces) + place): {"content": text, "normalized": False, "special": True}
        for place, text in enumerate(SPECIAL)
    }
    values = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": eos,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return AutoTokenizer.from_pretrained(folder)


def save_language_model(
    folder: Path, values: dict[str, Any], eos: str = "<|im_end|>", seed: int = 0
) -> Path:
    """Writes a language model with more rows than its tokenizer has tokens, as published."""
    tokenizer = save_tokenizer(folder, eos)
    config = AutoConfig.for_model(
        **values,
        vocab_size=len(tokenizer) + 6,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Strong layers: with tied embeddings a token would otherwise only repeat itself.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(15.0 if ".layers." in name else 6.0)
    model.save_pretrained(folder)
    return folder
