"""Generation under compression: cached, uncached, batched, with beams; every kind of model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, QWEN2, picture, tiny_parts
from test_mixed_visuals import IMAGES, MODELS, PROMPTS, TEXTS, TIE, VIDEOS, Parts, continue_prompt

from llava_uhd.config.model import CompressionConfig
from llava_uhd.errors import UserError

LAYERS = 3
# Layers before and inside the language model, the first one included, and each method.
OPTIONS = {
    "input": CompressionConfig("avgpool1d", -1, 3),
    "layer_0": CompressionConfig("avgpool1d", 0, 4),
    "layer_1": CompressionConfig("avgpool1d", 1, 2, "drop", "half"),
    "layer_2": CompressionConfig("avgpool1d", 2, 8),
    "squares": CompressionConfig("avgpool2d", 1, 4),
    "random": CompressionConfig("random_drop", 1, 2),
    "fastv": CompressionConfig("fastv", 2, 2),
}


@pytest.fixture(scope="module", params=MODELS)
def parts(request: pytest.FixtureRequest) -> Parts:
    options = {key: dict(value) for key, value in MODELS[request.param].items()}
    options["text"] |= {"num_hidden_layers": LAYERS}
    return tiny_parts(seed=5, **options)


@pytest.fixture(params=OPTIONS)
def compressed(request: pytest.FixtureRequest, parts: Parts) -> Parts:
    parts[0].config.compression = OPTIONS[request.param]
    return parts


def same(ours: tuple[torch.Tensor, list[torch.Tensor]], others: Any) -> int:
    """Compares new ids up to a tie of the two best logits; returns the number of ties."""
    for step, (one, two) in enumerate(zip(ours[0][0].tolist(), others[0][0].tolist(), strict=True)):
        if one != two:
            best = others[1][step][0].topk(2).values
            assert best[0] - best[1] < TIE, step
            return 1
    return 0


def test_a_batch_equals_its_rows(compressed: Parts) -> None:
    """Texts, images and videos mixed, padded at the left."""
    _, processor = compressed
    together = continue_prompt(compressed, processor(text=TEXTS, images=IMAGES, videos=VIDEOS))
    ties = 0
    for row, (text, images, videos) in enumerate(PROMPTS):
        alone = continue_prompt(compressed, processor(text=text, images=images, videos=videos))
        mine = together[0][row : row + 1], [scores[row : row + 1] for scores in together[1]]
        ties += same(mine, alone)
    assert ties <= 1


def test_without_a_cache(compressed: Parts) -> None:
    """Every step from the whole sequence gives the logits of the cached steps."""
    model, processor = compressed
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    for text, images, videos in PROMPTS[1:]:
        inputs = processor(text=text, images=images, videos=videos)
        cached, plain = (
            model.generate(**inputs, **options, use_cache=use, return_dict_in_generate=True)
            for use in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        for one, two in zip(cached.logits, plain.logits, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_beams(compressed: Parts) -> None:
    """Beams of a batch are those of its rows; one beam is greedy."""
    model, processor = compressed
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    rows = [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    texts, images, _ = (list(each) for each in zip(*rows, strict=True))
    inputs = processor(text=texts, images=images)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, (text, pictures, _) in enumerate(rows):
        inputs = processor(text=text, images=pictures)
        alone = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert together[row].tolist() == alone[0].tolist()


def test_caches_hold_what_the_layers_see(parts: Parts) -> None:
    """Fewer keys from the layer on: that is what is saved."""
    model, processor = parts
    model.config.compression = CompressionConfig("avgpool1d", 2, 4)
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert lengths[0] == lengths[1] == inputs["input_ids"].shape[1]
    assert lengths[2] == output.logits.shape[1] < lengths[1]


def test_the_setting_is_read_in_every_pass(parts: Parts) -> None:
    """No state is left behind, and an argument goes before the configuration."""
    model, processor = parts
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    off, some = CompressionConfig(), CompressionConfig("avgpool1d", 1, 2)
    model.config.compression = off
    with torch.no_grad():
        before = model(**inputs).logits
        argued = model(**inputs, compression=some).logits
        again = model(**inputs).logits
        model.config.compression = some
        configured = model(**inputs).logits
        overruled = model(**inputs, compression=off).logits
    assert torch.equal(before, again) and torch.equal(before, overruled)
    assert torch.equal(argued, configured) and argued.shape != before.shape
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, compression=off)
    model.config.compression = off
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_text_alone_is_untouched(compressed: Parts) -> None:
    model, processor = compressed
    inputs = processor(text=["A long text of several words.", "Short."])
    with torch.no_grad():
        shortened = model(**inputs).logits
        model.config.compression = CompressionConfig()
        assert torch.equal(shortened, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["mistral", "mistral_window", "qwen2_mixed", "qwen3"])
@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_other_language_models(kind: str, layer: int) -> None:
    """Sliding windows too: cached, uncached, batched and alone agree."""
    text: dict[str, Any] = {**LLAMA, "model_type": kind.partition("_")[0], "num_hidden_layers": 3}
    if kind == "qwen3":
        text["head_dim"] = 16
    if kind == "mistral_window":
        text["sliding_window"] = 9
    if kind == "qwen2_mixed":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        text |= {"use_sliding_window": True, "sliding_window": 9, "layer_types": kinds}
    model, processor = parts = tiny_parts(
        text, seed=2, projector={"type": "mlp2x_gelu"}, image={"strategy": "pad", "layout": "flat"}
    )
    model.config.compression = CompressionConfig("avgpool1d", layer, 3)
    shown, options = IMAGES[:3], {"max_new_tokens": 6, "do_sample": False}
    inputs = processor(text=TEXTS[:3], images=shown)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, (prompt, images) in enumerate(zip(TEXTS[:3], shown, strict=True)):
        inputs = processor(text=prompt, images=images)
        start = inputs["input_ids"].shape[1]
        alone, _ = continue_prompt(parts, inputs)
        plain = model.generate(**inputs, **options, use_cache=False)[:, start:]
        assert alone.tolist() == plain.tolist() == together[row : row + 1].tolist()


def test_answers_differ_from_uncompressed_ones() -> None:
    """What is compared above is not one and the same thing."""
    model, processor = tiny_parts(
        {**QWEN2, "num_hidden_layers": LAYERS},
        seed=5,
        projector={"type": "mlp2x_gelu"},
        image={"strategy": "pad", "layout": "flat"},
    )
    inputs = processor(text="<image>\nWhat is it?", images=[picture(96, 50)])
    found = []
    with torch.no_grad():
        for options in (CompressionConfig(), *OPTIONS.values()):
            found.append(model(**inputs, compression=options).logits[0, -1])
    for one, two in itertools.combinations(found, 2):
        assert (one - two).abs().max() > 1e-4


def test_what_is_refused(parts: Parts) -> None:
    model, processor = parts
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    for layer in (-1, 0):
        with pytest.raises(UserError, match="compression.layer"):
            model(**inputs, compression=CompressionConfig("fastv", layer, 2))
    with pytest.raises(ValueError, match="not available under compression"):
        model(**inputs, output_hidden_states=True, compression=CompressionConfig("avgpool1d", 1, 2))
    with pytest.raises(UserError, match="unknown compressor 'average'"):
        model(**inputs, compression=CompressionConfig("average", 1, 2))


# --- going on from a cache ------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_a_loop_of_ones_own(parts: Parts, layer: int) -> None:
    """Padded rows step by step; a step that does not say how the cache was filled is refused."""
    model, processor = parts
    some = CompressionConfig("avgpool1d", layer, 4)
    inputs = processor(text=TEXTS[:2], images=IMAGES[:2])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    maps = inputs.get("token_maps")
    runs = model.get_visual_runs(ids, inputs["view_grids"], maps)
    expected = model.generate(**inputs, compression=some, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        output = model(**inputs, compression=some, use_cache=True)
        for _ in range(4):
            new = output.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            step = {"attention_mask": mask, "past_key_values": output.past_key_values}
            for wrong in (
                {"compression": some},
                {"visual_runs": runs, "compression": CompressionConfig()},
                {"visual_runs": runs, "compression": CompressionConfig("avgpool1d", 1, 3)},
            ):
                with pytest.raises(ValueError, match="under another compression"):
                    model(input_ids=new, use_cache=True, **step, **wrong)
            output = model(
                input_ids=new, use_cache=True, visual_runs=runs, compression=some, **step
            )
    assert torch.equal(ids, expected)


def test_caches_that_cannot_be_gone_on_from(parts: Parts) -> None:
    model, processor = parts
    some = CompressionConfig("avgpool1d", 1, 4)
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    ids, maps = inputs["input_ids"], inputs.get("token_maps")
    runs = model.get_visual_runs(ids, inputs["view_grids"], maps)
    embeds = model.embed(ids, inputs["pixel_values"], inputs["view_grids"], token_maps=maps)
    options: dict[str, Any] = {"compression": some, "use_cache": True}
    with torch.no_grad():
        plain = model(input_ids=ids[:, :1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="under another compression"):
            model(inputs_embeds=embeds[:, 1:], past_key_values=plain, visual_runs=runs, **options)
        empty = runs[:, :0]
        first = model(inputs_embeds=embeds[:, :1], visual_runs=empty, **options).past_key_values
        with pytest.raises(ValueError, match="behind a cache cannot be shortened"):
            model(
                inputs_embeds=embeds[:, 1:],
                attention_mask=inputs["attention_mask"],
                past_key_values=first,
                visual_runs=runs,
                **options,
            )
    with pytest.raises(ValueError, match="a cache that grows"):
        model.generate(**inputs, compression=some, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("option", [CompressionConfig(), CompressionConfig("avgpool1d", 2, 4)])
def test_a_second_turn_goes_on_from_the_cache(parts: Parts, option: CompressionConfig) -> None:
    model, processor = parts
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    options: dict[str, Any] = {"compression": option, "max_new_tokens": 4, "do_sample": False}
    first = model.generate(**inputs, **options, return_dict_in_generate=True)
    asked = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    runs = model.get_visual_runs(asked, inputs["view_grids"], inputs.get("token_maps"))
    more = {"past_key_values": first.past_key_values, "visual_runs": runs}
    second = model.generate(asked, **more, **options)
    whole = model.generate(**{**inputs, "input_ids": asked, "attention_mask": None}, **options)
    assert torch.equal(second, whole)


def test_embeddings_say_where_their_images_are(parts: Parts) -> None:
    model, processor = parts
    model.config.compression = CompressionConfig("avgpool1d", 1, 4)
    inputs = processor(text="<image>\nWhat?", images=[picture(96, 50)])
    ids, maps = inputs["input_ids"], inputs.get("token_maps")
    embeds = model.embed(ids, inputs["pixel_values"], inputs["view_grids"], token_maps=maps)
    runs = model.get_visual_runs(ids, inputs["view_grids"], maps)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **options)[:, ids.shape[1] :]
    found = model.generate(inputs_embeds=embeds, visual_runs=runs, **options)
    assert torch.equal(found, expected)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="inputs_embeds need visual_runs"):
            call(inputs_embeds=embeds)
