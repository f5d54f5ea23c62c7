"""Conversation templates: turns to spans of text, each marked as learned or not.

One template serves training (spans, from which labels follow), prompting (the same spans without
the last answer) and transformers' own chat interface (the Jinja form, saved with the processor);
the tests hold the forms equal. Adding a template is one instance and one registration, see
``docs/templates.md``.
"""

from __future__ import annotations

import dataclasses

from llava_uhd.text.templates import texts
from llava_uhd.text.templates.base import (
    IMAGE_MARKER,
    MARKERS,
    TEMPLATES,
    VIDEO_MARKER,
    Span,
    Template,
    Turn,
    check_alternation,
)
from llava_uhd.text.templates.chat import ChatTemplate, Form
from llava_uhd.text.templates.forms import (
    ChatMLTemplate,
    HeaderTemplate,
    InstructionTemplate,
    SingleSeparatorTemplate,
    TwoSeparatorTemplate,
)
from llava_uhd.text.templates.plain import PlainTemplate

MMTAG = ("<Image>", "</Image>")
IM_START_END = ("<im_start>", "<im_end>")

PLAIN = PlainTemplate()
V1 = TwoSeparatorTemplate(texts.CURIOUS_USER)
LLAVA_V1 = TwoSeparatorTemplate(texts.CURIOUS_HUMAN)
V1_MMTAG = TwoSeparatorTemplate(texts.MMTAG, around=MMTAG)
V0 = SingleSeparatorTemplate(
    texts.CURIOUS_HUMAN, example=(texts.EXAMPLE_QUESTION, texts.EXAMPLE_ANSWER)
)
LLAVA_V0 = SingleSeparatorTemplate(texts.CURIOUS_HUMAN)
V0_MMTAG = SingleSeparatorTemplate(texts.MMTAG, around=MMTAG)
LLAMA_2 = InstructionTemplate(texts.LLAMA_2)
LLAVA_LLAMA_2 = InstructionTemplate(texts.LANGUAGE_AND_VISION)
MISTRAL_INSTRUCT = InstructionTemplate(begin="")
MPT = ChatMLTemplate(texts.MPT, separator="")
CHATML_DIRECT = ChatMLTemplate(texts.DIRECT, separator="")
QWEN_1_5 = ChatMLTemplate(texts.HELPFUL)
QWEN_2_5 = ChatMLTemplate(texts.QWEN_2_5)
CHATML = ChatMLTemplate(None)
LLAMA_3 = HeaderTemplate(texts.LANGUAGE_AND_VISION)
# Models whose images stand between two learned tokens.
V1_IM_START_END = dataclasses.replace(V1, around=IM_START_END, added_tokens=IM_START_END)
LLAVA_V0_IM_START_END = dataclasses.replace(
    LLAVA_V0, around=IM_START_END, added_tokens=IM_START_END
)
MPT_IM_START_END = dataclasses.replace(MPT, around=IM_START_END, added_tokens=IM_START_END)

TEMPLATES.add("plain", PLAIN)
TEMPLATES.add("v1", V1)
TEMPLATES.add("llava_v1", LLAVA_V1)
TEMPLATES.add("v1_mmtag", V1_MMTAG)
TEMPLATES.add("v0", V0)
TEMPLATES.add("llava_v0", LLAVA_V0)
TEMPLATES.add("v0_mmtag", V0_MMTAG)
TEMPLATES.add("llama_2", LLAMA_2)
TEMPLATES.add("llava_llama_2", LLAVA_LLAMA_2)
TEMPLATES.add("mistral_instruct", MISTRAL_INSTRUCT)
TEMPLATES.add("mpt", MPT)
TEMPLATES.add("chatml_direct", CHATML_DIRECT)
TEMPLATES.add("qwen_1_5", QWEN_1_5)
TEMPLATES.add("qwen_2_5", QWEN_2_5)
TEMPLATES.add("chatml", CHATML)
TEMPLATES.add("llama_3", LLAMA_3)
TEMPLATES.add("v1_im_start_end", V1_IM_START_END)
TEMPLATES.add("llava_v0_im_start_end", LLAVA_V0_IM_START_END)
TEMPLATES.add("mpt_im_start_end", MPT_IM_START_END)

# Other names of the same templates. "mpt_next" differs in its faithful labels only.
ALIASES = {
    "vicuna_v1": "v1",
    "v0_plain": "plain",
    "mistral_direct": "chatml_direct",
    "mpt_next": "mpt",
    "qwen_2": "qwen_1_5",
    "llava_llama_3": "llama_3",
}
for _alias, _name in ALIASES.items():
    TEMPLATES.add(_alias, TEMPLATES.get(_name))

__all__ = [
    "ALIASES",
    "IMAGE_MARKER",
    "MARKERS",
    "TEMPLATES",
    "VIDEO_MARKER",
    "ChatMLTemplate",
    "ChatTemplate",
    "Form",
    "HeaderTemplate",
    "InstructionTemplate",
    "PlainTemplate",
    "SingleSeparatorTemplate",
    "Span",
    "Template",
    "Turn",
    "TwoSeparatorTemplate",
    "check_alternation",
]
