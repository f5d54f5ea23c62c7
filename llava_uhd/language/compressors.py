"""How the tokens of one run become fewer: registered rules, each a table of groups.

A rule gives every token of a run the number of its group, or -1 if it is dropped; the tokens of a
group are averaged. Adding a rule is one function and one registration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from llava_uhd.errors import UserError
from llava_uhd.language.runs import Run
from llava_uhd.registry import Registry

# (run, stride, whether an incomplete group is kept, scores (length,) of a rule that needs or draws
# them, else None) -> int64 (length,)
Rule = Callable[[Run, int, bool, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Compressor:
    """A registered compressor.

    Attributes:
        groups: its rule.
        needs_scores: it chooses tokens by the attention that the last token of the row pays them.
        draws: it chooses tokens by random scores.
    """

    groups: Rule
    needs_scores: bool = False
    draws: bool = False


COMPRESSORS: Registry[Compressor] = Registry("compressor")


def num_kept(length: int, stride: int, keep: bool) -> int:
    """Tokens that a run of this length keeps.

    Example: 577 tokens, stride 8: 72 without the remainder, 73 with it.
    """
    return -(-length // stride) if keep else length // stride


def compressor_of(method: str) -> Compressor:
    """The compressor that ``compression.method`` names.

    Raises:
        UserError: there is none of this name.
    """
    try:
        return COMPRESSORS.get(method)
    except UserError as error:
        raise UserError(f"compression.method: {error}, or 'none'") from None


@lru_cache(maxsize=1024)
def _line_groups(run: Run, stride: int, keep: bool) -> torch.Tensor:
    groups = torch.arange(run.length) // stride
    return groups.masked_fill_(groups >= num_kept(run.length, stride, keep), -1)


def average_line(
    run: Run, stride: int, keep: bool, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """``stride`` neighbours in reading order become one (the published LLaVolta)."""
    return _line_groups(run, stride, keep)


@lru_cache(maxsize=1024)
def _square_groups(run: Run, side: int, keep: bool) -> torch.Tensor:
    columns = run.columns
    rows = run.length // columns
    wide, tall = num_kept(columns, side, keep), num_kept(rows, side, keep)
    row = (torch.arange(rows) // side)[:, None].expand(rows, columns)
    column = (torch.arange(columns) // side)[None].expand(rows, columns)
    groups = (row * wide + column).masked_fill((row >= tall) | (column >= wide), -1)
    return groups.flatten()


def average_squares(
    run: Run, stride: int, keep: bool, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """Squares of the run's map become one; ``stride`` is the number of tokens in a square.

    A run that is no map, or a single row of one, is averaged as a line.

    Raises:
        UserError: the stride is no square.
    """
    side = round(stride**0.5)
    if side * side != stride:
        raise UserError(
            f"compression.stride {stride} is no square number: 'avgpool2d' joins squares of tokens"
        )
    if not run.columns or run.length == run.columns or run.length % run.columns:
        return _line_groups(run, stride, keep)
    return _square_groups(run, side, keep)


def random_tokens(
    run: Run, stride: int, keep: bool, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """One of ``stride`` tokens stays, drawn at random."""
    if scores is None:
        raise ValueError("this compressor needs scores")
    return _selected(scores, num_kept(run.length, stride, keep))


def attended_tokens(
    run: Run, stride: int, keep: bool, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """The tokens to which the last token of the row attends most stay (FastV)."""
    if scores is None:
        raise ValueError("this compressor needs scores")
    return _selected(scores.float().cpu(), num_kept(run.length, stride, keep))


def _selected(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Groups of one token each for the best ``count``, in their order."""
    groups = torch.full((len(scores),), -1, dtype=torch.long)
    if count:
        # Of equal ones the first, on every machine and in every batch.
        best = scores.sort(descending=True, stable=True).indices[:count]
        groups[best.sort().values] = torch.arange(count)
    return groups


COMPRESSORS.add("avgpool1d", Compressor(average_line))
COMPRESSORS.add("avgpool2d", Compressor(average_squares))
COMPRESSORS.add("random_drop", Compressor(random_tokens, draws=True))
COMPRESSORS.add("fastv", Compressor(attended_tokens, needs_scores=True))
