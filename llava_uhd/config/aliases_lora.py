"""Published flags of LoRA and QLoRA training, and the keys of the section ``lora`` they mean."""

from __future__ import annotations

from typing import Any

from llava_uhd.config.flags import Context, Inert, translates, true_or_false
from llava_uhd.errors import UserError

# What the published program takes without the flags.
PUBLISHED_R, PUBLISHED_ALPHA = 64, 16

_FLAG_KEYS = {
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_bias": "lora.bias",
}
_BITS = {16: None, 8: "8bit", 4: "4bit"}


def _has_adapters(context: Context) -> bool:
    """Whether the command, or else the recipe, asks for adapters."""
    enabled = context.flags.get("lora_enable")
    return enabled if isinstance(enabled, bool) else context.recipe.get("lora.r") is not None


@translates("lora_enable")
def _lora(value: Any, context: Context) -> dict[str, Any] | Inert:
    recipe, flags = context.recipe, context.flags
    if not true_or_false("lora_enable", value):
        if recipe.get("lora.r") is None:
            return Inert("all weights of the learning parts are trained")
        return {"lora": None}
    keys: dict[str, Any] = {}
    if recipe.get("lora.r") is None:
        keys = {"lora.r": PUBLISHED_R, "lora.alpha": PUBLISHED_ALPHA}
    given = {key: flags[name] for name, key in _FLAG_KEYS.items() if name in flags}
    return (keys | given) or Inert("the recipe trains adapters already")


def _setting(name: str, key: str) -> None:
    @translates(name)
    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        if not _has_adapters(context):
            return Inert("it only matters with --lora_enable True")
        return {key: value}


for _name, _key in _FLAG_KEYS.items():
    _setting(_name, _key)


@translates("lora_weight_path")
def _adapter(value: Any, context: Context) -> dict[str, Any] | Inert:
    if not _has_adapters(context):
        return Inert("it only matters with --lora_enable True")
    if not value:
        return Inert("the adapter starts from nothing")
    return {"lora.adapter_file": value}


@translates("bits")
def _bits(value: Any, context: Context) -> dict[str, Any] | Inert:
    if isinstance(value, bool) or value not in _BITS:
        raise UserError(f"--bits must be 4, 8 or 16, got {value!r}")
    wanted = _BITS[value]
    if wanted is None and context.recipe.get("lora.quantization") is None:
        return Inert("weights are not quantised in training")
    if wanted is not None and not _has_adapters(context):
        raise UserError(
            f"--bits {value} keeps the weights quantised, so only adapters can learn: add "
            "--lora_enable True"
        )
    return {"lora.quantization": wanted}


def _quantised(name: str, key: str) -> None:
    @translates(name)
    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        bits = context.flags.get("bits")
        wanted = context.recipe.get("lora.quantization") if bits is None else _BITS.get(bits)
        if wanted != "4bit":
            return Inert("it only matters with --bits 4")
        return {key: value}


_quantised("double_quant", "lora.double_quant")
_quantised("quant_type", "lora.quant_type")
