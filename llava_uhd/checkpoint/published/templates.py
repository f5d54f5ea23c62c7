"""The conversation template of a published checkpoint: its language model tells it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

# Sizes of vocabularies that mean a language model with turns of its own.
_YI, _LLAMA_3 = 64000, 128256


def usual_template(text: PreTrainedConfig, values: dict[str, Any]) -> str:
    """Name of the template with which models over such a language model were published.

    Args:
        text: configuration of the language model.
        values: where ``_name_or_path`` may record the language model's name, which tells Llama 2
            from Vicuna (the same shape).
    """
    kind = text.model_type
    if kind == "mistral":
        return "mistral_instruct"
    if kind != "llama":
        return "qwen_1_5"
    if text.vocab_size >= _LLAMA_3:
        return "llama_3"
    if _YI <= text.vocab_size < 2 * _YI:
        return "chatml_direct"
    recorded = str(values.get("_name_or_path") or "").lower()
    return "llava_llama_2" if "llama-2" in recorded else "v1"
