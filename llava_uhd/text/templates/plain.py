"""The template of the first training stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_uhd.errors import UserError
from llava_uhd.text.templates.base import MARKERS, Span, Turn, check_alternation


@dataclass(frozen=True)
class PlainTemplate:
    """First-stage captioning: the images, the caption and a newline; the question is discarded.

    Caption and newline are learned; there is no end-of-sequence token (as published).
    """

    stop_strings: tuple[str, ...] = ("\n",)
    special_tokens: tuple[str, ...] = ()
    chat_template: str = (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{ (message['content'] if message['content'] is string"
        " else message['content'] | map(attribute='text') | join('')) + '\\n' }}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- if message['content'] is string -%}"
        "{%- for piece in message['content'].split('<')[1:] -%}"
        "{%- if piece.startswith('image>') -%}<image>"
        "{%- elif piece.startswith('video>') -%}<video>{%- endif -%}"
        "{%- endfor -%}"
        "{%- else -%}"
        "{%- for item in message['content'] if item['type'] in ('image', 'video') -%}"
        "{{ '<' + item['type'] + '>' }}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )

    def spans(self, turns: Sequence[Turn], *, generate: bool = False) -> list[Span]:
        """See `Template.spans`; exactly one question with at least one image."""
        check_alternation(turns, generate=generate)
        markers = MARKERS.findall(turns[0].text)
        if len(turns) > 2 or not markers:
            raise UserError(
                "the plain template takes one human turn with <image> and one gpt turn, "
                f"got {len(turns)} turns with {len(markers)} <image>"
            )
        spans = [Span("".join(markers))]
        if not generate:
            spans.append(Span(turns[1].text + "\n", learn=True))
        return spans
