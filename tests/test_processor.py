"""The processor: layout in the text, counts, truncation, shapes; checked against the published."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import picture, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import plan_slices
from llava_uhd.images.pixels import cut_views, open_image
from llava_uhd.text.encoding import IGNORE_INDEX
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn

QUERIES = 4


@pytest.fixture(scope="module")
def processor() -> LlavaUHDProcessor:
    return tiny_parts()[1]


def unbounded() -> LlavaUHDProcessor:
    return tiny_parts(image={"bounded": False})[1]


# --- golden ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(golden: Path) -> tuple[Path, LlavaUHDProcessor]:
    source = golden / "uhd_v1"
    tokenizer = AutoTokenizer.from_pretrained(source / "tiny_checkpoint")
    config = LlavaUHDConfig(image={"bounded": False})
    return source, LlavaUHDProcessor.from_parts(tokenizer, config)


def golden_cases(source: Path) -> list[dict[str, Any]]:
    cases = json.loads((source / "tiny_cases.json").read_text())["cases"]
    assert len(cases) == 9
    return cases


@pytest.mark.filterwarnings("ignore")
def test_golden_sequences_slices_and_pixels(published: tuple[Path, LlavaUHDProcessor]) -> None:
    source, processor = published
    tensors = load_file(source / "tiny_outputs.safetensors")
    placeholder = processor.image_token_id
    for case in golden_cases(source):
        key = case["key"]
        processor.image_config.long_side = 1024 if case["mode"] == "eval" else None
        image = open_image(source / case["image"])
        inputs = processor(text=case["prompt"], images=[image])
        ids = inputs["input_ids"][0].tolist()
        assert len(ids) == case["sequence_length"], key
        assert bool(inputs["attention_mask"].all())

        before = case["input_ids"].index(-200)
        after = case["input_ids"][before + 1 :]
        assert ids[:before] == case["input_ids"][:before], key
        assert ids[-len(after) :] == after, key
        layout = ids[before : -len(after)]
        assert len(layout) == case["visual_tokens"] == processor.num_image_tokens(*image.size), key
        assert [token for token in layout if token != placeholder] == case["ind_tokens"], key
        # Every separator stands right behind 144 placeholders of its slice.
        places = [place for place, token in enumerate(layout) if token != placeholder]
        assert places == [145 * (index + 1) - 1 for index in range(len(places))], key

        resized = image.resize(tuple(case["size_after_pre_resize"]), Image.Resampling.BICUBIC)
        plan = plan_slices(*resized.size)
        assert plan.grid == (tuple(case["grid"]) if case["grid"] else None), key
        assert plan.overview_size == tuple(case["overview_size"]), key
        views = cut_views(resized if case["mode"] == "eval" else image, plan)
        digests = [hashlib.sha256(view.tobytes()).hexdigest() for view in views]
        assert digests == [*case["sha256_slices"], case["sha256_overview"]], key

        rows, columns = inputs["view_grids"][-1].tolist()
        patches = inputs["pixel_values"][-rows * columns :].reshape(rows, columns, 3, 14, 14)
        overview = patches.permute(2, 0, 3, 1, 4).reshape(1, 3, rows * 14, columns * 14)
        probe = overview[:, :, ::37, ::41][:, :, :3, :3]
        assert (probe - tensors[f"{key}.pixel_probe"]).abs().max() <= 1e-6, key
    processor.image_config.long_side = None


def test_llama_vocabularies_get_the_published_separators(
    published: tuple[Path, LlavaUHDProcessor],
) -> None:
    _, processor = published
    image = processor.image_config
    comma = processor.tokenizer.convert_tokens_to_ids(",")
    assert (image.newline_id, image.comma_id) == (13, comma)
    assert image.image_token_id == 400  # the vocabulary ends at 399


# --- layout ---------------------------------------------------------------------------------------


def layout(processor: LlavaUHDProcessor, size: tuple[int, int]) -> str:
    """The sequence of one image as a picture: ``#`` for a view, ``,`` and ``/`` for separators."""
    ids = processor(text="<image>", images=[Image.new("RGB", size)])["input_ids"][0].tolist()
    config = processor.image_config
    names = {config.image_token_id: "#", config.comma_id: ",", config.newline_id: "/"}
    text = "".join(names.get(token, "") for token in ids)
    return text.replace("#" * QUERIES, "#")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), "#"),
        ((64, 32), "#,#/#"),
        ((32, 64), "#/#/#"),
        ((64, 64), "#,#/#,#/#"),
        ((96, 64), "#,#,#/#,#,#/#"),
        ((64, 96), "#,#/#,#/#,#/#"),
    ],
)
def test_separators_stand_behind_each_slice(
    processor: LlavaUHDProcessor, size: tuple[int, int], expected: str
) -> None:
    assert layout(processor, size) == expected


def test_several_images_anywhere_in_the_text(processor: LlavaUHDProcessor) -> None:
    pictures = [picture(30, 30, 1), picture(64, 32, 2), picture(20, 50, 3)]
    text = "<image>first<image><image>last"
    inputs = processor(text=text, images=pictures)
    counts = [processor.num_image_tokens(*image.size) for image in pictures]
    bare = processor(text="first")["input_ids"].shape[1]
    assert inputs["input_ids"].shape[1] == (
        sum(counts) + bare + processor(text="last")["input_ids"].shape[1] - 1
    )
    assert inputs["view_grids"].shape == (1 + 3 + (counts[2] + 1) // (QUERIES + 1), 2)
    alone = [processor(text="<image>", images=[image])["pixel_values"] for image in pictures]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))


def test_text_alone_has_no_pixels(processor: LlavaUHDProcessor) -> None:
    inputs = processor(text=["one two", "three"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].sum(1).tolist() == [3, 2]
    assert inputs["input_ids"][1, 0] == processor.tokenizer.pad_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(processor: LlavaUHDProcessor, side: str) -> None:
    texts, image = ["<image>one", "two"], picture(32, 32)
    batch = processor(text=texts, images=[image], padding_side=side)
    for row, text in enumerate(texts):
        alone = processor(text=text, images=[image] if row == 0 else None)["input_ids"][0]
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == (
            alone.tolist()
        )
    gap = batch["attention_mask"][1]
    assert (gap[0] == 0) == (side == "left") and (gap[-1] == 0) == (side == "right")


def test_images_may_be_nested_per_text(processor: LlavaUHDProcessor) -> None:
    one, two, three = (picture(32, 32, seed) for seed in range(3))
    texts = ["<image>a<image>", "none", "<image>"]
    flat = processor(text=texts, images=[one, two, three])
    nested = processor(text=texts, images=[[one, two], [], [three]])
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ("<image> and the text <image>", 1, "2 <image> but 1 images"),
        ("no marker", 1, "0 <image> but 1 images"),
        ("<image>", 0, "1 <image> but 0 images"),
    ],
)
def test_miscounts_name_both_numbers(
    processor: LlavaUHDProcessor, text: str, number: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        processor(text=text, images=[picture(32, 32)] * number)
    turns = [Turn("human", text), Turn("gpt", "answer")]
    with pytest.raises(UserError, match=message):
        processor.encode_conversation(turns, [picture(32, 32)] * number)


def test_nested_miscounts_name_the_numbers(processor: LlavaUHDProcessor) -> None:
    one = picture(32, 32)
    with pytest.raises(UserError, match="2 texts but 1 lists"):
        processor(text=["<image>", "a"], images=[[one]])
    with pytest.raises(UserError, match="1 <image> but 2 images"):
        processor(text=["<image>", "<image>"], images=[[one, one], []])


def test_no_user_text_makes_a_placeholder_but_the_marker(processor: LlavaUHDProcessor) -> None:
    tokenizer = processor.tokenizer
    assert processor.image_token_id is not None
    vocabulary = tiny_parts()[0].config.text_config.vocab_size
    assert processor.image_token_id >= vocabulary
    for text in ("<Image>", "< image>", "<image", "image>", "&lt;image>", "<imag\u200be>"):
        assert processor.image_token_id not in tokenizer(text)["input_ids"]


def test_refusals(processor: LlavaUHDProcessor) -> None:
    for nothing in (None, []):
        with pytest.raises(UserError, match="needs text"):
            processor(text=nothing, images=[picture(9, 9)])
    with pytest.raises(UserError, match="videos"):
        processor(text="a", videos=[1])
    with pytest.raises(UserError, match="https://x.test/a.png"):
        processor(text="<image>", images=["https://x.test/a.png"])
    with pytest.raises(UserError, match="padding_side"):
        processor(text="a", padding_side="up")
    with pytest.raises(UserError, match="overlong"):
        processor.encode_conversation([Turn("human", "a"), Turn("gpt", "b")], overlong="cut")
    with pytest.raises(UserError, match=r"missing\.png"):
        processor(text="<image>", images=["missing.png"])


def test_begin_token_can_be_left_out(processor: LlavaUHDProcessor) -> None:
    with_begin = processor(text="one")["input_ids"][0].tolist()
    without = processor(text="one", add_special_tokens=False)["input_ids"][0].tolist()
    assert with_begin == [processor.tokenizer.bos_token_id, *without]


# --- counts ---------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(1, 6000), st.integers(1, 6000), st.booleans(), st.booleans())
def test_counts_follow_the_geometry(
    width: int, height: int, bounded: bool, overview_only: bool
) -> None:
    processor = COUNTERS[bounded]
    plan = plan_slices(width, height, 7, 336, 14, bounded=bounded)
    expected = QUERIES if overview_only else plan.num_views * QUERIES + plan.num_slices
    assert processor.num_image_tokens(width, height, overview_only) == expected


COUNTERS = {
    bounded: tiny_parts(image={"scale_resolution": 336, "patch_size": 14, "bounded": bounded})[1]
    for bounded in (True, False)
}


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (97, 31), (200, 150), (5, 4000)])
def test_counts_equal_the_encoding(bounded: bool, size: tuple[int, int]) -> None:
    processor = tiny_parts(image={"bounded": bounded})[1]
    inputs = processor(text="<image>", images=[Image.new("RGB", size)])
    counted = processor.num_image_tokens(*size)
    assert inputs["input_ids"].shape[1] == counted + 1
    sizes = inputs["view_grids"].prod(1)
    assert int(sizes.sum()) == inputs["pixel_values"].shape[0]
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert placeholders == QUERIES * len(sizes) and counted == placeholders + len(sizes) - 1


def test_pre_resize_is_part_of_the_count() -> None:
    processor = tiny_parts(image={"long_side": 100})[1]
    inputs = processor(text="<image>", images=[picture(30, 20)])
    assert inputs["input_ids"].shape[1] == processor.num_image_tokens(30, 20) + 1
    resized = picture(30, 20).resize((100, 66), Image.Resampling.BICUBIC)
    expected = tiny_parts()[1](text="<image>", images=[resized])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


# --- training samples -----------------------------------------------------------------------------

TURNS = [
    Turn("human", "<image>\nWhat is it? <image>"),
    Turn("gpt", "red circle"),
    Turn("human", "And this? <image>"),
    Turn("gpt", "blue"),
]
SIZES = [(64, 32), (30, 30), (32, 96)]


@pytest.fixture(scope="module")
def sample(processor: LlavaUHDProcessor) -> dict[str, Any]:
    return processor.encode_conversation(TURNS, [picture(*size) for size in SIZES])


def test_labels_are_answers(processor: LlavaUHDProcessor, sample: dict[str, Any]) -> None:
    labels, ids = sample["labels"], sample["input_ids"]
    learned = labels != IGNORE_INDEX
    assert torch.equal(labels[learned], ids[learned])
    text = processor.tokenizer.decode(ids[learned])
    assert text.replace(" ", "") == "redcircle</s>blue</s>"
    assert sample["num_visual_tokens"] == int((ids == processor.image_token_id).sum())
    assert (sample["dropped_images"], sample["truncated_tokens"]) == (0, 0)


def image_runs(processor: LlavaUHDProcessor, ids: torch.Tensor) -> list[tuple[int, int]]:
    """Where the three images of `TURNS` lie, from their counts alone."""
    runs, start = [], 0
    for size in SIZES:
        first = ids[start:].tolist().index(processor.image_token_id) + start
        start = first + processor.num_image_tokens(*size)
        runs.append((first, start))
    return runs


def test_every_cut_keeps_whole_images(processor: LlavaUHDProcessor, sample: dict[str, Any]) -> None:
    ids, pictures = sample["input_ids"], [picture(*size) for size in SIZES]
    runs = image_runs(processor, ids)
    borders = [place for run in runs for place in run]
    assert borders[-1] < len(ids)
    places = {place + step for place in borders for step in (-1, 0, 1)} | {1, len(ids) - 1}
    for length in sorted(places):
        lost = sum(stop > length for _, stop in runs)
        if lost:
            with pytest.raises(UserError, match=f"{len(ids)} tokens.*lose {lost} of 3"):
                processor.encode_conversation(TURNS, pictures, max_length=length)
        cut = processor.encode_conversation(TURNS, pictures, max_length=length, overlong="drop")
        inside = [start for start, stop in runs if start < length < stop]
        kept = inside[0] if inside else length
        assert torch.equal(cut["input_ids"], ids[:kept]), length
        assert torch.equal(cut["labels"], sample["labels"][:kept]), length
        assert (cut["dropped_images"], cut["truncated_tokens"]) == (lost, len(ids) - kept)
        assert cut["num_visual_tokens"] == int((ids[:kept] == processor.image_token_id).sum())
        views = 0 if lost == 3 else cut["view_grids"].shape[0]
        assert views * QUERIES == cut["num_visual_tokens"]
        if lost == 3:
            assert "pixel_values" not in cut
        else:
            patches = int(cut["view_grids"].prod(1).sum())
            assert torch.equal(cut["pixel_values"], sample["pixel_values"][:patches])


def test_overview_only_has_no_slices(processor: LlavaUHDProcessor) -> None:
    turns = [Turn("human", "<image>"), Turn("gpt", "a")]
    image = picture(96, 64)
    whole = processor.encode_conversation(turns, [image])
    overview = processor.encode_conversation(turns, [image], overview_only=True)
    assert overview["view_grids"].tolist() == whole["view_grids"][-1:].tolist()
    patches = overview["pixel_values"].shape[0]
    assert torch.equal(overview["pixel_values"], whole["pixel_values"][-patches:])


# --- the library's interface ----------------------------------------------------------------------


def test_save_and_load(processor: LlavaUHDProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for loaded in (
        LlavaUHDProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, LlavaUHDProcessor)
        assert loaded.image_config == processor.image_config
        assert loaded.projector_config == processor.projector_config
        assert loaded.template_name == processor.template_name
        assert loaded.chat_template == processor.chat_template
        given = {"text": "<image>\nWhat, then?", "images": [picture(64, 40)]}
        before, after = processor(**given), loaded(**given)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_chat_template_with_images(processor: LlavaUHDProcessor) -> None:
    def content(image: Image.Image) -> list[dict[str, Any]]:
        return [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]

    one, two = picture(32, 32), picture(64, 32)
    talks = [[{"role": "user", "content": content(image)}] for image in (one, two)]
    text = processor.template.spans([Turn("human", "<image>\nWhat?")], generate=True)
    prompt = "".join(span.text for span in text)
    for messages, images in ((talks[0], [one]), (talks, [one, two])):
        made = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        expected = processor(text=[prompt] * len(images), images=images)
        assert set(made) == set(expected)
        assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_unknown_settings_are_named(processor: LlavaUHDProcessor) -> None:
    with pytest.raises(UserError, match="image_config.max_slice.*max_slices"):
        LlavaUHDProcessor(processor.tokenizer, {"max_slice": 3})
    with pytest.raises(UserError, match="square number"):
        LlavaUHDProcessor(processor.tokenizer, {}, {"num_queries": 5}).num_image_tokens(9, 9)
