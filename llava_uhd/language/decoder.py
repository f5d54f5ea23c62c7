"""Running a causal language model on embeddings, with logits only where they are needed."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

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


def supervised_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Next-token cross entropy, with logits computed at learned positions only.

    Args:
        head: hidden states to logits.
        hidden: (B, T, D).
        labels: (B, T), `IGNORE_INDEX` where nothing is learned.
        num_items: learned tokens of the whole optimizer step; None means those of this batch.

    Returns:
        float32 scalar: sum over learned tokens divided by ``num_items``; zero, still connected to
        ``hidden``, if nothing is learned.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORE_INDEX
    rows = hidden[:, :-1][learned]  # (N, D)
    if rows.shape[0] == 0:
        # The head runs all the same: processes that share its weights out must all call it.
        return head(hidden[:1, :1]).float().sum() * 0.0 + hidden.float().sum() * 0.0
    losses = F.cross_entropy(head(rows).float(), targets[learned], reduction="sum")
    if num_items is None:
        return losses / rows.shape[0]
    return losses / num_items


def logits_at(head: nn.Module, hidden: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """Logits of the last ``keep`` positions (0: all), or of the positions in a 1-D index."""
    positions = slice(-keep, None) if isinstance(keep, int) and keep > 0 else slice(None)
    return head(hidden[:, keep if isinstance(keep, torch.Tensor) else positions])
