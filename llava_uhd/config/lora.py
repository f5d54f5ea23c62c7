"""The section ``lora`` of a recipe: low-rank adapters, and the quantised weights below them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from llava_uhd.errors import UserError

ALL_LINEAR = "all-linear"


@dataclass
class LoraSection:
    r"""Adapters instead of the language model's own weights.

    With ``r``, a part that carries adapters learns through them alone: its rate in ``stage.learn``
    is theirs, its own weights are frozen. Parts without adapters learn as they always do.

    Attributes:
        r: rank of the adapters. None: no adapters.
        alpha: the adapters' product is scaled by ``alpha / r``; None means ``2 * r``. Published:
            rank 128 with alpha 256.
        dropout: of the adapters' input, in [0, 1).
        bias: existing biases that learn too: "none", "lora_only" (of the adapted layers) or "all"
            (of the adapted parts).
        targets: linear layers of the language model that get an adapter: "all-linear" (all of its
            decoder layers), or names (``q_proj``) or regular expressions of whole paths inside the
            language model (``model\.layers\.[0-9]\.mlp\..*``). Nothing outside it is matched.
        extra_targets: further layers, as regular expressions of whole paths in the model
            (``vision_tower\.layers\.\d+\.self_attn\.[qv]_proj``); None: none.
        dora: learn the magnitude of each output beside the low-rank direction.
        adapter_file: folder of an earlier LoRA run, ours or published, whose adapter this run
            starts from.
        quantization: "4bit" or "8bit" keeps the frozen linear layers of the language model
            quantised (QLoRA, needs bitsandbytes). None: as they are.
        double_quant: with "4bit", quantise the scales too.
        quant_type: with "4bit", the values of the four bits.
    """

    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.05
    bias: Literal["none", "lora_only", "all"] = "none"
    targets: str | list[str] = ALL_LINEAR
    extra_targets: str | list[str] | None = None
    dora: bool = False
    adapter_file: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    double_quant: bool = True
    quant_type: Literal["nf4", "fp4"] = "nf4"

    def __post_init__(self) -> None:
        if self.r is None:
            self._check_unused()
            return
        if self.r < 1:
            raise UserError(f"lora.r must be at least 1, or null for no adapters, got {self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"lora.alpha must be above 0, or null for 2 x lora.r, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        for key in ("targets", "extra_targets"):
            for pattern in _listed(getattr(self, key)):
                _check_pattern(key, pattern)
        if not self.target_patterns:
            raise UserError(
                f"lora.targets is empty: name layers of the language model, or {ALL_LINEAR}"
            )

    def _check_unused(self) -> None:
        """Without a rank the other settings would silently do nothing."""
        for item in dataclasses.fields(self):
            if getattr(self, item.name) != item.default:
                raise UserError(
                    f"lora.{item.name} is set but lora.r is not: give the adapters a rank "
                    "(--lora.r 128), or drop the section (--lora_enable False)"
                )

    @property
    def enabled(self) -> bool:
        """Whether there are adapters."""
        return self.r is not None

    @property
    def scale_alpha(self) -> float:
        """``alpha``, with its default filled in."""
        return 2 * (self.r or 0) if self.alpha is None else self.alpha

    @property
    def target_patterns(self) -> list[str]:
        """``targets`` as a list."""
        return _listed(self.targets)

    @property
    def extra_patterns(self) -> list[str]:
        """``extra_targets`` as a list."""
        return _listed(self.extra_targets)


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"lora.{key}: '{pattern}' is no regular expression ({error}): escape it, or name the "
            "layer alone (q_proj)"
        ) from error
