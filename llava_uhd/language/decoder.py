"""Running a causal language model on embeddings, with logits only where they are needed."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava_uhd.errors import UserError

IGNORE_INDEX = -100


def decode(language_model: PreTrainedModel, **inputs: Any) -> BaseModelOutputWithPast:
    """Runs the decoder without its head.

    Args:
        language_model: any causal language model of transformers.
        **inputs: of its decoder: ``inputs_embeds`` (B, T, D), ``attention_mask``,
            ``position_ids``, ``past_key_values``, ``use_cache``.

    Returns:
        The decoder's output; ``last_hidden_state`` is (B, T, D).
    """
    decoder = language_model.get_decoder()
    # Generation of transformers 5.24 and newer calls it "cache", and so do most decoders there.
    renamed = inputs.pop("cache", None)
    past = inputs.pop("past_key_values", None)
    name = (
        "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    )
    return decoder(**inputs, **{name: renamed if past is None else past})


def _cache_field() -> str:
    """What outputs call the cache: renamed in transformers 5.24."""
    names = {item.name for item in dataclasses.fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_of(outputs: BaseModelOutputWithPast) -> Any:
    """Cache of a decoder's output."""
    return getattr(outputs, _cache_field())


def output_with(hidden: torch.Tensor, cache: Any) -> BaseModelOutputWithPast:
    """A decoder's output of hidden states (B, T, D) and a cache."""
    return BaseModelOutputWithPast(last_hidden_state=hidden, **{_cache_field(): cache})


# What language models of transformers do with the output of their head: name in the configuration
# by model_type. Each found in the model's own forward pass.
_TIMES = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), "logit_scale"),
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
_DIVIDED_BY = dict.fromkeys(
    (
        *("granite", "granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid"),
        "minicpm3",
    ),
    "logits_scaling",
)
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclasses.dataclass(frozen=True)
class LogitRule:
    """From the output of a head to logits: ``cap * tanh(output * scale / cap)``.

    Attributes:
        vocabulary: logits of a position; 0: not known.
        scale: factor.
        cap: bound of the logits (Gemma); None: there is none.
    """

    vocabulary: int = 0
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary)."""
        if self.scale != 1.0:
            output = output * self.scale
        return output if self.cap is None else self.cap * torch.tanh(output / self.cap)


AS_THEY_ARE = LogitRule()


def logit_rule(config: PreTrainedConfig) -> LogitRule:
    """The rule of a language model.

    Args:
        config: of the language model.

    Raises:
        UserError: it has a factor of logits, and it is not known how it is meant.
    """
    kind, scale = config.model_type, 1.0
    if kind in _TIMES:
        scale = float(getattr(config, _TIMES[kind]))
    elif kind in _DIVIDED_BY:
        scale = 1.0 / float(getattr(config, _DIVIDED_BY[kind]))
    else:
        for name in _SCALES:
            if getattr(config, name, None) not in (None, 1.0):
                raise UserError(
                    f"language model '{kind}' has {name} {getattr(config, name)}, and it is not "
                    "known what it does with it: logits and losses would be wrong. Take another "
                    "language model, or enter it in llava_uhd/language/decoder.py"
                )
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitRule(int(config.vocab_size), scale, None if cap is None else float(cap))


def logits_at(
    head: nn.Module,
    hidden: torch.Tensor,
    keep: int | torch.Tensor,
    rule: LogitRule = AS_THEY_ARE,
) -> torch.Tensor:
    """Logits of the last ``keep`` positions (0: all), or of the positions in a 1-D index."""
    positions = slice(-keep, None) if isinstance(keep, int) and keep > 0 else slice(None)
    return rule(head(hidden[:, keep if isinstance(keep, torch.Tensor) else positions]))
