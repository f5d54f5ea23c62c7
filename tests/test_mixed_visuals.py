"""Images and videos mixed in one conversation and in one batch, for every way to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import LLAMA, QWEN2, picture, tiny_parts
from PIL import Image
from test_anyres import SIGLIP, TILES

from llava_uhd.data.collator import Collator
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn

Parts = tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]
NEW = 6
# Two best logits closer than this may change places between a batch and a single prompt.
TIE = 1e-4

MODELS: dict[str, dict[str, Any]] = {
    "llava_1_5": {
        "text": LLAMA,
        "projector": {"type": "mlp2x_gelu"},
        "image": {"strategy": "pad", "layout": "flat"},
    },
    "onevision": {
        "text": QWEN2,
        "vision": SIGLIP,
        "projector": {"type": "mlp2x_gelu"},
        "image": TILES,
        "video": {"pool_stride": 2, "strategy": "squeeze"},
    },
    "onevision_grid": {
        "text": QWEN2,
        "projector": {"type": "pixel_unshuffle_mlp"},
        "image": TILES,
        "video": {"pool_stride": 2, "newline": "grid", "pool_mode": "average"},
    },
    "uhd": {"text": LLAMA, "image": {}},
    "uhd_rows": {"text": LLAMA, "image": {"layout": "rows"}},
}


def film(frames: int, seed: int) -> list[Image.Image]:
    return [picture(40, 24, seed + index) for index in range(frames)]


# Text -> images and videos in the order of their own markers.
PROMPTS: list[tuple[str, list[Any], list[Any]]] = [
    ("How many?", [], []),
    ("<image>\nWhat is it?", [picture(96, 50)], []),
    ("<image> and <image>: which?", [picture(20, 30, 1), picture(64, 32, 2)], []),
    ("<video>\nWhat happens?", [], [film(4, 3)]),
    ("<image> then <video> then <image>.", [picture(30, 30, 4), picture(9, 70, 5)], [film(2, 6)]),
    ("<video> or <video>?", [], [film(1, 7), film(3, 8)]),
]
TEXTS = [text for text, _, _ in PROMPTS]
IMAGES = [images for _, images, _ in PROMPTS]
VIDEOS = [videos for _, _, videos in PROMPTS]


@pytest.fixture(scope="module", params=MODELS)
def parts(request: pytest.FixtureRequest) -> Parts:
    options = {key: dict(value) for key, value in MODELS[request.param].items()}
    return tiny_parts(seed=5, **options)


def continue_prompt(parts: Parts, inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """New ids (B, NEW), and the scores of each step (B, vocabulary)."""
    output = parts[0].generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], list(output.logits)


def test_a_batch_equals_its_rows(parts: Parts) -> None:
    """Token by token, up to ties; ties are counted."""
    _, processor = parts
    together, _ = continue_prompt(parts, processor(text=TEXTS, images=IMAGES, videos=VIDEOS))
    ties = 0
    for row, (text, images, videos) in enumerate(PROMPTS):
        alone, scores = continue_prompt(parts, processor(text=text, images=images, videos=videos))
        for step in range(NEW):
            if together[row, step] != alone[0, step]:
                best = scores[step][0].topk(2).values
                assert best[0] - best[1] < TIE, (text, step)
                ties += 1
                break
    assert ties <= 1


def test_answers_depend_on_what_is_shown(parts: Parts) -> None:
    model, processor = parts
    text, images, videos = PROMPTS[4]
    seen = []
    for changed in (
        (images, videos),
        ([picture(30, 30, 90), images[1]], videos),
        ([images[0], picture(9, 70, 91)], videos),
        (images, [film(2, 92)]),
    ):
        inputs = processor(text=text, images=changed[0], videos=changed[1])
        with torch.no_grad():
            seen.append(model(**inputs).logits[0, -1])
    for index, other in enumerate(seen[1:]):
        assert (seen[0] - other).abs().max() > 1e-3, index


def test_markers_take_their_own_visuals_in_order(parts: Parts) -> None:
    """``<video> <image>`` is not ``<image> <video>``, and counts follow the marker."""
    _, processor = parts
    image, frames = picture(60, 30), film(3, 1)
    first = processor(text="<image> <video>", images=[image], videos=[frames])
    second = processor(text="<video> <image>", images=[image], videos=[frames])
    views = first["view_grids"].shape[0] - 3
    assert torch.equal(first["view_grids"][:views], second["view_grids"][3:])
    count = processor.num_image_tokens(60, 30) + processor.num_video_tokens(3, 40, 24)
    words = processor(text=" ")["input_ids"].shape[1]
    assert count < first["input_ids"].shape[1] <= count + words + 4


def test_samples_in_one_batch_equal_single_ones(parts: Parts) -> None:
    """Losses and gradients of a padded batch against its samples one by one."""
    model, processor = parts
    model.train()
    samples = [
        processor.encode_conversation(
            [Turn("human", text), Turn("gpt", "A red sign.")], images, videos
        )
        for text, images, videos in PROMPTS
    ]
    batches = [Collator(0)(samples), *(Collator(0)([sample]) for sample in samples)]
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
        found.append((float(loss), {n: p.grad.clone() for n, p in model.named_parameters()}))
    model.eval()
    assert found[0][0] == pytest.approx(sum(loss for loss, _ in found[1:]), rel=1e-5)
    for name, gradient in found[0][1].items():
        total = sum(gradients[name] for _, gradients in found[1:])
        bound = 1e-4 * float(gradient.abs().max()) + 1e-5
        assert float((gradient - total).abs().max()) <= bound, name


def test_every_sample_reaches_every_part(parts: Parts) -> None:
    """Gradients exist on every rank, whatever it was given: text, images or videos."""
    model, processor = parts
    model.train()
    for text, images, videos in PROMPTS[:4]:
        sample = processor.encode_conversation(
            [Turn("human", text), Turn("gpt", "Yes.")], images, videos
        )
        model.zero_grad()
        model(**Collator(0)([sample])).loss.backward()
        missing = [name for name, each in model.named_parameters() if each.grad is None]
        assert not missing, (text, missing)
    model.eval()


def test_saved_and_loaded(parts: Parts, tmp_path: Path) -> None:
    """Same logits; the newline and every setting of videos survive."""
    from llava_uhd.checkpoint.load import load_pretrained

    for part in parts:
        part.save_pretrained(tmp_path)
    model, processor = load_pretrained(tmp_path)
    assert processor.video_config == parts[1].video_config
    text, images, videos = PROMPTS[4]
    logits = []
    for each, reader in (parts, (model, processor)):
        with torch.no_grad():
            logits.append(each(**reader(text=text, images=images, videos=videos)).logits)
    assert torch.equal(*logits)
    assert (model.image_newline is None) == (model.config.image.layout != "unpad")


def test_wrong_numbers_are_told(parts: Parts) -> None:
    _, processor = parts
    with pytest.raises(UserError, match="has 1 <video> but 2 videos are given"):
        processor(text="<video>", videos=[film(1, 0), film(1, 1)])
    with pytest.raises(UserError, match="has a <video> but no video is given"):
        processor(text="<video>")
    with pytest.raises(UserError, match="has 2 <image> but 1 images are given"):
        processor(text="<image> <image>", images=[picture(9, 9)])
    turns = [Turn("human", "<image> <video>"), Turn("gpt", "Yes.")]
    with pytest.raises(UserError, match="has 1 <video> but 2 videos"):
        processor.encode_conversation(turns, [picture(9, 9)], [film(1, 0), film(1, 1)])


def test_video_is_a_word_where_none_is_shown(parts: Parts) -> None:
    """Texts about web pages are full of the tag."""
    _, processor = parts
    turns = [Turn("human", "What does <video> do?"), Turn("gpt", "It plays <video> files.")]
    sample = processor.encode_conversation(turns)
    assert sample["num_visual_tokens"] == 0 and "pixel_values" not in sample
    assert "<video>" in processor.decode(sample["input_ids"])


def test_one_video_of_frames_needs_no_second_list(parts: Parts) -> None:
    _, processor = parts
    frames = film(2, 0)
    nested = processor(text="<video>", videos=[frames])
    flat = processor(text="<video>", videos=frames)
    assert torch.equal(nested["pixel_values"], flat["pixel_values"])
