"""Published label rules that count the tokens of rounds.

A conversation is rendered and tokenised whole. Then its rounds are tokenised again, each alone, to
count how many tokens are question and how many are answer. Where the counts do not add up to the
whole, nothing of the sample is learned. Corrections by one token make up for what a piece alone has
more or less than in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from llava_uhd.text.encoding import Encoding
from llava_uhd.text.pieces import (
    forget,
    is_legacy,
    matches,
    piece_ids,
    piece_length,
    real_length,
    with_images,
)
from llava_uhd.text.templates import (
    ChatMLTemplate,
    ChatTemplate,
    InstructionTemplate,
    SingleSeparatorTemplate,
    Turn,
    TwoSeparatorTemplate,
    check_alternation,
)


class FaithfulRule(Protocol):
    """Ids and labels of a conversation as some published code made them."""

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        """Encodes a conversation.

        Args:
            tokenizer: a fast tokenizer.
            turns: as in the data; those of the published code that begin with gpt lose that turn.
            images: ids of each image, in order.
            max_length: the longest sample in tokens, an image being one; some rules check samples
                below it only. Nothing is cut here.
        """
        ...


class Rounds(NamedTuple):
    """How a rule divides a text.

    Attributes:
        pieces: the rounds.
        separator: between question and answer.
        dangling: tokens that a question alone has too many: the begin token, a trailing space.
        start: tokens in front of the first round.
        shift: tokens by which later rounds are longer in place than alone.
    """

    pieces: list[str]
    separator: str
    dangling: int
    start: int
    shift: int


def without_greeting(turns: Sequence[Turn]) -> list[Turn]:
    """The turns from the first question on, as published; they must alternate.

    Raises:
        UserError: they do not.
    """
    kept = list(turns[1:] if turns and turns[0].role == "gpt" else turns)
    check_alternation(kept, generate=False)
    return kept


def published_text(template: ChatTemplate, turns: Sequence[Turn], empty_question: str) -> str:
    """Renders a conversation as the published code does: an empty turn is one not yet written.

    Without an answer the text has no end token there; what stands for an empty question is given.
    Everything else is as in `ChatTemplate.spans`.
    """
    form = template.form
    text = "" if form.system_inside else form.system_block
    for index, turn in enumerate(turns):
        said = template.written(turn.text)
        if turn.role == "human":
            head = form.round_head if index else ""
            inside = form.system_block if form.system_inside and index == 0 else ""
            full = head + form.user_head + inside + said + form.user_end
            text += (full if said else empty_question) + form.answer_head
        elif said:
            text += form.gap + said + form.before_stop + form.stop + form.answer_tail
    return text


def encode_rounds(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    rounds: Rounds,
    images: Sequence[Sequence[int]],
    max_length: int | None,
) -> Encoding:
    """Ids of a text, and labels by counting.

    Counting stops at a round that is empty or has not exactly one separator; from there on nothing
    is learned, and as a rule the check fails.
    """
    ids = piece_ids(tokenizer, text)
    learn = [True] * len(ids)
    place = rounds.start
    forget(learn, 0, place)
    for index, piece in enumerate(rounds.pieces):
        halves = piece.split(rounds.separator)
        if not piece or len(halves) != 2:
            break
        shift = rounds.shift if index else 0
        asked = piece_length(tokenizer, halves[0] + rounds.separator) - rounds.dangling + shift
        forget(learn, place, place + asked)
        place += piece_length(tokenizer, piece) + shift
    forget(learn, place, len(learn))
    if not matches(tokenizer, ids, place, max_length):
        learn = [False] * len(learn)
    return with_images(ids, learn, images)


def two_separator_rule(template: TwoSeparatorTemplate) -> FaithfulRule:
    """The published rule of Vicuna conversations (version "v1").

    Rounds end at ``</s>``, whose token is counted by the begin token that a round alone has.
    Behind ``</s>`` a current Llama tokenizer writes no word-start mark, alone it does, so ``USER``
    is one token in place and two alone: later rounds count one less.
    """

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        text = published_text(template, without_greeting(turns), f"{template.user}:")
        rounds = Rounds(
            text.split(template.end),
            separator=f" {template.assistant}: ",
            dangling=2,
            start=1,
            shift=-1 if is_legacy(tokenizer) is False else 0,
        )
        return encode_rounds(tokenizer, text, rounds, images, max_length)

    return encode


def instruction_rule(template: InstructionTemplate) -> FaithfulRule:
    """The published rule of Llama 2 and Mistral conversations: as for Vicuna, without correction.

    An empty question leaves its whole instruction out.
    """

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        text = published_text(template, without_greeting(turns), "")
        rounds = Rounds(
            text.split(template.end), separator="[/INST] ", dangling=2, start=1, shift=0
        )
        return encode_rounds(tokenizer, text, rounds, images, max_length)

    return encode


def mpt_rule(template: ChatMLTemplate, start: int) -> FaithfulRule:
    """The published rule of MPT conversations.

    The end tokens at which the text is split are missing in the pieces, one for each round. Only a
    begin token would make up for them, so with a tokenizer that has none no sample passes the
    check, or, with ``start`` 1, samples of a single round do.

    Args:
        template: without newlines between turns.
        start: 0 in LLaVA-1.5, 1 in LLaVA-NeXT and LLaVA-OneVision.
    """

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        text = published_text(template, without_greeting(turns), template.form.user_head)
        parts = text.split(template.end)
        # The first round has the system message in front.
        pieces = [template.end.join(parts[:3])]
        pieces += [template.end.join(parts[i : i + 2]) for i in range(3, len(parts), 2)]
        rounds = Rounds(
            pieces,
            separator=template.end + template.answer_head,
            dangling=1,
            start=start,
            shift=1 if is_legacy(tokenizer) else 0,
        )
        return encode_rounds(tokenizer, text, rounds, images, max_length)

    return encode


def generic_rule(template: SingleSeparatorTemplate) -> FaithfulRule:
    r"""The published rule of the oldest conversations.

    They are not trained in the form in which the model is asked later: the system sentence and two
    newlines, ``### Human: ...\n`` and ``### Assistant: ...\n`` in alternation, ``### `` at the end.
    Everything is learned but the system sentence and the questions behind their first two tokens.
    Each piece counts a begin token that its place has not, so the borders drift by one per turn.
    There is no check, and a conversation may begin with an answer.
    """

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        names = {"human": template.user, "gpt": template.assistant}
        header = f"{template.system}\n\n"
        said = [f"### {names[turn.role]}: {template.written(turn.text)}\n" for turn in turns]
        ids = piece_ids(tokenizer, header + "".join(said) + "### ")
        learn = [True] * len(ids)

        def counted(text: str) -> int:
            piece = piece_ids(tokenizer, text)
            return len(piece) if images else real_length(tokenizer, piece[:max_length])

        place = counted(header)
        forget(learn, 0, place)
        for turn, text in zip(turns, said, strict=True):
            length = counted(text)
            if turn.role == "human":
                forget(learn, place + 2, place + length)
            place += length
        return with_images(ids, learn, images)

    return encode
