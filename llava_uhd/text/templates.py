"""Conversation templates: turns to spans of text, each marked as learned or not.

One template serves training (spans, from which labels follow), prompting (the same spans without
the last answer) and transformers' own chat interface (the Jinja form, saved with the processor);
the tests hold the forms equal. Adding a template is one class or instance and one registration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
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

# A content list becomes one text: each image or video is a marker on its own line, as in training.
_CONTENT_MACRO = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- set ns = namespace(text='') -%}
{%- for item in content -%}
{%- if item['type'] in ('image', 'video') -%}
{%- set ns.text = ns.text + '<' + item['type'] + '>\\n' -%}
{%- elif item['type'] == 'text' -%}{%- set ns.text = ns.text + item['text'] -%}
{%- endif -%}
{%- endfor -%}
{{ ns.text | trim }}
{%- endif -%}
{%- endmacro -%}
"""


def check_alternation(turns: Sequence[Turn], *, generate: bool) -> None:
    """Raises UserError unless human and gpt alternate, human first, ending as asked."""
    for index, turn in enumerate(turns):
        expected = "human" if index % 2 == 0 else "gpt"
        if turn.role != expected:
            raise UserError(f"turn {index} is from '{turn.role}', expected '{expected}'")
    last = "human" if generate else "gpt"
    if not turns or turns[-1].role != last:
        raise UserError(f"the conversation must end with a '{last}' turn")


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


@dataclass(frozen=True)
class TwoSeparatorTemplate:
    """System sentence, then ``USER: question ASSISTANT: answer</s>`` again and again.

    The space after ``ASSISTANT:``, the answer and the end token are learned: with a Llama
    tokenizer that is the answer's tokens and ``</s>``, exactly as published, under both the legacy
    and the current treatment of the word-start mark after ``</s>``.

    Attributes:
        system: sentence at the start.
        user: name of the asking role.
        assistant: name of the answering role.
        end: closes an answer; the tokenizer's end-of-sequence token.
        special_tokens: see `Template`.
    """

    system: str
    user: str = "USER"
    assistant: str = "ASSISTANT"
    end: str = "</s>"
    special_tokens: tuple[str, ...] = ()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The end token as text."""
        return (self.end,)

    def spans(self, turns: Sequence[Turn], *, generate: bool = False) -> list[Span]:
        """See `Template.spans`."""
        check_alternation(turns, generate=generate)
        spans = [Span(self.system + " ")]
        for turn in turns:
            if turn.role == "human":
                spans.append(Span(f"{self.user}: {turn.text} {self.assistant}:"))
            else:
                spans.append(Span(f" {turn.text}{self.end}", learn=True))
        return spans

    @property
    def chat_template(self) -> str:
        """Jinja form; a leading system message replaces the system sentence."""
        return _CONTENT_MACRO + (
            "{%- if messages and messages[0]['role'] == 'system' -%}"
            "{{ render(messages[0]['content']) + ' ' }}"
            "{%- else -%}{{ " + repr(self.system + " ") + " }}{%- endif -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}"
            f"{{{{ '{self.user}: ' + render(message['content']) + ' ' }}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{ '{self.assistant}: ' + render(message['content']) + '{self.end}' }}}}"
            "{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{self.assistant}:{{%- endif -%}}"
        )


@dataclass(frozen=True)
class ChatMLTemplate:
    """Turns between ``<|im_start|>role`` and ``<|im_end|>``, each followed by a newline.

    The answer and its end token are learned. The newline behind it is not: generation ends at the
    end token, so nothing ever asks for it. (The published code also learns the headers of the
    answers and every newline, start and end token wherever it stands: `llava_uhd.text.faithful`.)

    Attributes:
        system: the system message.
        start: opens a turn; a special token.
        end: closes a turn; a special token.
    """

    system: str
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The end token as text."""
        return (self.end,)

    @property
    def answer_head(self) -> str:
        """What stands before an answer."""
        return f"{self.start}assistant\n"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Start and end of a turn."""
        return self.start, self.end

    def spans(self, turns: Sequence[Turn], *, generate: bool = False) -> list[Span]:
        """See `Template.spans`."""
        check_alternation(turns, generate=generate)
        spans = [Span(f"{self.start}system\n{self.system}{self.end}\n")]
        for turn in turns:
            if turn.role == "human":
                spans.append(Span(f"{self.start}user\n{turn.text}{self.end}\n"))
                spans.append(Span(self.answer_head))
            else:
                spans += [Span(f"{turn.text}{self.end}", learn=True), Span("\n")]
        return spans

    @property
    def chat_template(self) -> str:
        """Jinja form; a leading system message replaces the template's own."""
        end = repr(self.end + "\n")
        heads = {role: repr(f"{self.start}{role}\n") for role in ("system", "user", "assistant")}
        return _CONTENT_MACRO + (
            "{%- if not messages or messages[0]['role'] != 'system' -%}"
            "{{ " + f"{heads['system']} + {self.system!r} + {end}" + " }}{%- endif -%}"
            "{%- for message in messages -%}"
            + "".join(
                f"{{%- {word} message['role'] == '{role}' -%}}"
                f"{{{{ {head} + render(message['content']) + {end} }}}}"
                for word, (role, head) in zip(("if", "elif", "elif"), heads.items(), strict=True)
            )
            + "{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ " + heads["assistant"] + " }}{%- endif -%}"
        )


TEMPLATES.add("plain", PlainTemplate())
TEMPLATES.add(
    "v1",
    TwoSeparatorTemplate(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
)
QWEN_1_5 = ChatMLTemplate("You are a helpful assistant.")
TEMPLATES.add("qwen_1_5", QWEN_1_5)
