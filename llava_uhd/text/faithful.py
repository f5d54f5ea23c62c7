"""Labels exactly as the published training code made them, its oddities included.

The templates learn what an answer consists of. Some published code learned more, or less, than
that; to repeat such a training to the letter, ``model.template_mode: faithful`` takes the labels
from here. Ids are the same in both modes, except where ``docs/templates.md`` says so. Adding a
template's rule is one function and one registration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry
from llava_uhd.text import templates
from llava_uhd.text.encoding import Encoding, encode_spans
from llava_uhd.text.rounds import (
    FaithfulRule,
    generic_rule,
    instruction_rule,
    mpt_rule,
    two_separator_rule,
    without_greeting,
)
from llava_uhd.text.templates import (
    TEMPLATES,
    ChatMLTemplate,
    ChatTemplate,
    HeaderTemplate,
    PlainTemplate,
    Span,
    Turn,
)

MODES = ("clean", "faithful")

FAITHFUL: Registry[FaithfulRule] = Registry("template with faithful labels")


def encode_turns(
    name: str,
    mode: str,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    images: Sequence[Sequence[int]],
    *,
    max_length: int | None = None,
) -> Encoding:
    """A conversation as ids and labels.

    Args:
        name: of the template.
        mode: "clean": what the template marks as learned; "faithful": what the published code
            learned.
        tokenizer: a fast tokenizer.
        turns: see `Template.spans`.
        images: ids of each image, in order.
        max_length: see `FaithfulRule`; nothing is cut.

    Raises:
        UserError: no such mode, or the template has no faithful rule.
    """
    if mode not in MODES:
        raise UserError(f"model.template_mode must be {' or '.join(MODES)}, got {mode!r}")
    if mode == "clean":
        return encode_spans(tokenizer, TEMPLATES.get(name).spans(turns), images)
    return FAITHFUL.get(name)(tokenizer, turns, images, max_length)


def _marks_rule(
    template: ChatTemplate, everywhere: Sequence[str], trained: ChatTemplate | None = None
) -> FaithfulRule:
    """Answers with their headers and tails are learned, and some tokens wherever they stand.

    Args:
        template: of the model.
        everywhere: those tokens, as text. Inside an image they are not learned.
        trained: what the published code rendered instead of the model's template.
    """
    rendered = trained or template

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        spans = [
            Span(span.text, span.learn or span.text == rendered.form.answer_head)
            for span in rendered.spans(without_greeting(turns))
        ]
        encoding = encode_spans(tokenizer, spans, images)
        rows = tokenizer(list(everywhere), add_special_tokens=False)["input_ids"]
        learned = {row[0] for row in rows if len(row) == 1}
        pictured = {place for start, stop in encoding.runs for place in range(start, stop)}
        for place, token in enumerate(encoding.input_ids):
            if token in learned and place not in pictured:
                encoding.labels[place] = token
        return encoding

    return encode


def plain_rule(template: PlainTemplate) -> FaithfulRule:
    """The published rule of captions: everything behind the image, as in clean mode."""

    def encode(
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        images: Sequence[Sequence[int]],
        max_length: int | None = None,
    ) -> Encoding:
        return encode_spans(tokenizer, template.spans(turns), images)

    return encode


def chatml_rule(template: ChatMLTemplate) -> FaithfulRule:
    """The published ChatML rule.

    Answers are learned with their headers (``<|im_start|>assistant`` and a newline) and the newline
    behind them; every start token, end token and single newline is learned wherever it stands in
    the text, in system message and questions too. A newline that separates slices is none of them.
    The system message is that of `QWEN_1_5`, whatever the template's own is.
    """
    trained = dataclasses.replace(template, system=templates.QWEN_1_5.system)
    return _marks_rule(template, (template.start, template.end, "\n"), trained)


def llama_3_rule(template: HeaderTemplate) -> FaithfulRule:
    """The published Llama 3 rule.

    Answers are learned with their headers, and the begin token, both header marks and the end mark
    wherever they stand. The two newlines of the other headers are not: the published code asks for
    them by a name that the vocabulary does not have.
    """
    return _marks_rule(
        template, ("<|begin_of_text|>", template.start, template.close, template.end)
    )


FAITHFUL.add("plain", plain_rule(templates.PLAIN))
FAITHFUL.add("v1", two_separator_rule(templates.V1))
FAITHFUL.add("llava_v1", two_separator_rule(templates.LLAVA_V1))
FAITHFUL.add("v1_mmtag", two_separator_rule(templates.V1_MMTAG))
# The published code knows no conversation of this name when it trains, and takes Vicuna's.
FAITHFUL.add("v0", two_separator_rule(templates.V1))
FAITHFUL.add("llava_v0", generic_rule(templates.LLAVA_V0))
FAITHFUL.add("v0_mmtag", generic_rule(templates.V0_MMTAG))
FAITHFUL.add("llama_2", instruction_rule(templates.LLAMA_2))
FAITHFUL.add("llava_llama_2", instruction_rule(templates.LLAVA_LLAMA_2))
FAITHFUL.add("mistral_instruct", instruction_rule(templates.MISTRAL_INSTRUCT))
FAITHFUL.add("mpt", mpt_rule(templates.MPT, start=0))
FAITHFUL.add("mpt_next", mpt_rule(templates.MPT, start=1))
FAITHFUL.add("chatml_direct", mpt_rule(templates.CHATML_DIRECT, start=0))
FAITHFUL.add("qwen_1_5", chatml_rule(templates.QWEN_1_5))
FAITHFUL.add("qwen_2_5", chatml_rule(templates.QWEN_2_5))
FAITHFUL.add("llama_3", llama_3_rule(templates.LLAMA_3))
FAITHFUL.add("v1_im_start_end", two_separator_rule(templates.V1_IM_START_END))
FAITHFUL.add("llava_v0_im_start_end", generic_rule(templates.LLAVA_V0_IM_START_END))
FAITHFUL.add("mpt_im_start_end", mpt_rule(templates.MPT_IM_START_END, start=0))

for _alias, _name in templates.ALIASES.items():
    if _alias not in FAITHFUL:
        FAITHFUL.add(_alias, FAITHFUL.get(_name))
