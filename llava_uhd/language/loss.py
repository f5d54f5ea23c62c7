"""Next-token loss at learned positions, with all their logits at once or some at a time.

For a vocabulary of 150,000 the float32 logits of thousands of learned tokens, what the softmax
keeps of them and their gradients are the largest tensors of a step. In pieces only those of one
piece exist at a time, forward and backward. Every form gives the same sum, up to the order of
adding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_uhd.language.decoder import AS_THEY_ARE, IGNORE_INDEX, LogitRule

Form = Literal["auto", "whole", "chunked", "liger"]

# float32 logits up to which "auto" computes them at once, and those of one piece.
WHOLE_BYTES = 2 * 2**30
PIECE_BYTES = 2**29
# Fewest pieces of "chunked": it was asked for.
LEAST_CHUNKS = 4


def plan_chunks(form: str, rows: int, vocabulary: int) -> int:
    """Into how many pieces learned tokens are divided.

    Args:
        form: "whole": one; "chunked": at least `LEAST_CHUNKS`, each of at most `PIECE_BYTES` of
            float32 logits; "auto": the same above `WHOLE_BYTES`, else one. "liger": one, its
            kernels divide by themselves.
        rows: learned tokens.
        vocabulary: logits of a token.

    Example: 4,096 tokens, 151,936 words: 2.3 GiB, 5 pieces; 1,024 tokens: "auto" 1, "chunked" 4.
    """
    size = rows * vocabulary * 4
    if form in ("whole", "liger") or (form == "auto" and size <= WHOLE_BYTES):
        return 1
    return max(-(-size // PIECE_BYTES), LEAST_CHUNKS)


@dataclass(frozen=True)
class LossPlan:
    """How a forward pass computes its loss.

    Attributes:
        form: see `plan_chunks`; "liger" takes the kernels of the package liger_kernel (CUDA).
        chunks: number of pieces; None: by the pass's own learned tokens. Processes that share
            weights out must call the head equally often, so there it is the same for all.
    """

    form: Form = "whole"
    chunks: int | None = None

    def pieces(self, rows: int, vocabulary: int) -> int:
        """Number of pieces of so many learned tokens."""
        return self.chunks or plan_chunks(self.form, rows, vocabulary)


def supervised_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    plan: LossPlan | None = None,
    rule: LogitRule = AS_THEY_ARE,
) -> torch.Tensor:
    """Next-token cross entropy, with logits computed at learned positions only.

    Args:
        head: hidden states to logits.
        hidden: (B, T, D).
        labels: (B, T), `IGNORE_INDEX` where nothing is learned.
        num_items: learned tokens of the whole optimizer step; None means those of this batch.
        plan: None: all logits at once.
        rule: what the language model does with its head's output.

    Returns:
        float32 scalar: sum over learned tokens divided by ``num_items``; zero, still connected to
        ``hidden``, if nothing is learned.
    """
    plan = plan or LossPlan()
    targets = labels[:, 1:]
    learned = targets != IGNORE_INDEX
    rows, wanted = hidden[:, :-1][learned], targets[learned]  # (N, D), (N,)
    pieces = plan.pieces(rows.shape[0], rule.vocabulary)
    # The head runs where nothing is learned, too: processes that share its weights out must all
    # call it, and equally often.
    piece_sum = partial(_piece_sum, head, hidden[0, :1], rule)
    if plan.form == "liger" and rows.shape[0] > 0:
        losses = _liger_sum(head, rows, wanted, rule)
    elif pieces == 1:
        losses = piece_sum(rows, wanted)
    else:
        losses = _chunked_sum(piece_sum, rows, wanted, pieces)
    if rows.shape[0] == 0:
        return losses + hidden.float().sum() * 0.0
    return losses / (rows.shape[0] if num_items is None else num_items)


def _piece_sum(
    head: nn.Module, spare: torch.Tensor, rule: LogitRule, rows: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Sum of the losses of rows (N, D); without rows zero, of the spare one (1, D)."""
    if rows.shape[0] > 0:
        return F.cross_entropy(rule(head(rows)).float(), wanted, reduction="sum")
    # The same operations: a pass that computes logits again stops at the last tensor that it needs,
    # which must not lie inside the head, or what runs behind the head would be left out.
    return F.cross_entropy(rule(head(spare)).float(), wanted.new_zeros(1), reduction="sum") * 0.0


def _chunked_sum(piece_sum: Any, rows: torch.Tensor, wanted: torch.Tensor, pieces: int) -> Any:
    """Sum of the losses, piece after piece.

    The backward pass computes the logits of a piece again. The head is only called, never looked
    into: it may be tied, frozen, quantised, have adapters or lie with other processes.
    """
    every, more = divmod(rows.shape[0], pieces)
    sizes = [every + (index < more) for index in range(pieces)]
    losses = rows.new_zeros((), dtype=torch.float32)
    for part, labels in zip(rows.split(sizes), wanted.split(sizes), strict=True):
        if torch.is_grad_enabled():
            losses = losses + checkpoint(piece_sum, part, labels, use_reentrant=False)
        else:
            losses = losses + piece_sum(part, labels)
    return losses


def _liger_sum(
    head: nn.Module, rows: torch.Tensor, wanted: torch.Tensor, rule: LogitRule
) -> torch.Tensor:
    """Sum of the losses by Liger's kernels, which make the gradients in the forward pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    assert isinstance(head, nn.Linear) and rule.cap is None
    weight, bias = head.weight, None if head.bias is None else head.bias * rule.scale
    if weight.requires_grad and not rows.requires_grad and torch.is_grad_enabled():
        rows = rows.detach().requires_grad_()  # by it the kernels tell whether to learn
    if rule.scale != 1.0:
        rows = rows * rule.scale
    # Sums of pieces in float32: half precision would round each.
    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return fused(weight, rows, wanted, bias)
