"""The demonstration's tokenizer behaves like Llama's where it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_uhd.data import synthetic
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.data.drawing import COLOURS, SHAPES
from llava_uhd.text.layout import single_token_id
from llava_uhd.text.templates import TEMPLATES, Turn


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_demo_tokenizer()


def test_special_ids_are_llamas(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("")["input_ids"] == [1]
    assert single_token_id(tokenizer, "\n") == 13
    assert tokenizer.convert_ids_to_tokens(single_token_id(tokenizer, ",")) == ","


def test_digits_are_single(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.tokenize("90210")
    assert tokens == ["\u2581", "9", "0", "2", "1", "0"]


def test_templates_and_data_are_whole_words(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [synthetic.SIGN_QUESTION, *synthetic.MARK_QUESTIONS.values()]
    turns = [
        turn
        for question in questions
        for turn in (Turn("human", question), Turn("gpt", " ".join([*COLOURS, *SHAPES])))
    ]
    text = "".join(span.text for span in TEMPLATES.get("v1").spans(turns))
    letters = [token for token in tokenizer.tokenize(text) if len(token) == 1 and token.isalpha()]
    # "user's": the only single letter.
    assert letters == ["s"]
    assert len(tokenizer("".join(s.text for s in TEMPLATES.get("v1").spans(turns[:2])))[0]) < 60


@pytest.mark.parametrize(
    "text",
    ["What does the sign say?", "Zoë, 你好 🙂", "a  b\tc\n\nd", "", "x = {1: '<'}", " leading"],
)
def test_any_text_survives(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_save_and_load(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: What colour is the mark? ASSISTANT: red</s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id in loaded(text)["input_ids"]
    assert loaded.pad_token_id == 0


def test_offsets_cover_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "say? 34é</s>"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    covered = {k for start, stop in encoded["offset_mapping"] for k in range(start, stop)}
    assert covered == set(range(len(text)))
