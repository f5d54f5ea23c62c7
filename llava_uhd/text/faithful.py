"""Labels exactly as the published training code made them, its oddities included.

The templates learn what an answer consists of. Some published code learned more, or less, than
that; to repeat such a training to the letter, ``model.template_mode: faithful`` takes the labels
from here. Ids are the same in both modes. Adding a template's rule is one function and one
registration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry
from llava_uhd.text.encoding import Encoding, encode_spans
from llava_uhd.text.templates import QWEN_1_5, TEMPLATES, ChatMLTemplate, Span, Turn

MODES = ("clean", "faithful")

FaithfulRule = Callable[
    [PreTrainedTokenizerBase, Sequence[Turn], Sequence[Sequence[int]]], Encoding
]
FAITHFUL: Registry[FaithfulRule] = Registry("template with faithful labels")


def encode_turns(
    name: str,
    mode: str,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    images: Sequence[Sequence[int]],
) -> Encoding:
    """A conversation as ids and labels.

    Args:
        name: of the template.
        mode: "clean": what the template marks as learned; "faithful": what the published code
            learned.
        tokenizer: a fast tokenizer.
        turns: see `Template.spans`.
        images: ids of each image, in order.

    Raises:
        UserError: no such mode, or the template has no faithful rule.
    """
    if mode not in MODES:
        raise UserError(f"model.template_mode must be {' or '.join(MODES)}, got {mode!r}")
    if mode == "clean":
        return encode_spans(tokenizer, TEMPLATES.get(name).spans(turns), images)
    return FAITHFUL.get(name)(tokenizer, turns, images)


def chatml_rule(template: ChatMLTemplate) -> FaithfulRule:
    """The published ChatML rule.

    Answers are learned with their headers (``<|im_start|>assistant`` and a newline) and the newline
    behind them; every start token, end token and single newline is learned wherever it stands in
    the text, in system message and questions too. A newline that separates slices is none of them.
    """

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
    ) -> Encoding:
        spans = [
            Span(span.text, span.learn or span.text == template.answer_head)
            for span in template.spans(turns)
        ]
        encoding = encode_spans(tokenizer, spans, images)
        marks = (template.start, template.end, "\n")
        rows = tokenizer(list(marks), add_special_tokens=False)["input_ids"]
        everywhere = {row[0] for row in rows if len(row) == 1}
        pictured = {place for start, stop in encoding.runs for place in range(start, stop)}
        for place, token in enumerate(encoding.input_ids):
            if token in everywhere and place not in pictured:
                encoding.labels[place] = token
        return encoding

    return encode


FAITHFUL.add("qwen_1_5", chatml_rule(QWEN_1_5))
