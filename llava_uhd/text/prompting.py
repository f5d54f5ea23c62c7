"""From a conversation to a prompt, and from generated tokens to the end of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from llava_uhd.text.templates import Template, Turn


def prompt_text(template: Template, turns: Sequence[Turn]) -> str:
    """Renders turns up to the place where the next answer begins.

    Raises:
        UserError: the turns do not fit the template.
    """
    return "".join(span.text for span in template.spans(turns, generate=True))


def extra_stops(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Stop strings of a template that the end-of-sequence token does not cover already."""
    return tuple(stop for stop in template.stop_strings if stop and stop != tokenizer.eos_token)


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    r"""Text before the first stop string.

    Example: ``cut_at_stop("red\nblue", ("\n",))`` is ``"red"``.
    """
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Passes streamed pieces on, up to the first stop string.

    A piece that may be the beginning of a stop string is held back until it is known. The source
    is read no further than the stop.

    Example: the pieces ``"ab#"``, ``"#c"``, ``"##"`` with the stop ``"##"`` give ``"ab"``; the
    pieces ``"ab#"``, ``"c"`` give ``"ab"``, ``"#c"``.
    """
    held = ""
    for piece in pieces:
        held += piece
        cut = cut_at_stop(held, stops)
        if len(cut) < len(held):
            if cut:
                yield cut
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class StopOnText(StoppingCriteria):
    """Ends a row of generation once its new text contains a stop string.

    Args:
        tokenizer: decodes the new ids.
        stops: texts that end an answer; an empty list never stops.
        prompt_length: ids before the first new one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.prompt_length = prompt_length
        # Byte tokens: a character takes up to four of them.
        self._tail = 4 * max((len(stop) for stop in stops), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows of ``input_ids`` (B, T) are finished: bool (B,)."""
        new = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self._tail) :]
        flags = [False] * len(input_ids)
        if self.stops and new.shape[1]:
            texts = self.tokenizer.batch_decode(new)
            flags = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(flags, dtype=torch.bool, device=input_ids.device)
