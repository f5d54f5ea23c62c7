"""Quantised weights of the language model (bitsandbytes)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from transformers import BitsAndBytesConfig

from llava_uhd.errors import UserError

BITS = ("4bit", "8bit")

# Only the language model's own linear layers are quantised: tower, projector and head stay.
UNTOUCHED = ("vision_tower", "projector", "lm_head")


@dataclass(frozen=True)
class Quantization:
    """How frozen linear layers are kept.

    Attributes:
        bits: "4bit" or "8bit".
        double_quant: with "4bit", the scales are quantised too.
        quant_type: with "4bit": "nf4" or "fp4".
    """

    bits: str
    double_quant: bool = True
    quant_type: str = "nf4"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"quantization '{self.bits}' is not one of {', '.join(BITS)}")


def library_settings(wanted: str | Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What the library is told.

    Args:
        wanted: "4bit", "8bit", or with its details.
        dtype: that quantised layers compute in.

    Raises:
        UserError: unknown kind, or the library is missing.
    """
    wanted = Quantization(wanted) if isinstance(wanted, str) else wanted
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization '{wanted.bits}' needs bitsandbytes: bash install.sh --extras qlora"
        )
    skipped = list(UNTOUCHED)
    if wanted.bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.quant_type,
        bnb_4bit_use_double_quant=wanted.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )
