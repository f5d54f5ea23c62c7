"""Generation: batches, beams, sampling, caches; each against the plainest way to do the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, QWEN2, picture, tiny_parts

from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor

Parts = tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]
NEW = 8

# Zero, one and two images in a row; slices and none; a long and a short text.
TEXTS = [
    "USER: How many? ASSISTANT:",
    "USER: <image>\nWhat does the sign say? ASSISTANT:",
    "USER: <image> and <image>: which is red? ASSISTANT:",
    "<image>",
]
SIZES = [[], [(96, 64)], [(20, 30), (64, 32)], [(30, 30)]]
IMAGES = [[picture(*size, seed) for seed, size in enumerate(row)] for row in SIZES]


@pytest.fixture(scope="module", params=[LLAMA, QWEN2], ids=["llama", "qwen2"])
def parts(request: pytest.FixtureRequest) -> Parts:
    return tiny_parts(request.param, seed=3)


def generate(model: LlavaUHDForConditionalGeneration, inputs: Any, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options)


def one_by_one(parts: Parts, **options: Any) -> list[list[int]]:
    """New ids of each text, generated alone."""
    model, processor = parts
    answers = []
    for text, images in zip(TEXTS, IMAGES):
        inputs = processor(text=text, images=images)
        ids = generate(model, inputs, **options)
        prompt = inputs["input_ids"].shape[1]
        assert torch.equal(ids[:, :prompt], inputs["input_ids"])
        answers += ids[:, prompt:].tolist()
    return answers


def all_at_once(parts: Parts, **options: Any) -> list[list[int]]:
    model, processor = parts
    inputs = processor(text=TEXTS, images=IMAGES)
    assert inputs["attention_mask"].sum(1).unique().numel() == len(TEXTS)
    ids = generate(model, inputs, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def by_hand(parts: Parts, text: str, images: list[Any]) -> list[int]:
    """Greedy decoding without ``generate`` and without a cache."""
    model, processor = parts
    inputs = dict(processor(text=text, images=images))
    new: list[int] = []
    for _ in range(NEW):
        with torch.no_grad():
            new.append(int(model(**inputs).logits[0, -1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[new[-1]]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return new


def test_answers_differ_and_follow_the_images(parts: Parts) -> None:
    model, processor = parts
    answers = one_by_one(parts)
    assert len({tuple(answer) for answer in answers}) == len(answers)
    other = processor(text=TEXTS[1], images=[picture(96, 64, 9)])
    start = other["input_ids"].shape[1]
    assert generate(model, other)[0, start:].tolist() != answers[1]


def test_greedy_equals_a_loop_of_forward_passes(parts: Parts) -> None:
    expected = [by_hand(parts, text, images) for text, images in zip(TEXTS, IMAGES)]
    assert one_by_one(parts) == expected
    assert all_at_once(parts) == expected


def test_without_a_cache(parts: Parts) -> None:
    assert all_at_once(parts, use_cache=False) == one_by_one(parts)


@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search(parts: Parts, beams: int) -> None:
    expected = one_by_one(parts, num_beams=beams)
    assert all_at_once(parts, num_beams=beams) == expected
    assert all_at_once(parts, num_beams=beams, use_cache=False) == expected


def test_beams_find_a_likelier_answer(parts: Parts) -> None:
    """More beams than one do what they are for, so the rows above were real beams."""
    model, processor = parts
    inputs = processor(text=TEXTS[2], images=IMAGES[2])
    scores = []
    for beams in (1, 4):
        ids = generate(model, inputs, num_beams=beams)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            steps = model(**whole).logits[0].log_softmax(-1)[:-1]
        chosen = steps.gather(1, ids[0, 1:, None].clamp(max=steps.shape[1] - 1))
        scores.append(float(chosen[-NEW:].sum()))
    assert scores[1] >= scores[0]


def test_several_answers_per_prompt(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text=TEXTS[2:], images=IMAGES[2:])
    torch.manual_seed(0)
    ids = generate(model, inputs, do_sample=True, num_return_sequences=3, top_k=0)
    assert ids.shape == (6, inputs["input_ids"].shape[1] + NEW)
    assert len({tuple(row) for row in ids.tolist()}) == 6
    greedy = generate(model, inputs, num_beams=3, num_return_sequences=3)
    assert greedy.shape == ids.shape


def test_processors_that_read_the_prompt(parts: Parts) -> None:
    """They index scores by the prompt's ids, and the placeholder's lies outside the vocabulary."""
    model, processor = parts
    assert processor.image_token_id == model.config.text_config.vocab_size
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    expected = one_by_one(parts, **options)
    plain = one_by_one(parts)
    assert all_at_once(parts, **options, num_beams=1) == expected
    for answer in expected:
        pairs = list(itertools.pairwise(answer))
        assert len(set(pairs)) == len(pairs)
    assert expected != plain or len({len(set(row)) for row in plain}) == 1
    torch.manual_seed(0)
    first = all_at_once(parts, do_sample=True, temperature=0.7, top_p=0.9, **options)
    torch.manual_seed(0)
    assert all_at_once(parts, do_sample=True, temperature=0.7, top_p=0.9, **options) == first


def test_bad_words_and_encoder_penalties_do_not_fail(parts: Parts) -> None:
    answers = one_by_one(parts, bad_words_ids=[[5, 6]], encoder_repetition_penalty=1.2)
    assert len(answers) == len(TEXTS)


def test_the_placeholder_is_never_generated() -> None:
    """A vocabulary larger than the tokenizer's holds a row for the placeholder's id."""
    size = tiny_parts()[0].config.text_config.vocab_size
    model, processor = parts = tiny_parts({**LLAMA, "vocab_size": size + 8}, seed=3)
    placeholder = processor.image_token_id
    assert placeholder is not None and placeholder < model.config.text_config.vocab_size
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        hidden = model.language_model.model(
            inputs_embeds=model.embed(processor(text=TEXTS[0])["input_ids"])
        ).last_hidden_state[0, -1]
        head[placeholder] = 10 * hidden  # by far the likeliest token
        assert int(model(**processor(text=TEXTS[0])).logits[0, -1].argmax()) == placeholder
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"do_sample": True}):
        assert not any(placeholder in answer for answer in one_by_one(parts, **options)), options


def test_from_embeddings(parts: Parts) -> None:
    model, processor = parts
    expected = one_by_one(parts)
    for row, (text, images) in enumerate(zip(TEXTS, IMAGES)):
        inputs = processor(text=text, images=images)
        pixels = {key: inputs[key] for key in ("pixel_values", "view_grids") if key in inputs}
        with torch.no_grad():
            embeddings = model.embed(inputs["input_ids"], **pixels)
        new = generate(
            model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
        )
        assert new.tolist() == [expected[row]]


def test_embeddings_and_pixels_exclude_each_other(parts: Parts) -> None:
    model, processor = parts
    inputs = dict(processor(text=TEXTS[1], images=IMAGES[1]))
    with torch.no_grad():
        embeddings = model.embed(**{k: v for k, v in inputs.items() if k != "attention_mask"})
    inputs.pop("input_ids")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="inputs_embeds"):
            call(inputs_embeds=embeddings, **inputs)


def test_from_features(parts: Parts) -> None:
    model, processor = parts
    inputs = dict(processor(text=TEXTS, images=IMAGES))
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("view_grids"))
    for beams in (1, 2):
        ids = generate(model, {**inputs, "image_features": features}, num_beams=beams)
        found = ids[:, inputs["input_ids"].shape[1] :].tolist()
        assert found == one_by_one(parts, num_beams=beams)


def test_images_are_encoded_once(parts: Parts) -> None:
    model, processor = parts
    calls: list[int] = []
    handle = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    inputs = processor(text=TEXTS, images=IMAGES)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        calls.clear()
        generate(model, inputs, **options)
        assert calls == [1], options
    handle.remove()


def test_decoding_skips_the_placeholders(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text=TEXTS[1], images=IMAGES[1])
    ids = generate(model, inputs)[0]
    text = processor.decode(ids, skip_special_tokens=True)
    assert "<image>" not in text and "What does the sign say?" in text


def test_output_object_and_stop_token(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text=TEXTS[1], images=IMAGES[1])
    third = one_by_one(parts)[1][2]
    output = generate(
        model, inputs, return_dict_in_generate=True, output_scores=True, eos_token_id=third
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert new == one_by_one(parts)[1][: new.index(third) + 1]
    assert len(output.scores) == len(new)
