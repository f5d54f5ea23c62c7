"""The forms in which published models talk."""

from __future__ import annotations

from dataclasses import dataclass

from llava_uhd.text.templates.chat import ChatTemplate, Form


@dataclass(frozen=True)
class TwoSeparatorTemplate(ChatTemplate):
    """System sentence, then ``USER: question ASSISTANT: answer</s>`` again and again.

    The space after ``ASSISTANT:``, the answer and the end token are learned: with a Llama
    tokenizer that is the answer's tokens and ``</s>``, exactly as published, under both the legacy
    and the current treatment of the word-start mark after ``</s>``.

    Attributes:
        system: sentence at the start.
        user: name of the asking role.
        assistant: name of the answering role.
        end: closes an answer; the tokenizer's end-of-sequence token.
    """

    system: str
    user: str = "USER"
    assistant: str = "ASSISTANT"
    end: str = "</s>"

    @property
    def form(self) -> Form:
        """See `ChatTemplate`."""
        return Form(
            user_head=f"{self.user}: ",
            user_end=" ",
            answer_head=f"{self.assistant}:",
            gap=" ",
            stop=self.end,
            system=self.system,
            system_end=" ",
        )


@dataclass(frozen=True)
class SingleSeparatorTemplate(ChatTemplate):
    """System sentence, then ``###Human: question###Assistant: answer###``, the oldest form.

    The space after ``Assistant:``, the answer and the separator behind it are learned.

    Attributes:
        system: sentence at the start.
        example: a question and its answer that stand in front of every conversation, or nothing.
        user: name of the asking role.
        assistant: name of the answering role.
        separator: between turns.
    """

    system: str
    example: tuple[str, ...] = ()
    user: str = "Human"
    assistant: str = "Assistant"
    separator: str = "###"

    @property
    def form(self) -> Form:
        """See `ChatTemplate`."""
        roles = (self.user, self.assistant)
        example = [
            f"{role}: {text}{self.separator}"
            for role, text in zip(roles, self.example, strict=False)
        ]
        return Form(
            user_head=f"{self.user}: ",
            user_end=self.separator,
            answer_head=f"{self.assistant}:",
            gap=" ",
            stop=self.separator,
            system=self.system,
            system_end=self.separator + "".join(example),
        )


@dataclass(frozen=True)
class InstructionTemplate(ChatTemplate):
    """Llama 2 and Mistral: ``[INST] question [/INST] answer </s>`` again and again.

    The spaces around the answer, the answer and the end token are learned: the model has to write
    the space before ``</s>`` too. The begin token in front comes from the tokenizer.

    Attributes:
        system: stands in the first question; nothing if empty.
        begin: opens every round but the first.
        end: closes an answer.
    """

    system: str = ""
    begin: str = "<s>"
    end: str = "</s>"

    @property
    def form(self) -> Form:
        """See `ChatTemplate`."""
        return Form(
            user_head="[INST] ",
            user_end=" [/INST]",
            answer_head="",
            gap=" ",
            before_stop=" ",
            stop=self.end,
            round_head=self.begin,
            system=self.system,
            system_head="<<SYS>>\n",
            system_end="\n<</SYS>>\n\n",
            system_inside=True,
        )


@dataclass(frozen=True)
class ChatMLTemplate(ChatTemplate):
    """Turns between ``<|im_start|>role`` and ``<|im_end|>``, each followed by a newline.

    The answer and its end token are learned. The newline behind it is not: generation ends at the
    end token, so nothing ever asks for it. (The published code also learns the headers of the
    answers and every newline, start and end token wherever it stands: `llava_uhd.text.faithful`.)

    Attributes:
        system: the system message; None leaves it out.
        start: opens a turn; a special token.
        end: closes a turn; a special token.
        separator: behind every turn: a newline, or nothing as in MPT.
    """

    system: str | None
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"
    separator: str = "\n"

    @property
    def answer_head(self) -> str:
        """What stands before an answer."""
        return f"{self.start}assistant\n"

    @property
    def form(self) -> Form:
        """See `ChatTemplate`."""
        closed = self.end + self.separator
        return Form(
            user_head=f"{self.start}user\n",
            user_end=closed,
            answer_head=self.answer_head,
            stop=self.end,
            answer_tail=self.separator,
            system=self.system,
            system_head=f"{self.start}system\n",
            system_end=closed,
            special=(self.start, self.end),
        )


@dataclass(frozen=True)
class HeaderTemplate(ChatTemplate):
    """Llama 3: a header with the role, two newlines, the trimmed text, ``<|eot_id|>``.

    The answer and its end token are learned. The begin token in front comes from the tokenizer.

    Attributes:
        system: the system message; None leaves it out.
        start: opens a header; a special token.
        close: closes it; a special token.
        end: closes a turn; a special token.
    """

    system: str | None
    start: str = "<|start_header_id|>"
    close: str = "<|end_header_id|>"
    end: str = "<|eot_id|>"

    def head(self, role: str) -> str:
        """Header of a turn."""
        return f"{self.start}{role}{self.close}\n\n"

    @property
    def form(self) -> Form:
        """See `ChatTemplate`."""
        return Form(
            user_head=self.head("user"),
            user_end=self.end,
            answer_head=self.head("assistant"),
            stop=self.end,
            system=self.system,
            system_head=self.head("system"),
            system_end=self.end,
            special=(self.start, self.close, self.end),
            trim=True,
        )
