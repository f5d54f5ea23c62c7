"""The qwen_1_5 template: renderings, clean and faithful labels, ids of the published code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures_qwen import save_tokenizer
from fixtures_tiny import picture, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_uhd.checkpoint.assemble import check_parts
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.training import ModelSection
from llava_uhd.data.rows import place_marker
from llava_uhd.errors import UserError
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.text.faithful import encode_turns
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.prompting import prompt_text
from llava_uhd.text.templates import QWEN_1_5, TEMPLATES, Turn

IMAGE = -200
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PIECES = ["the", " a", "red", "\n", "\n\n", " ", "  ", "é", "字", "3.", "user", "assistant", ":"]
free_text = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def talk(texts: Sequence[str]) -> list[Turn]:
    return [Turn("human" if i % 2 == 0 else "gpt", text) for i, text in enumerate(texts)]


def encode(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], mode: str = "clean"
) -> tuple[list[int], list[int]]:
    """Ids and labels; each image is one -200."""
    count = sum(turn.text.count("<image>") for turn in turns)
    made = encode_turns("qwen_1_5", mode, tokenizer, turns, [[IMAGE]] * count)
    return made.input_ids, made.labels


# --- renderings -----------------------------------------------------------------------------------


def test_rendered_text() -> None:
    turns = talk(["<image>\nWhat?", "A cat.", "Where?", ""])
    assert "".join(span.text for span in QWEN_1_5.spans(turns)) == (
        SYSTEM + "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )
    assert prompt_text(QWEN_1_5, turns[:1]) == (
        SYSTEM + "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert QWEN_1_5.stop_strings == ("<|im_end|>",)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> str:
    text = tokenizer.apply_chat_template(
        messages, chat_template=QWEN_1_5.chat_template, tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


@settings(max_examples=60)
@given(texts=st.lists(free_text, min_size=1, max_size=6))
def test_chat_template_renders_what_the_spans_render(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    turns = talk(texts)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    asks = turns[-1].role == "human"
    assert render(tokenizer, messages, add_generation_prompt=asks) == "".join(
        span.text for span in QWEN_1_5.spans(turns, generate=asks)
    )


def test_content_lists_and_system_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert render(
        tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True
    ) == prompt_text(QWEN_1_5, [Turn("human", "<image>\nWhat?")])
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(tokenizer, system) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


# --- labels ---------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.data())
def test_clean_labels_are_answers_and_end_tokens(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    rounds = data.draw(st.lists(st.tuples(free_text, free_text), min_size=1, max_size=3))
    texts = [text for pair in rounds for text in pair]
    texts[0] = "<image>\n" * data.draw(st.integers(0, 2)) + texts[0]
    ids, labels = encode(tokenizer, talk(texts))
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    whole = tokenizer.decode([token for token in ids if token != IMAGE])
    assert whole == "".join(span.text for span in QWEN_1_5.spans(talk(texts))).replace(
        "<image>", ""
    )
    learned = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    # A newline that opens an answer is one token with the newline that ends its header.
    wanted = [("\n" if text.startswith("\n") else "") + text + "<|im_end|>" for text in texts[1::2]]
    assert learned == "".join(wanted)


def slow_labels(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> tuple[list[int], Any]:
    """The published rule, from its description: every turn rendered and tokenised on its own."""
    special = {
        tokenizer("\n")["input_ids"][0],
        *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]),
    }

    def tokens(text: str) -> list[int]:
        ids: list[int] = []
        for place, chunk in enumerate(text.split("<image>")):
            ids += [IMAGE] * (place > 0) + tokenizer(chunk, add_special_tokens=False)["input_ids"]
        return ids

    ids = tokens(SYSTEM)
    labels = [IGNORE_INDEX] * len(ids)
    for turn in turns:
        role = {"human": "user", "gpt": "assistant"}[turn.role]
        row = tokens(f"<|im_start|>{role}\n{turn.text}<|im_end|>\n")
        ids += row
        labels += row if role == "assistant" else [IGNORE_INDEX] * len(row)
    labels = [
        token if token in special else label for token, label in zip(ids, labels, strict=True)
    ]
    return ids, labels


@settings(max_examples=80)
@given(st.data())
def test_faithful_labels_follow_the_published_rule(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    rounds = data.draw(st.lists(st.tuples(free_text, free_text), min_size=1, max_size=3))
    texts = [text for pair in rounds for text in pair]
    texts[0] = "<image>\n" * data.draw(st.integers(0, 2)) + texts[0]
    turns = talk(texts)
    assert encode(tokenizer, turns, "faithful") == slow_labels(tokenizer, turns)


def golden_cases(golden: Path, name: str) -> list[dict[str, Any]]:
    cases = json.loads((golden / f"llava_onevision/tokenization/{name}.json").read_text())["cases"]
    assert isinstance(cases, list) and len(cases) >= 10
    return cases


def golden_turns(case: dict[str, Any]) -> list[Turn]:
    turns = [
        Turn(
            turn["from"], place_marker(turn["value"], True) if case["has_image"] else turn["value"]
        )
        for turn in case["conversations"]
    ]
    return turns[1:] if turns[0].role == "gpt" else turns


def test_golden_labels(golden: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "llava_onevision/tokenizer_qwen")
    for case in golden_cases(golden, "qwen_1_5"):
        turns = golden_turns(case)
        wanted = case["input_ids"], case["labels"]
        assert encode(tokenizer, turns, "faithful") == wanted, case["id"]
        ids, labels = encode(tokenizer, turns)
        assert ids == case["input_ids"], case["id"]
        # The better labels are a part of the published ones: answers and their ends.
        assert all(label in (IGNORE_INDEX, other) for label, other in zip(labels, wanted[1]))
        learned = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
        assert learned == "".join(f"{t.text}<|im_end|>" for t in turns if t.role == "gpt")


def test_golden_prompts(golden: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "llava_onevision/tokenizer_qwen")
    conversations = {case["id"]: case for case in golden_cases(golden, "qwen_1_5")}
    compared = 0
    for case in golden_cases(golden, "inference_prompt_qwen_1_5"):
        turns = [Turn(t["from"], t["value"]) for t in conversations[case["id"]]["conversations"]]
        if turns[0].role == "gpt":
            continue
        text = prompt_text(QWEN_1_5, turns[:-1])
        assert text == case["prompt_text"], case["id"]
        made = [
            token
            for place, chunk in enumerate(text.split("<image>"))
            for token in [IMAGE] * (place > 0) + tokenizer(chunk)["input_ids"]
        ]
        assert made == case["input_ids"], case["id"]
        compared += 1
    assert compared >= 10
    cases = json.loads((golden / "uhd_v2/full_qwen2/cases.json").read_text())["cases"]
    tokenizer = AutoTokenizer.from_pretrained(golden / "uhd_v2/full_qwen2")
    for case in cases:
        turns = [Turn("human", "<image>\n" + case["question"])]
        assert prompt_text(QWEN_1_5, turns) == case["prompt"]


# --- in a processor -------------------------------------------------------------------------------


def test_separators_of_slices_are_never_learned(tmp_path: Path) -> None:
    _, tiny = tiny_parts()
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    config = LlavaUHDConfig(
        image={"scale_resolution": 32, "patch_size": 8},
        projector={"num_queries": 4},
        template="qwen_1_5",
    )
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    processor.template_mode = "faithful"
    processor.save_pretrained(tmp_path / "saved")
    processor = LlavaUHDProcessor.from_pretrained(tmp_path / "saved")
    assert processor.template_mode == "faithful"
    turns = talk(["<image>\nWhat?", "A cat."])
    sample = processor.encode_conversation(turns, [picture(64, 32)])
    ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    places = [place for place, token in enumerate(ids) if token == processor.image_token_id]
    first, last = places[0], places[-1]
    assert ids[first : last + 1].count(198) == 1
    assert set(labels[first : last + 1]) == {IGNORE_INDEX}
    assert labels[last + 1] == 198  # the newline behind the image is text
    collapsed = [*ids[:first], IMAGE, *ids[last + 1 :]], labels[:first] + labels[last:]
    assert collapsed == encode(tokenizer, turns, "faithful")
    assert tiny.template_mode == "clean"


def test_templates_without_a_rule_are_named() -> None:
    with pytest.raises(
        UserError, match=r"faithful labels 'chatml'.*\(known: chatml_direct, llama_2"
    ):
        check_parts(ModelSection(language_model={}, template="chatml", template_mode="faithful"))
    with pytest.raises(UserError, match="template_mode must be clean or faithful, got 'strict'"):
        encode_turns("v1", "strict", None, [], [])  # type: ignore[arg-type]
    assert TEMPLATES.get("qwen_1_5") is QWEN_1_5
