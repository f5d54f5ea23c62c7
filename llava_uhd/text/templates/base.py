"""What a conversation template is: turns in, spans of text out, each marked as learned or not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
MARKERS = re.compile(f"{re.escape(IMAGE_MARKER)}|{re.escape(VIDEO_MARKER)}")


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: "human" or "gpt".
        text: what is said; each `IMAGE_MARKER` stands for one image, each `VIDEO_MARKER` for one
            video.
    """

    role: str
    text: str


class Span(NamedTuple):
    """A piece of rendered text.

    Attributes:
        text: rendered.
        learn: whether its tokens are training targets.
    """

    text: str
    learn: bool = False


class Template(Protocol):
    """What a registered template offers."""

    @property
    def chat_template(self) -> str:
        """Jinja source for ``apply_chat_template``."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer beside the end-of-sequence token."""
        ...

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Marks that must be tokens of their own; a new tokenizer gets them."""
        ...

    def spans(self, turns: Sequence[Turn], *, generate: bool = False) -> list[Span]:
        """Renders a conversation.

        Args:
            turns: human and gpt in alternation, human first.
            generate: the last turn is human and the text ends where the answer begins.

        Raises:
            UserError: the turns do not fit the template.
        """
        ...


TEMPLATES: Registry[Template] = Registry("template")


def check_alternation(turns: Sequence[Turn], *, generate: bool) -> None:
    """Raises UserError unless human and gpt alternate, human first, ending as asked."""
    for index, turn in enumerate(turns):
        expected = "human" if index % 2 == 0 else "gpt"
        if turn.role != expected:
            raise UserError(f"turn {index} is from '{turn.role}', expected '{expected}'")
    last = "human" if generate else "gpt"
    if not turns or turns[-1].role != last:
        raise UserError(f"the conversation must end with a '{last}' turn")
