"""Ids and labels of every template against the published code, case by case."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerBase

from llava_uhd.checkpoint.parts import read_tokenizer
from llava_uhd.data.rows import place_marker
from llava_uhd.errors import UserError
from llava_uhd.text.encoding import IGNORE_INDEX, Encoding
from llava_uhd.text.faithful import FAITHFUL, encode_turns
from llava_uhd.text.pieces import is_legacy, piece_ids, with_images
from llava_uhd.text.templates import TEMPLATES, ChatTemplate, Turn

IMAGE = -200
# File -> our template, where the name of the file is not its name.
ONE = {
    "llava_llama_2__legacy": "llava_llama_2",
    "llava_llama_2__nonlegacy": "llava_llama_2",
    "llava_v0__legacy": "llava_v0",
    "llava_v0__nonlegacy": "llava_v0",
    "llava_v1__legacy": "llava_v1",
    "llava_v1__nonlegacy": "llava_v1",
    "mistral_instruct__legacy": "mistral_instruct",
    "mistral_instruct__nonlegacy": "mistral_instruct",
    "mpt__qwen_tokenizer": "mpt",
    "plain__legacy": "plain",
    "plain__nonlegacy": "plain",
    "v1__legacy": "v1",
    "v1__nonlegacy": "v1",
    "v1_im_start_end__nonlegacy": "v1_im_start_end",
    "v1_maxlen64__legacy": "v1",
    "v1_maxlen64__nonlegacy": "v1",
    "v1_mmtag__legacy": "v1_mmtag",
    "v1_mmtag__nonlegacy": "v1_mmtag",
}
NEXT = {
    "llama_3": "llama_3",
    "mpt__qwen": "mpt_next",
    "plain__qwen": "plain",
    "qwen_1_5": "qwen_1_5",
}
FILES = [("llava_1_5", *item) for item in ONE.items()]
FILES += [("llava_onevision", *item) for item in NEXT.items()]

# Where clean ids differ from the published ones (docs/templates.md): an empty answer is an answer
# here, and not one that is still to be written; the oldest form is trained as it is asked.
EMPTY = {"v1", "llava_v1", "v1_mmtag", "v1_im_start_end", "llava_llama_2", "mistral_instruct"}
EMPTY |= {"mpt", "mpt_next"}
OTHER_FORM = {"llava_v0"}
# Published labels that hold more than the answers.
MORE = {"llama_3", "qwen_1_5"}


class Case(NamedTuple):
    """One golden case, its turns as the published code prepares them."""

    values: dict[str, Any]
    turns: list[Turn]

    @property
    def images(self) -> list[list[int]]:
        return [[IMAGE]] * self.values["input_ids"].count(IMAGE)

    @property
    def alternating(self) -> list[Turn]:
        return self.turns[1:] if self.turns[0].role == "gpt" else self.turns


class File(NamedTuple):
    """One golden file."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    cases: list[Case]

    def encode(self, case: Case, mode: str) -> Encoding:
        """Ids and labels, cut where the published tokenizer cuts: texts without images."""
        turns = case.turns if mode == "faithful" else case.alternating
        made = encode_turns(
            self.name, mode, self.tokenizer, turns, case.images, max_length=self.max_length
        )
        if not case.values["has_image"]:
            made.cut(self.max_length, "error")
        return made


def turns_of(values: dict[str, Any], rule: str) -> list[Turn]:
    """Turns with their markers where the published code puts them."""
    return [
        Turn(
            turn["from"],
            place_marker(turn["value"], rule) if values["has_image"] else turn["value"],
        )
        for turn in values["conversations"]
    ]


@pytest.fixture(scope="module", params=FILES, ids=lambda item: f"{item[0]}-{item[1]}")
def file(request: pytest.FixtureRequest, golden: Path) -> File:
    system, stem, name = request.param
    values = json.loads((golden / system / f"tokenization/{stem}.json").read_text())
    tokenizer = read_tokenizer(golden / system / values["tokenizer"])
    if added := values.get("added_tokens"):
        assert tuple(added) == TEMPLATES.get(name).special_tokens
        tokenizer.add_tokens(added, special_tokens=True)
    rule = "llava_1_5" if system == "llava_1_5" else "onevision"
    cases = [Case(case, turns_of(case, rule)) for case in values["cases"]]
    assert len(cases) >= 12
    return File(name, tokenizer, values["model_max_length"], cases)


def test_every_golden_file_is_read(golden: Path) -> None:
    found = {
        (system, path.stem)
        for system in ("llava_1_5", "llava_onevision")
        for path in (golden / system / "tokenization").glob("*.json")
    }
    # The prompts are compared in test_chatml.
    assert found == {item[:2] for item in FILES} | {
        ("llava_onevision", "inference_prompt_qwen_1_5")
    }


def test_faithful_ids_and_labels(file: File, caplog: pytest.LogCaptureFixture) -> None:
    for case in file.cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llava_uhd.text.pieces"):
            made = file.encode(case, "faithful")
        wanted = case.values
        assert made.input_ids == wanted["input_ids"], wanted["id"]
        assert made.labels == wanted["labels"], wanted["id"]
        assert ("tokenization mismatch" in caplog.text) == wanted["mismatch_warning"], wanted["id"]


def test_clean_ids(file: File) -> None:
    for case in file.cases:
        same = file.encode(case, "clean").input_ids == case.values["input_ids"]
        exception = file.name in OTHER_FORM or (
            file.name in EMPTY and case.values["id"] == "empty_answer"
        )
        # The exceptions are real: one that went away must leave the list.
        assert same != exception, case.values["id"]


def test_clean_labels(file: File) -> None:
    compared = 0
    for case in file.cases:
        wanted = case.values
        made = file.encode(case, "clean")
        if wanted["mismatch_warning"] or made.input_ids != wanted["input_ids"]:
            continue
        if file.name in MORE:
            pairs = zip(made.labels, wanted["labels"], strict=True)
            assert all(ours in (IGNORE_INDEX, theirs) for ours, theirs in pairs), wanted["id"]
        else:
            assert made.labels == wanted["labels"], wanted["id"]
        compared += 1
    few = {"llava_v0": 0, "mpt": 0, "mpt_next": 12, "plain": 12}
    assert compared == few.get(file.name, 16 if file.name in MORE else compared)
    assert compared >= 12 or file.name in few


def test_clean_labels_miss_no_answer(file: File) -> None:
    template = TEMPLATES.get(file.name)
    for case in file.cases:
        made = encode_turns(file.name, "clean", file.tokenizer, case.alternating, case.images)
        learned = [label for label in made.labels if label != IGNORE_INDEX]
        text = "".join(span.text for span in template.spans(case.alternating) if span.learn)
        # The word-start mark in front of an answer is its space.
        decoded = file.tokenizer.decode(learned)
        assert decoded.lstrip(" ") == text.lstrip(" "), case.values["id"]


def test_prompt_texts(file: File) -> None:
    template = TEMPLATES.get(file.name)
    compared = 0
    for case in file.cases:
        if "prompt_text" not in case.values or case.values["id"] == "empty_answer":
            continue
        text = "".join(span.text for span in template.spans(case.alternating))
        assert text == case.values["prompt_text"], case.values["id"]
        compared += 1
    assert compared == (15 if isinstance(template, ChatTemplate) and file.name not in MORE else 0)


def test_empty_answers_end_in_clean_mode(file: File) -> None:
    cases = [case for case in file.cases if case.values["id"] == "empty_answer"]
    for case in cases:
        made = encode_turns(file.name, "clean", file.tokenizer, case.alternating, case.images)
        learned = [label for label in made.labels if label != IGNORE_INDEX]
        (stop,) = TEMPLATES.get(file.name).stop_strings
        assert file.tokenizer.decode(learned).strip() == stop


def test_images_take_the_place_of_their_mark(file: File) -> None:
    """Longer images move labels, and change none."""
    for case in file.cases:
        whole = encode_turns(
            file.name,
            "faithful",
            file.tokenizer,
            case.turns,
            [[7, 8, 9] for _ in case.images],
            max_length=file.max_length,
        )
        assert len(whole.runs) == len(case.images)
        inside = {place for start, stop in whole.runs for place in range(start + 1, stop)}
        ids = [token for place, token in enumerate(whole.input_ids) if place not in inside]
        labels = [label for place, label in enumerate(whole.labels) if place not in inside]
        for number, (start, stop) in enumerate(whole.runs):
            assert whole.input_ids[start:stop] == [7, 8, 9]
            assert whole.labels[start:stop] == [IGNORE_INDEX] * 3
            ids[start - 2 * number] = IMAGE
        reference = encode_turns(
            file.name,
            "faithful",
            file.tokenizer,
            case.turns,
            case.images,
            max_length=file.max_length,
        )
        assert (ids, labels) == (reference.input_ids, reference.labels)


# --- rules beside the golden cases ----------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(golden: Path) -> Iterator[PreTrainedTokenizerBase]:
    yield read_tokenizer(golden / "llava_1_5/tokenizer_llama_nonlegacy")


def test_treatments_of_text_behind_special_tokens(
    golden: Path, llama: PreTrainedTokenizerBase
) -> None:
    assert is_legacy(llama) is False
    assert is_legacy(read_tokenizer(golden / "llava_1_5/tokenizer_llama_legacy")) is True
    assert is_legacy(read_tokenizer(golden / "llava_onevision/tokenizer_qwen")) is None


def labels_of(name: str, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    return encode_turns(name, "faithful", tokenizer, turns, []).labels


def test_version_v0_trains_like_v1(llama: PreTrainedTokenizerBase) -> None:
    talk = ["Is there a dog?", "Yes.", "Where?", "On the left."]
    assert labels_of("v0", llama, talk) == labels_of("v1", llama, talk)


def test_qwen_2_5_trains_with_the_older_system_message(golden: Path) -> None:
    tokenizer = read_tokenizer(golden / "llava_onevision/tokenizer_qwen")
    talk = ["Is there a dog?", "Yes."]
    assert labels_of("qwen_2_5", tokenizer, talk) == labels_of("qwen_1_5", tokenizer, talk)
    turns = [Turn("human", talk[0]), Turn("gpt", talk[1])]
    clean = encode_turns("qwen_2_5", "clean", tokenizer, turns, [])
    assert "Alibaba" in tokenizer.decode(clean.input_ids)


@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "mistral_instruct", "mpt"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_empty_turn_spoils_the_sample(
    llama: PreTrainedTokenizerBase, name: str, place: int
) -> None:
    talk = ["Is there a dog?", "Yes.", "Where is it?", "On the left."]
    talk[place] = ""
    learned = [label for label in labels_of(name, llama, talk) if label != IGNORE_INDEX]
    if place == 1 and name != "mpt":
        # No end token stands between the rounds: they pass as one with a long question.
        answer = llama.decode(learned).replace(" </s>", "</s>")
        assert answer.strip() == "On the left.</s>"
    else:
        assert learned == []
    # As published; clean mode learns from every one of them.
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(talk)]
    assert set(encode_turns(name, "clean", llama, turns, []).labels) != {IGNORE_INDEX}


def test_the_check_ends_at_the_longest_sample(llama: PreTrainedTokenizerBase) -> None:
    turns = [Turn("human", "What is USER?"), Turn("gpt", "A mark. ASSISTANT: is another.")]
    turns = [Turn("human", "a"), Turn("gpt", "b" * 40), *turns]
    learned = {
        limit: set(encode_turns("v1", "faithful", llama, turns, [], max_length=limit).labels)
        for limit in (None, 2048, 64)
    }
    # The first round is counted longer than 64 tokens, so the check is left out.
    assert learned[None] == learned[2048] == {IGNORE_INDEX}
    assert len(learned[64]) > 1


def test_places_and_images_must_agree(llama: PreTrainedTokenizerBase) -> None:
    ids = piece_ids(llama, "<image>\na <image>")
    assert ids.count(IMAGE) == 2
    with pytest.raises(UserError, match="has 2 <image> but 1 images"):
        with_images(ids, [True] * len(ids), [[7]])
    with pytest.raises(UserError, match="turn 1 is from 'human', expected 'gpt'"):
        encode_turns("v1", "faithful", llama, [Turn("human", "a"), Turn("human", "b")], [])


def test_every_published_template_has_a_rule() -> None:
    assert set(TEMPLATES) - set(FAITHFUL) == {"chatml"}
