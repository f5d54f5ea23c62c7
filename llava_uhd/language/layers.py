"""The decoder as a short loop over its layers, with another sequence from one layer on.

One loop for all decoders of transformers that are built like Llama (``embed_tokens``, ``layers``,
``norm``, ``rotary_emb``): Llama, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from llava_uhd.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


def check_decoder(decoder: nn.Module) -> None:
    """Raises UserError for a decoder that is built in another way."""
    missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
    if missing:
        raise UserError(
            f"compression works between the layers of decoders like Llama's, but "
            f"{type(decoder).__name__} has no {', '.join(missing)}: set compression.method to none"
        )


def cache_name(function: Callable[..., Any]) -> str:
    """What a function calls the cache: renamed in transformers 5.24."""
    names = inspect.signature(function).parameters
    return "cache" if "cache" in names else "past_key_values"


def attention_kind(decoder: Any, layer: nn.Module) -> str:
    """Whether a layer attends to everything before it, or to a window."""
    kind = getattr(layer, "attention_type", None)
    if kind is None:
        window = getattr(decoder.config, "sliding_window", None)
        kind = SLIDING if window is not None else FULL
    return str(kind)


def library_masks(
    decoder: Any,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Any,
) -> Callable[[nn.Module], Any]:
    """The library's masks for layers that see the whole sequence.

    Returns:
        layer -> its mask, in the form that the attention backend takes.
    """
    made: dict[str, Any] = {}

    def mask_of(layer: nn.Module) -> Any:
        kind = attention_kind(decoder, layer)
        if kind not in made:
            make = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
            made[kind] = make(
                config=decoder.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{cache_name(make): cache},
            )
        return made[kind]

    return mask_of


def own_mask(
    decoder: Any,
    hidden: torch.Tensor,
    valid: torch.Tensor,
    samples: torch.Tensor | None = None,
) -> Any:
    """Causal mask of the shortened sequence.

    Args:
        decoder: its attention backend decides the form.
        hidden: (B, Q, D), the last Q of the K positions.
        valid: bool (B, K): positions that hold a token.
        samples: int64 (B, K) number of the packed sample that each position belongs to.
    """
    queries, keys = hidden.shape[1], valid.shape[1]
    backend = str(decoder.config._attn_implementation)
    if "flash" in backend:
        if samples is not None:
            raise UserError(
                f"compression of packed samples does not work with {backend}: set "
                "model.attn_implementation to sdpa"
            )
        return None if bool(valid.all()) else valid.long()
    device = hidden.device
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    allowed = torch.arange(keys, device=device)[None] <= at  # (Q, K)
    allowed = allowed[None] & valid[:, None]
    if samples is not None:
        allowed = allowed & (samples[:, -queries:, None] == samples[:, None])
    # A row of padding must attend to something; nobody reads what comes of it.
    allowed = allowed | (at == torch.arange(keys, device=device)[None])[None]
    allowed = allowed[:, None]  # (B, 1, Q, K)
    if backend == "sdpa":
        return allowed
    smallest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, smallest)


def run_layers(
    decoder: Any,
    layers: nn.ModuleList | list[nn.Module],
    hidden: torch.Tensor,
    mask_of: Callable[[nn.Module], Any],
    position_ids: torch.Tensor,
    cache: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Runs some layers on (B, Q, D)."""
    if not len(layers):
        return hidden
    embeddings = decoder.rotary_emb(hidden, position_ids=position_ids)
    for layer in layers:
        output = layer(
            hidden,
            attention_mask=mask_of(layer),
            position_embeddings=embeddings,
            position_ids=position_ids,
            **{cache_name(layer.forward): cache},
            **kwargs,
        )
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden
