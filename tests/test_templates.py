"""Templates: two renderings that agree, and labels against a slow reading of the published rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fixtures_slow_llama import Pair, SlowLlama, convert_tokenizers  # noqa: F401  (a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.text.encoding import IGNORE_INDEX, Encoding, encode_spans
from llava_uhd.text.faithful import encode_turns
from llava_uhd.text.layout import single_token_id
from llava_uhd.text.templates import TEMPLATES, Span, Turn

PLACEHOLDER = 100_000
# Ids of an image in the tests below: anything that no tokenizer here produces.
RUN = [PLACEHOLDER] * 3

WORDS = [
    "a",
    "red circle",
    "USER",
    "ASSISTANT",
    "x:",
    "\n",
    " ",
    "  ",
    "é",
    "字",
    "3.14",
    "</",
    "s>",
]
free_text = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
    st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), max_size=12),
).filter(lambda text: "<image>" not in text and "</s>" not in text)


def talk(texts: list[str]) -> list[Turn]:
    return [Turn("human" if i % 2 == 0 else "gpt", text) for i, text in enumerate(texts)]


def as_messages(turns: list[Turn]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn.role], "content": turn.text} for turn in turns]


def render_jinja(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    text = build_demo_tokenizer().apply_chat_template(
        messages, chat_template=TEMPLATES.get(name).chat_template, tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


def render_spans(name: str, turns: list[Turn], **options: Any) -> str:
    return "".join(span.text for span in TEMPLATES.get(name).spans(turns, **options))


@settings(max_examples=60)
@given(st.lists(st.tuples(free_text, free_text), min_size=1, max_size=4), st.booleans())
def test_v1_chat_template_renders_what_the_spans_render(
    rounds: list[tuple[str, str]], image: bool
) -> None:
    texts = [text for pair in rounds for text in pair]
    if image:
        texts[0] = "<image>\n" + texts[0]
    turns = talk(texts)
    assert render_jinja("v1", as_messages(turns)) == render_spans("v1", turns)
    asked = turns[:-1]
    prompt = render_jinja("v1", as_messages(asked), add_generation_prompt=True)
    assert prompt == render_spans("v1", asked, generate=True)


@settings(max_examples=20)
@given(free_text, free_text, st.integers(1, 3))
def test_plain_chat_template_renders_what_the_spans_render(
    question: str, caption: str, images: int
) -> None:
    turns = talk(["<image>" * images + question, caption])
    assert render_jinja("plain", as_messages(turns)) == render_spans("plain", turns)
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]
    assert render_jinja("plain", messages) == render_spans("plain", turns)


def test_content_lists_and_system_messages() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    listed = render_jinja("v1", [{"role": "user", "content": content}], add_generation_prompt=True)
    assert listed == render_spans("v1", [Turn("human", "<image>\nWhat?")], generate=True)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render_jinja("v1", system, add_generation_prompt=True) == (
        "Be brief. USER: Hi ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("v1", [], "must end"),
        ("v1", ["only a question"], "must end"),
        ("plain", ["no picture", "caption"], "<image>"),
        ("plain", ["<image>", "a", "b", "c"], "4 turns"),
    ],
)
def test_turns_that_do_not_fit_are_refused(name: str, texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TEMPLATES.get(name).spans(talk(texts))


def test_wrong_roles_are_named() -> None:
    with pytest.raises(UserError, match="turn 1 is from 'human', expected 'gpt'"):
        TEMPLATES.get("v1").spans([Turn("human", "a"), Turn("human", "b")])
    with pytest.raises(UserError, match="unknown template 'v2'.*v1"):
        TEMPLATES.get("v2")


# --- labels against a slow, independent reading of the published rule -----------------------------


def published_labels(tokenizer: SlowLlama, conversation: str) -> list[int] | None:
    """Labels of a v1 conversation as the published code masks them; None where it gives up."""
    encode = tokenizer.with_images
    target = encode(conversation)
    total = len(target)
    target[0] = IGNORE_INDEX
    place = 1
    for index, part in enumerate(conversation.split("</s>")):
        halves = part.split(" ASSISTANT: ")
        if part == "" or len(halves) != 2:
            break
        length = len(encode(part))
        asked = len(encode(halves[0] + " ASSISTANT: ")) - 2
        if index and not tokenizer.legacy:
            length, asked = length - 1, asked - 1
        target[place : place + asked] = [IGNORE_INDEX] * asked
        place += length
    target[place:] = [IGNORE_INDEX] * (len(target) - place)
    return target if place == total else None


def encode(tokenizer: PreTrainedTokenizerBase, spans: list[Span]) -> Encoding:
    images = "".join(span.text for span in spans).count("<image>")
    return encode_spans(tokenizer, spans, [[PLACEHOLDER]] * images)


# What sentencepiece would normalise, or the published code would take for its own marks.
plain_text = (
    st.one_of(
        st.lists(st.sampled_from(["a", "red", "circle", "The", "3.", "é", "字"]), min_size=1).map(
            " ".join
        ),
        st.text("abcTU.,:'3é\n", min_size=1, max_size=10),
    )
    .map(str.strip)
    .filter(lambda text: text != "")
)


@pytest.mark.parametrize("legacy", [True, False])
def test_v1_labels_are_the_published_ones(converted: Callable[[bool], Pair], legacy: bool) -> None:
    fast, slow = converted(legacy)
    compared = 0

    @settings(max_examples=80)
    @given(st.lists(st.tuples(plain_text, plain_text), min_size=1, max_size=3), st.integers(0, 2))
    def compare(rounds: list[tuple[str, str]], images: int) -> None:
        nonlocal compared
        texts = [text for pair in rounds for text in pair]
        texts[0] = "<image>\n" * images + texts[0]
        spans = TEMPLATES.get("v1").spans(talk(texts))
        conversation = "".join(span.text for span in spans)
        ours = encode(fast, spans)
        assert [-200 if i == PLACEHOLDER else i for i in ours.input_ids] == (
            slow.with_images(conversation)
        )
        labels = published_labels(slow, conversation)
        turns = talk(texts)
        faithful = encode_turns("v1", "faithful", fast, turns, [[PLACEHOLDER]] * images)
        assert faithful.input_ids == ours.input_ids
        assert faithful.labels == (labels or [IGNORE_INDEX] * len(ours.labels))
        if labels is not None:
            compared += 1
            assert ours.labels == labels

    compare()
    assert compared > 40


def test_the_two_treatments_differ_behind_an_answer(converted: Callable[[bool], Pair]) -> None:
    spans = TEMPLATES.get("v1").spans(talk(["a", "b", "c", "d"]))
    legacy, current = (encode(converted(flag)[0], spans).input_ids for flag in (True, False))
    assert legacy != current


def test_learned_tokens_are_the_answers(converted: Callable[[bool], Pair]) -> None:
    tokenizer, _ = converted(False)
    result = encode(tokenizer, TEMPLATES.get("v1").spans(talk(["<image>\na?", "red", "b?", "3 é"])))
    learned = [label for label in result.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "red</s> 3 é</s>"
    assert result.labels[0] == IGNORE_INDEX


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=40)
@given(caption=st.one_of(plain_text, st.sampled_from(["", "\n", " a", "字"])))
def test_plain_labels_are_caption_and_newline(
    converted: Callable[[bool], Pair], legacy: bool, caption: str
) -> None:
    fast, slow = converted(legacy)
    ours = encode(fast, TEMPLATES.get("plain").spans(talk(["<image>\nwhat?", caption])))
    expected = slow.with_images(f"<image>{caption}\n")
    assert [-200 if i == PLACEHOLDER else i for i in ours.input_ids] == expected
    assert ours.labels == [IGNORE_INDEX, IGNORE_INDEX, *expected[2:]]


def test_a_space_behind_an_image_follows_the_word_start(
    converted: Callable[[bool], Pair],
) -> None:
    for legacy in (True, False):
        fast, slow = converted(legacy)
        text = "<image> and <image>, a"
        ours = encode(fast, [Span(text)])
        assert [-200 if i == PLACEHOLDER else i for i in ours.input_ids] == slow.with_images(text)


def test_separators_come_from_the_tokenizer(converted: Callable[[bool], Pair]) -> None:
    for legacy in (True, False):
        fast, slow = converted(legacy)
        assert single_token_id(fast, "\n") == 13
        assert single_token_id(fast, ",") == slow.model.piece_to_id(",")
    with pytest.raises(UserError, match="image.comma_id"):
        single_token_id(build_demo_tokenizer(), "字字")


@pytest.mark.parametrize(("text", "images"), [("<image> and <image>", 1), ("none", 2)])
def test_miscounted_images_are_named(text: str, images: int) -> None:
    expected = f"has {text.count('<image>')} <image> but {images} images"
    with pytest.raises(UserError, match=expected):
        encode_spans(build_demo_tokenizer(), [Span(text)], [RUN] * images)


# --- cutting --------------------------------------------------------------------------------------


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    """Text and image runs in any order; images next to each other, at the ends, or none."""
    made = Encoding()
    for kind, length in draw(
        st.lists(st.tuples(st.booleans(), st.integers(1, 7)), min_size=1, max_size=8)
    ):
        if kind:
            made.add_image([PLACEHOLDER] * length)
        else:
            made.add(list(range(1, length + 1)), [True] * length)
    return made


@settings(max_examples=300)
@given(encodings(), st.integers(1, 60))
def test_a_cut_never_splits_an_image(made: Encoding, length: int) -> None:
    before = list(made.input_ids)
    runs = list(made.runs)
    tokens, images = made.cut(length, "drop")
    kept = len(before) - tokens
    assert made.input_ids == before[:kept] and len(made.labels) == kept
    assert made.runs == runs[: len(runs) - images]
    # What is kept has whole images only, and no less than a cut may keep.
    inside = [run for run in runs if run[0] < length < run[1]]
    assert kept == (inside[0][0] if inside else min(length, len(before)))
    assert made.input_ids.count(PLACEHOLDER) == sum(stop - start for start, stop in made.runs)


@settings(max_examples=200)
@given(encodings(), st.integers(1, 60))
def test_a_cut_refuses_to_lose_an_image(made: Encoding, length: int) -> None:
    before, runs = list(made.input_ids), list(made.runs)
    lost = sum(stop > length for _, stop in runs)
    if lost:
        with pytest.raises(UserError, match=f"{len(before)} tokens.*{lost} of {len(runs)} images"):
            made.cut(length, "error")
        assert made.input_ids == before and made.runs == runs
    else:
        assert made.cut(length, "error") == (max(len(before) - length, 0), 0)
        assert made.input_ids == before[:length]
