"""What all conversation templates share: a form of fixed texts, rendered in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava_uhd.text.templates.base import (
    IMAGE_MARKER,
    VIDEO_MARKER,
    Span,
    Turn,
    check_alternation,
)


class Form(NamedTuple):
    """The fixed texts of a template.

    A conversation is ``system_head system system_end``, then for each question and its answer
    ``user_head question user_end answer_head`` and ``gap answer before_stop stop answer_tail``.
    What stands from ``gap`` to ``stop`` is learned.

    Attributes:
        user_head: before a question.
        user_end: behind it.
        answer_head: where a prompt ends and the model takes over.
        stop: ends an answer; the text at which generation ends.
        gap: between ``answer_head`` and the answer, written by the model.
        before_stop: between the answer and ``stop``, written by the model.
        answer_tail: behind ``stop``; never learned, since generation has ended.
        round_head: before each question but the first.
        system: the system message; None leaves it out.
        system_head: before it.
        system_end: behind it.
        system_inside: it stands in the first question, behind ``user_head``.
        special: marks that must be tokens of their own.
        trim: spaces and newlines around questions and answers are removed.
    """

    user_head: str
    user_end: str
    answer_head: str
    stop: str
    gap: str = ""
    before_stop: str = ""
    answer_tail: str = ""
    round_head: str = ""
    system: str | None = None
    system_head: str = ""
    system_end: str = ""
    system_inside: bool = False
    special: tuple[str, ...] = ()
    trim: bool = False

    @property
    def system_block(self) -> str:
        """The system message between its marks, or nothing."""
        return f"{self.system_head}{self.system}{self.system_end}" if self.system else ""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template made from a `Form`; what differs between templates is in ``form`` alone.

    Attributes:
        around: texts that stand before and behind each image or video.
        added_tokens: those of them that must be tokens of their own.
    """

    around: tuple[str, str] = ("", "")
    added_tokens: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """The fixed texts."""
        raise NotImplementedError

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What ends an answer, as text."""
        return (self.form.stop,)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See `Template`."""
        return (*self.form.special, *self.added_tokens)

    def written(self, text: str) -> str:
        """A question or an answer as it stands in the conversation; twice is as once."""
        if self.form.trim:
            text = text.strip()
        for marker, whole in self._wrapped():
            text = text.replace(whole, marker).replace(marker, whole)
        return text

    def _wrapped(self) -> list[tuple[str, str]]:
        """Each marker, bare and with what stands around it; empty if nothing does."""
        before, behind = self.around
        markers = (IMAGE_MARKER, VIDEO_MARKER) if before or behind else ()
        return [(marker, before + marker + behind) for marker in markers]

    def spans(self, turns: Sequence[Turn], *, generate: bool = False) -> list[Span]:
        """See `Template.spans`."""
        check_alternation(turns, generate=generate)
        form = self.form
        outside, inside = form.system_block, ""
        if form.system_inside:
            outside, inside = inside, outside
        spans = [Span(outside)]
        for index, turn in enumerate(turns):
            text = self.written(turn.text)
            if turn.role == "human":
                head = form.round_head + form.user_head if index else form.user_head + inside
                spans += [Span(head + text + form.user_end), Span(form.answer_head)]
            else:
                answer = form.gap + text + form.before_stop + form.stop
                spans += [Span(answer, learn=True), Span(form.answer_tail)]
        return [span for span in spans if span.text]

    @property
    def chat_template(self) -> str:
        """Jinja form; a leading system message replaces the template's own."""
        form = self.form
        block = f"({form.system_head!r} + ns.system + {form.system_end!r} if ns.system else '')"
        later = repr(form.round_head + form.user_head)
        first = f"{form.user_head!r} + {block if form.system_inside else repr('')}"
        return (
            self._content_macro
            + "{%- set ns = namespace(first=true, system="
            + repr(form.system or "")
            + ") -%}"
            "{%- if messages and messages[0]['role'] == 'system' -%}"
            "{%- set ns.system = render(messages[0]['content']) -%}{%- endif -%}"
            + ("" if form.system_inside else "{{ " + block + " }}")
            + "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}"
            "{{ " + f"({first} if ns.first else {later})" + " }}{%- set ns.first = false -%}"
            "{{ render(message['content']) + " + repr(form.user_end) + " }}"
            "{%- elif message['role'] == 'assistant' -%}"
            "{{ "
            + repr(form.answer_head + form.gap)
            + " + render(message['content']) + "
            + repr(form.before_stop + form.stop + form.answer_tail)
            + " }}"
            "{%- elif message['role'] != 'system' or not loop.first -%}"
            + self._other_message
            + "{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ " + repr(form.answer_head) + " }}{%- endif -%}"
        )

    @property
    def _content_macro(self) -> str:
        """A content list becomes one text, with each image or video on its own line, as trained."""
        wrap = "".join(
            f" | replace({whole!r}, {marker!r}) | replace({marker!r}, {whole!r})"
            for marker, whole in self._wrapped()
        )
        string = "content | trim" if self.form.trim else "content"
        return f"""\
{{%- macro render(content) -%}}
{{%- if content is string -%}}{{{{ {string}{wrap} }}}}
{{%- else -%}}
{{%- set ns = namespace(text='') -%}}
{{%- for item in content -%}}
{{%- if item['type'] in ('image', 'video') -%}}
{{%- set ns.text = ns.text + '<' + item['type'] + '>\\n' -%}}
{{%- elif item['type'] == 'text' -%}}{{%- set ns.text = ns.text + item['text'] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{ ns.text | trim{wrap} }}}}
{{%- endif -%}}
{{%- endmacro -%}}
"""

    @property
    def _other_message(self) -> str:
        """What becomes of a later system message, or of a role that no template knows."""
        form = self.form
        refuse = (
            "{{ raise_exception('messages must be from user and assistant, and only the first "
            "may be from system') }}"
        )
        if not form.system_head or form.system_inside:
            return refuse
        return (
            "{%- if message['role'] == 'system' -%}"
            "{{ " + f"{form.system_head!r} + render(message['content']) + {form.system_end!r}"
            " }}{%- else -%}" + refuse + "{%- endif -%}"
        )
