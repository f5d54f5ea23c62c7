"""The decoder as a short loop over its layers, with another sequence from one layer on.

One loop for all decoders of transformers that are built like Llama (``embed_tokens``, ``layers``,
``norm``, ``rotary_emb``): Llama, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from llava_uhd.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


# Decoders that the loop below computes to the letter. Others may scale embeddings, rotate layers
# differently, ...: a name is added here together with its test against the library.
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def check_decoder(decoder: Any) -> None:
    """Raises UserError for a decoder that is built in another way."""
    kind = decoder.config.model_type
    if kind not in DECODERS:
        raise UserError(
            f"compression works between the layers of {', '.join(DECODERS)}, the language model "
            f"is of the type {kind}: set compression.method to none, or compression.layer to -1 "
            "in a model of these"
        )


def cache_name(function: Callable[..., Any]) -> str:
    """What a function calls the cache: renamed in transformers 5.24."""
    names = inspect.signature(function).parameters
    return "cache" if "cache" in names else "past_key_values"


def attention_kind(decoder: Any, layer: Any) -> str:
    """Whether a layer attends to everything before it, or to a window."""
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is not None:
        return str(kinds[layer.self_attn.layer_idx])
    window = getattr(decoder.config, "sliding_window", None)
    return FULL if window is None else SLIDING


def window_of(decoder: Any, layer: Any) -> int | None:
    """Keys that a layer with a sliding window sees, its own position included; None: all."""
    if attention_kind(decoder, layer) != SLIDING:
        return None
    return int(decoder.config.sliding_window)


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


@dataclass(frozen=True)
class Shortened:
    """The sequence that the layers behind a compression see.

    Attributes:
        valid: bool (B, K): positions that hold a token, cached ones included.
        queries: how many of them, the last, are new.
        samples: int64 (B, K) number of the packed sample of each position, or None.
    """

    valid: torch.Tensor
    queries: int
    samples: torch.Tensor | None = None

    def masks(self, decoder: Any, hidden: torch.Tensor) -> Callable[[nn.Module], Any]:
        """Mask of a layer, in the form that the attention backend takes."""
        backend = str(decoder.config._attn_implementation)
        if "flash" in backend:
            plain = self.samples is not None or bool(self.valid.all())
            return lambda layer: None if plain else self._kept(decoder, layer).long()
        if backend == "sdpa" and self._is_plain() and not self._windows(decoder):
            return lambda layer: None  # the backend's own causal mask is the fastest
        made: dict[int | None, torch.Tensor] = {}

        def mask_of(layer: nn.Module) -> torch.Tensor:
            window = window_of(decoder, layer)
            if window not in made:
                allowed = self._allowed(window)[:, None]  # (B, 1, Q, K)
                made[window] = allowed if backend == "sdpa" else _as_numbers(allowed, hidden.dtype)
            return made[window]

        return mask_of

    def flash_arguments(self, decoder: Any) -> dict[str, Any]:
        """Borders of packed samples, for backends that take no mask of (Q, K)."""
        if self.samples is None or "flash" not in str(decoder.config._attn_implementation):
            return {}
        numbers = self.samples.flatten()
        changes = (numbers[1:] != numbers[:-1]).nonzero()[:, 0] + 1
        ends = torch.tensor([len(numbers)], device=numbers.device)
        borders = torch.cat([torch.zeros_like(ends), changes, ends]).int()
        longest = int(borders.diff().max())
        return {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _is_plain(self) -> bool:
        """Whether plain causal attention is right: nothing padded, packed or cached."""
        whole = self.queries in (1, self.valid.shape[1])
        return self.samples is None and whole and bool(self.valid.all())

    def _windows(self, decoder: Any) -> bool:
        return any(window_of(decoder, layer) for layer in decoder.layers)

    def _kept(self, decoder: Any, layer: nn.Module) -> torch.Tensor:
        """Bool (B, keys): the part of `valid` whose keys the cache of a layer holds."""
        window, total = window_of(decoder, layer), self.valid.shape[1]
        return self.valid[:, -(total if window is None else min(total, self._held(window))) :]

    def _held(self, window: int) -> int:
        return self.queries + window - 1

    def _allowed(self, window: int | None) -> torch.Tensor:
        """Bool (B, Q, keys): what each new position attends to."""
        total = self.valid.shape[1]
        keys = torch.arange(total, device=self.valid.device)[None]
        at = keys[0, total - self.queries :, None]
        causal = keys <= at
        if window is not None:
            causal = causal & (keys > at - window)
        allowed = causal[None] & self.valid[:, None]
        if self.samples is not None:
            new = self.samples[:, total - self.queries :]
            allowed = allowed & (new[:, :, None] == self.samples[:, None])
        # A row of padding must attend to something; nobody reads what comes of it.
        allowed = allowed | (at == keys)[None]
        return allowed if window is None else allowed[:, :, -min(total, self._held(window)) :]


def _as_numbers(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    smallest = torch.finfo(dtype).min
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, smallest)


def run_layers(
    decoder: Any,
    layers: nn.ModuleList | list[nn.Module],
    hidden: torch.Tensor,
    mask_of: Callable[[nn.Module], Any],
    position_ids: torch.Tensor,
    cache: Any,
    shown_positions: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """Runs some layers on (B, Q, D).

    Args:
        decoder: of the layers.
        layers: some of them, in order.
        hidden: (B, Q, D).
        mask_of: layer -> its mask.
        position_ids: (B, Q), of the rotation.
        cache: of earlier tokens, or None.
        shown_positions: the attention sees the positions too. Flash attention would take gaps in
            them, as averaged tokens leave, for borders of packed samples.
        **kwargs: of the layers.
    """
    if not len(layers):
        return hidden
    embeddings = decoder.rotary_emb(hidden, position_ids=position_ids)
    for layer in layers:
        output = layer(
            hidden,
            attention_mask=mask_of(layer),
            position_embeddings=embeddings,
            position_ids=position_ids if shown_positions else None,
            **{cache_name(layer.forward): cache},
            **kwargs,
        )
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden
