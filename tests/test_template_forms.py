"""Every template: exact texts, two renderings that agree, prompts and labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures_qwen import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.text.encoding import IGNORE_INDEX, encode_spans
from llava_uhd.text.faithful import FAITHFUL
from llava_uhd.text.prompting import prompt_text
from llava_uhd.text.templates import (
    ALIASES,
    TEMPLATES,
    ChatTemplate,
    Form,
    Turn,
)

IMAGE = -200
NAMES = [name for name in TEMPLATES if name not in ALIASES]
CHATS = [name for name in NAMES if name != "plain"]
PIECES = ["the", " a", "red", "\n", "\n\n", " ", "  ", "é", "字", "3.", "user", "USER", ":", "#"]
free_text = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
talks = st.lists(free_text, min_size=1, max_size=6)


def talk(texts: Sequence[str]) -> list[Turn]:
    return [Turn("human" if i % 2 == 0 else "gpt", text) for i, text in enumerate(texts)]


def text_of(name: str, turns: Sequence[Turn], *, generate: bool = False) -> str:
    return "".join(span.text for span in TEMPLATES.get(name).spans(turns, generate=generate))


def form_of(name: str) -> Form:
    template = TEMPLATES.get(name)
    assert isinstance(template, ChatTemplate)
    return template.form


RENDERER = build_demo_tokenizer()


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    text = RENDERER.apply_chat_template(
        messages, chat_template=TEMPLATES.get(name).chat_template, tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn.role], "content": turn.text} for turn in turns]


# --- exact texts ----------------------------------------------------------------------------------

POLITE = "The assistant gives helpful, detailed, and polite answers to the"
V0 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    f"{POLITE} human's questions.###"
)
TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following "
    "format: <Image>visual content</Image>."
)
SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
DIRECT = "<|im_start|>system\nAnswer the questions.<|im_end|>"
HEAD = "<|start_header_id|>"
SHUT = "<|end_header_id|>\n\n"
RENDERED = {
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        f"{POLITE} human's questions. USER: <image>\nA? ASSISTANT: B</s>USER: C ASSISTANT: D</s>"
    ),
    "v1_mmtag": (
        f"{TAGS} USER: <Image><image></Image>\nA? ASSISTANT: B</s>USER: C ASSISTANT: D</s>"
    ),
    "llava_v0": f"{V0}Human: <image>\nA?###Assistant: B###Human: C###Assistant: D###",
    "llava_v0_im_start_end": (
        f"{V0}Human: <im_start><image><im_end>\nA?###Assistant: B###Human: C###Assistant: D###"
    ),
    "v0_mmtag": (
        f"{TAGS}###Human: <Image><image></Image>\nA?###Assistant: B###Human: C###Assistant: D###"
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{SEES}\n<</SYS>>\n\n<image>\nA? [/INST] B </s><s>[INST] C [/INST] D </s>"
    ),
    "mistral_instruct": "[INST] <image>\nA? [/INST] B </s>[INST] C [/INST] D </s>",
    "chatml_direct": (
        f"{DIRECT}<|im_start|>user\n<image>\nA?<|im_end|><|im_start|>assistant\nB<|im_end|>"
        "<|im_start|>user\nC<|im_end|><|im_start|>assistant\nD<|im_end|>"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nA?<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nD<|im_end|>\n"
    ),
    "llama_3": (
        f"{HEAD}system{SHUT}{SEES}<|eot_id|>{HEAD}user{SHUT}<image>\nA?<|eot_id|>"
        f"{HEAD}assistant{SHUT}B<|eot_id|>{HEAD}user{SHUT}C<|eot_id|>"
        f"{HEAD}assistant{SHUT}D<|eot_id|>"
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_texts(name: str) -> None:
    assert text_of(name, talk(["<image>\nA?", "B", "C", "D"])) == RENDERED[name]


def test_rendered_texts_with_long_openings() -> None:
    turns = talk(["A?", "B"])
    text = text_of("v0", turns)
    assert text.startswith(f"{V0}Human: What are the key differences between renewable and")
    assert text.endswith("economic and social instability.\n###Human: A?###Assistant: B###")
    text = text_of("llama_2", turns)
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. ")
    assert "while being safe.  Your answers" in text and "positive in nature.\n\nIf a" in text
    assert text.endswith("share false information.\n<</SYS>>\n\nA? [/INST] B </s>")
    assert text_of("qwen_2_5", turns).startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n"
    )
    assert text_of("mpt", turns).startswith(
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The "
        "assistant gives helpful and honest answers.<|im_end|><|im_start|>user\n"
    )


def test_stop_strings_and_special_tokens() -> None:
    stops = {name: TEMPLATES.get(name).stop_strings for name in NAMES}
    for name, stop in stops.items():
        if name.startswith(("v0", "llava_v0")):
            assert stop == ("###",)
        elif name == "llama_3":
            assert stop == ("<|eot_id|>",)
        elif name.startswith(("qwen", "mpt", "chatml")):
            assert stop == ("<|im_end|>",)
        else:
            assert stop == (("\n",) if name == "plain" else ("</s>",))
    assert TEMPLATES.get("mpt_im_start_end").special_tokens == (
        *("<|im_start|>", "<|im_end|>"),
        *("<im_start>", "<im_end>"),
    )
    # Tags of text are text.
    assert TEMPLATES.get("v1_mmtag").special_tokens == ()


def test_aliases_are_the_same_template() -> None:
    for alias, name in ALIASES.items():
        assert TEMPLATES.get(alias) is TEMPLATES.get(name)
        assert alias == "mpt_next" or FAITHFUL.get(alias) is FAITHFUL.get(name)


def test_the_page_has_every_template(root: Path) -> None:
    page = (root / "docs/templates.md").read_text(encoding="utf-8")
    table = page.split("## The templates")[1].split("## What is learned")[0]
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| `")]
    for column, names in ((0, NAMES), (1, list(ALIASES))):
        found = [name for row in rows for name in re.findall(r"`(\w+)`", row[column])]
        assert sorted(found) == sorted(names)


# --- two renderings -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=30)
@given(texts=talks, markers=st.lists(st.sampled_from(["<image>", "<video>"]), max_size=3))
def test_chat_templates_render_what_the_spans_render(
    name: str, texts: list[str], markers: list[str]
) -> None:
    texts[0] = "\n".join([*markers, texts[0]])
    turns = talk(texts)
    asks = turns[-1].role == "human"
    rendered = render(name, messages_of(turns), add_generation_prompt=asks)
    assert rendered == text_of(name, turns, generate=asks)


@pytest.mark.parametrize("name", CHATS)
def test_content_lists(name: str) -> None:
    items = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    asked = [{"role": "user", "content": items}]
    prompt = prompt_text(TEMPLATES.get(name), [Turn("human", "<image>\n<video>\nWhat?")])
    assert render(name, asked, add_generation_prompt=True) == prompt
    told = [*asked, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    whole = text_of(name, talk(["<image>\n<video>\nWhat?", "A cat."]))
    assert render(name, told) == whole


def test_plain_takes_videos_too() -> None:
    parts = [{"type": "video"}, {"type": "text", "text": "x"}, {"type": "image"}]
    wanted = "<video><image>"
    asked = [Turn("human", "<video> <x<image>")]
    assert render("plain", [{"role": "user", "content": parts}]) == wanted
    assert render("plain", messages_of(asked)) == text_of("plain", asked, generate=True) == wanted


@pytest.mark.parametrize("name", CHATS)
def test_system_messages_replace_the_own(name: str) -> None:
    form = form_of(name)
    own = text_of(name, talk(["Hi", "Ho"]))
    system = {"role": "system", "content": "Be brief."}
    rendered = render(name, [system, *messages_of(talk(["Hi", "Ho"]))])
    block = f"{form.system_head}Be brief.{form.system_end}"
    if form.system:
        assert rendered == own.replace(form.system_block, block)
    else:
        assert rendered.replace(block, "") == own
    assert rendered.count("Be brief.") == 1
    # An empty one leaves it out.
    empty = render(name, [{"role": "system", "content": ""}, *messages_of(talk(["Hi", "Ho"]))])
    assert empty == own.replace(form.system_block, "")


@pytest.mark.parametrize("name", CHATS)
def test_other_roles_are_refused(name: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateError, match="must be from user and assistant"):
        render(name, [*messages, {"role": "tool", "content": "x"}])
    later = [*messages, {"role": "system", "content": "Be brief."}]
    form = form_of(name)
    if form.system_head and not form.system_inside:
        assert render(name, later).endswith(f"{form.system_head}Be brief.{form.system_end}")
    else:
        with pytest.raises(TemplateError, match="only the first may be from system"):
            render(name, later)


@pytest.mark.parametrize("name", ["v1_mmtag", "v0_mmtag", "v1_im_start_end"])
def test_tags_are_written_once(name: str) -> None:
    template = TEMPLATES.get(name)
    assert isinstance(template, ChatTemplate)
    before, behind = template.around
    for marker in ("<image>", "<video>"):
        bare, tagged = (
            [Turn("human", f"{text}\nWhat?")] for text in (marker, before + marker + behind)
        )
        assert prompt_text(template, bare) == prompt_text(template, tagged)
        assert render(name, messages_of(tagged), add_generation_prompt=True) == prompt_text(
            template, bare
        )


# --- prompts and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=30)
@given(texts=st.lists(free_text, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_prompts_are_beginnings_of_the_conversation(name: str, texts: list[str]) -> None:
    turns = talk(texts)
    whole = text_of(name, turns)
    for count in range(1, len(turns), 2):
        assert whole.startswith(text_of(name, turns[:count], generate=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Bytes and a few merges, with the marks of every template as tokens."""
    made = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    marks = {mark for name in NAMES for mark in TEMPLATES.get(name).special_tokens}
    made.add_special_tokens(
        {"additional_special_tokens": [*sorted(marks), "<s>", "</s>"]},
        replace_extra_special_tokens=False,
    )
    return made


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data())
def test_clean_labels_are_answers_and_end_tokens(
    tokenizer: PreTrainedTokenizerBase, name: str, data: st.DataObject
) -> None:
    limit = 1 if name == "plain" else 3
    rounds = data.draw(st.lists(st.tuples(free_text, free_text), min_size=1, max_size=limit))
    texts = [text for pair in rounds for text in pair]
    images = data.draw(st.integers(1 if name == "plain" else 0, 2))
    texts[0] = "<image>\n" * images + texts[0]
    spans = TEMPLATES.get(name).spans(talk(texts))
    made = encode_spans(tokenizer, spans, [[IMAGE]] * images)
    pairs = list(zip(made.input_ids, made.labels, strict=True))
    assert all(label in (IGNORE_INDEX, token) for token, label in pairs)
    learned = tokenizer.decode([label for label in made.labels if label != IGNORE_INDEX])
    answers = texts[1::2]
    if name == "plain":
        assert learned == answers[0] + "\n"
        return
    form = form_of(name)
    wanted = ""
    for answer in answers:
        said = answer.strip() if form.trim else answer
        # A newline that opens an answer is one token with the newline that ends its header.
        merged = "\n" if said.startswith("\n") and form.answer_head.endswith("\n") else ""
        wanted += merged + form.gap + said + form.before_stop + form.stop
    assert learned == wanted
    # Nothing is lost on the way: the whole text comes back.
    whole = tokenizer.decode([token for token in made.input_ids if token != IMAGE])
    assert whole == "".join(span.text for span in spans).replace("<image>", "")
