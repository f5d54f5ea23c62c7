"""Values that the configurations of all published layouts have in common, read and written."""

from __future__ import annotations

import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava_uhd.checkpoint.published.layout import Values
from llava_uhd.config.model import LlavaUHDConfig, make_config
from llava_uhd.errors import UserError

# Ids that the published slicing code writes for any tokenizer: Llama's comma and newline.
COMMA_ID, NEWLINE_ID = 29892, 13

# Language model of ours -> (published class, published model_type).
FAMILIES = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "qwen2": ("LlavaQwenForCausalLM", "llava_qwen"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
}

# Published classes of the same family with language models that do not load here.
_FOREIGN = ("mpt", "gemma", "mixtral", "qwen_moe", "qwenmoe")

# Keys under which the two lineages and their scripts record the file of the pre-trained upsampler.
VDIM_KEYS = ("jbu_vdim", "vdim_ckpt", "jbu_ckpt")

_NOT_OF_THE_TEXT = {
    *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version"),
    *("name_or_path", "_name_or_path", "_attn_implementation"),
}


def family(values: Values) -> str | None:
    """Language model of a published configuration ("llama", "qwen2", "mistral"), or None.

    The class decides: ``model_type`` has been edited in some published files, and "llava" is also
    that of a class of transformers.
    """
    named = values.get("architectures")
    named = named if isinstance(named, list) else []
    for name, (architecture, _) in FAMILIES.items():
        if architecture in named:
            return name
    if named and foreign_language_model(values):
        return None
    for name, (_, model_type) in FAMILIES.items():
        if values.get("model_type") == model_type:
            return name
    return None


def foreign_language_model(values: Values) -> str | None:
    """Name of the language model of a published class that has one that does not load here."""
    named = values.get("architectures")
    words = [str(each) for each in named] if isinstance(named, list) else []
    words.append(str(values.get("model_type")))
    for word in words:
        match = re.fullmatch(r"llava_?(\w+?)(forcausallm)?", word.lower())
        if match and match.group(1) in _FOREIGN:
            return match.group(1)
    return None


def check_common(values: Values, marks: bool = False) -> None:
    """Raises UserError for recorded settings that mean another model.

    Args:
        values: of ``config.json``.
        marks: start and end tokens around an image may be set.
    """
    feature = values.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise UserError(f"mm_vision_select_feature '{feature}' is not supported, only 'patch'")
    if values.get("mm_use_im_start_end") and not marks:
        raise UserError(
            "mm_use_im_start_end is set: start and end tokens around an image are not supported"
        )
    if values.get("s2"):
        raise UserError("s2 is set: towers that read an image at several sizes are not supported")


def text_config(values: Values) -> PreTrainedConfig:
    """Language-model part of a published configuration, without its storage dtype."""
    model_type = family(values)
    known = AutoConfig.for_model(model_type).to_dict().keys() | {"rope_theta", "rope_scaling"}
    skipped = set(_NOT_OF_THE_TEXT)
    # The published Qwen class takes no scaling; and the library warns of the old name even where it
    # says nothing.
    if values.get("rope_scaling") is None or model_type == "qwen2":
        skipped.add("rope_scaling")
    kept = {key: value for key, value in values.items() if key in known - skipped}
    if isinstance(kept.get("rope_scaling"), dict) and "type" in kept["rope_scaling"]:
        rope = dict(kept["rope_scaling"])
        kept["rope_scaling"] = {"rope_type": rope.pop("type"), **rope}  # its newer name
    return make_config({**kept, "model_type": model_type}, "the language model's configuration")


def separator(token: int, vocabulary: int) -> int | None:
    """A hard-coded separator, or None (the tokenizer's own) where the vocabulary is too small."""
    return token if token < vocabulary else None


def first_stage(values: Values) -> bool:
    """Whether only the projector learned: the checkpoint was trained on plain captions."""
    return bool(values.get("tune_mm_mlp_adapter")) or values.get("mm_tunable_parts") == (
        "mm_mlp_adapter"
    )


# What newer libraries write of any configuration and the published code neither reads nor lacks.
_GENERAL = {
    *("id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "layer_types"),
}


def text_values(config: LlavaUHDConfig) -> Values:
    """Language-model part of a configuration as the published code reads it.

    Raises:
        UserError: no published layout has such a language model.
    """
    text = config.text_config
    if text.model_type not in FAMILIES:
        raise UserError(
            f"a published layout has no '{text.model_type}' language model, only "
            f"{', '.join(FAMILIES)}"
        )
    architecture, model_type = FAMILIES[text.model_type]
    values: dict[str, Any] = {
        key: value
        for key, value in text.to_dict().items()
        if key not in _NOT_OF_THE_TEXT | _GENERAL
    }
    if values.get("head_dim") == text.hidden_size // text.num_attention_heads:
        del values["head_dim"]  # follows from the rest, as the published code takes for granted
    del values["rope_parameters"]
    values |= rope_values(text)
    if "rope_type" in (values["rope_scaling"] or {}):  # published readers take "type" and "factor"
        rope = dict(values["rope_scaling"])
        values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    return {**values, "architectures": [architecture], "model_type": model_type}


def rope_values(text: PreTrainedConfig) -> Values:
    """Rotary settings under the names of transformers 4.x: ``rope_theta`` and ``rope_scaling``."""
    rope = dict(text.to_dict().get("rope_parameters") or {})
    theta = rope.pop("rope_theta", 10000.0)
    usual = rope.get("rope_type", "default") == "default"
    return {"rope_theta": theta, "rope_scaling": None if usual else rope}


def common_values(config: LlavaUHDConfig, tower: str) -> Values:
    """What every published configuration records of tower and projector.

    Args:
        config: of the model.
        tower: path or hub id of the vision tower.
    """
    return {
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_tower": tower,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
