"""To transformers' own classes and back: weights, configurations, logits, pixels, ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import Parts, assert_same, copy, save
from fixtures_llava import (
    NEXT,
    ONE_VIEW,
    ONEVISION,
    POOLED,
    QWEN2,
    QWEN3,
    SIDE,
    SYSTEMS,
    make,
    prompts,
    tower,
)
from fixtures_tiny import LLAMA
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from llava_uhd.checkpoint.agreement import knows_videos, library_inputs
from llava_uhd.checkpoint.export import ExportOptions, export_checkpoint
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.published import LIBRARY, find_layout, our_key
from llava_uhd.checkpoint.shapes import describe_checkpoint
from llava_uhd.errors import UserError

CLASSES: dict[str, Any] = {
    "llava_1_5": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
KINDS = {"llava_1_5": "llava", "llava_next": "llava_next", "llava_onevision": "llava_onevision"}
QUIET = ExportOptions(check=False)


def largest(ours: Parts, library: Any) -> float:
    """Largest difference of logits of our model and a class of transformers, on all prompts."""
    model, processor = ours
    worst = 0.0
    for text, given in prompts(knows_videos(processor)):
        inputs = processor(text=text, **given)
        with torch.no_grad():
            first = model(**inputs).logits
            second = library(**library_inputs(library.config, processor, text, given)).logits
        words = min(first.shape[-1], second.shape[-1])
        worst = max(worst, float((first[..., :words] - second[..., :words]).abs().max()))
    return worst


# --- out ------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, options) for name, options in SYSTEMS.items()},
    "square": ("llava_1_5", {"image": {**ONE_VIEW, "strategy": "square"}}),
    "siglip pad": ("llava_1_5", {"siglip": True, "text": QWEN2, "template": "qwen_1_5"}),
    "siglip squeeze": ("llava_1_5", {"siglip": True, "image": {**ONE_VIEW, "strategy": "squeeze"}}),
    "last layer": ("llava_1_5", {"select_layer": -1}),
    "qwen3": ("llava_1_5", {"text": QWEN3, "template": "qwen_1_5"}),
    "scaled positions": ("llava_1_5", {"text": {**LLAMA, "rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}}),
    "next with siglip": ("llava_next", {"image": NEXT, "siglip": True}),
    "tied": ("llava_onevision", {**SYSTEMS["llava_onevision"],
                                 "text": {**QWEN2, "tie_word_embeddings": True}}),
    "onevision with clip": ("llava_onevision", {"image": ONEVISION, "video": POOLED}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    """Its class reads every weight, and agrees on text, images, several images and videos."""
    system, options = MODELS[name]
    parts = make(**options)
    done = export_checkpoint(save(tmp_path / "ours", parts), "transformers", tmp_path / "out")
    assert done.agreement is not None and done.agreement.difference <= 1e-4
    assert ("video" in done.agreement.prompts) == (system == "llava_onevision")
    library, report = CLASSES[system].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert library.config.model_type == KINDS[system]
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    language = parts[0].language_model
    assert text["architectures"] == [type(language).__name__]
    assert largest(parts, library.eval()) <= 1e-4
    again = load_pretrained(tmp_path / "out")
    assert largest(again, library) <= 1e-4
    for (text, given), (_, same) in zip(
        prompts(knows_videos(parts[1])), prompts(knows_videos(again[1])), strict=True
    ):
        first, second = parts[1](text=text, **given), again[1](text=text, **same)
        assert torch.equal(first["input_ids"], second["input_ids"])
        with torch.no_grad():
            ours, theirs = parts[0](**first).logits, again[0](**second).logits
        assert (ours - theirs[..., : ours.shape[-1]]).abs().max() <= 1e-5
    image, own = again[0].config.image, parts[0].config.image
    for key in ("strategy", "layout", "max_tiles", "scale_resolution", "mean", "std", "pinpoints"):
        assert getattr(image, key) == getattr(own, key), key
    assert again[1].template_name == parts[1].template_name


@pytest.mark.parametrize("name", ["llava_1_5", "llava_onevision"])
def test_golden_round_trip(name: str, golden: Path, tmp_path: Path) -> None:
    """Original, ours, transformers, ours, original: the same logits within 1e-5 all the way."""
    folder = golden / name / "model/checkpoint"
    steps = [("llava_uhd", "ours"), ("transformers", "library"), ("llava_uhd", "again"),
             ("original", "original")]  # fmt: skip
    places = [folder]
    for target, place in steps:
        done = export_checkpoint(places[-1], target, tmp_path / place)
        assert done.agreement is not None and done.agreement.difference <= 1e-5
        places.append(tmp_path / place)
    assert done.layout == name
    # From one end to the other, with every kind of prompt.
    first, last = load_pretrained(folder), load_pretrained(places[-1])
    for text, given in prompts(knows_videos(first[1])):
        a, b = first[1](text=text, **given), last[1](text=text, **given)
        assert torch.equal(a["input_ids"], b["input_ids"])
        with torch.no_grad():
            ours, theirs = first[0](**a).logits, last[0](**b).logits
        assert (ours - theirs[..., : ours.shape[-1]]).abs().max() <= 1e-5
    library = CLASSES[name].from_pretrained(tmp_path / "library").eval()
    assert largest(first, library) <= 1e-4


def test_tables_grow_for_the_placeholders(tmp_path: Path) -> None:
    """By the mean row, which never wins; a table that has room for them stays as it is."""
    parts = make()
    words = parts[0].config.text_config.vocab_size
    export_checkpoint(save(tmp_path / "ours", parts), "transformers", tmp_path / "out", QUIET)
    values = json.loads((tmp_path / "out/config.json").read_text())
    rows = values["text_config"]["vocab_size"]
    assert values["image_token_index"] == words and rows % 64 == 0 and 0 < rows - words <= 64
    state = load_file(tmp_path / "out/model.safetensors")
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert len(state[key]) == rows
        mean = state[key][:words].mean(0)
        assert torch.allclose(state[key][words:], mean.expand(rows - words, -1), atol=1e-6)
    roomy = make(text={**LLAMA, "vocab_size": 512})
    export_checkpoint(save(tmp_path / "roomy", roomy), "transformers", tmp_path / "room", QUIET)
    assert (
        json.loads((tmp_path / "room/config.json").read_text())["text_config"]["vocab_size"] == 512
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": {"type": "linear"}}, "holds mlp2x_gelu projectors, not linear"),
        ({"projector": {"type": "pixel_unshuffle_mlp"}}, "not pixel_unshuffle_mlp"),
        ({"image": {**NEXT, "layout": "flat"}}, "strategy is anyres and image.layout flat"),
        ({"image": {**NEXT, "layout": "spatial"}}, "image.layout spatial"),
        ({"image": {**ONE_VIEW, "layout": "unpad"}}, "strategy is pad and image.layout unpad"),
        ({"image": {**ONE_VIEW, "strategy": "squeeze"}}, "it knows pad or square with flat"),
        ({"image": {**NEXT, "several": "pad"}}, "image.several is pad, the layout means same"),
        ({"image": ONEVISION}, "video.pool_stride is 1, the layout means 2"),
        (
            {"image": ONEVISION, "video": {**POOLED, "newline": "grid"}},
            "video.newline is grid, the layout means one_token",
        ),
        ({"image": {**ONE_VIEW, "scale_resolution": 64}}, "pictures of 64 pixels, .* reads 38"),
        ({"text": {**LLAMA, "model_type": "gemma"}}, "no 'gemma' language model"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_hold(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ours = save(tmp_path / "ours", make(**options))
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(ours, "transformers", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_weights_that_compute_something_else_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check behind the conversion sees one swapped layer of the projector."""
    from llava_uhd.checkpoint.published import library

    square = make(vision=tower(hidden_size=64))
    swapped = {"linear_2.": "layers.0.", "linear_1.": "layers.2."}
    monkeypatch.setattr(library, "_LINEAR", swapped)
    with pytest.raises(UserError, match="was written but does not compute what .* logits differ"):
        export_checkpoint(save(tmp_path / "ours", square), "transformers", tmp_path / "out")


# --- in -------------------------------------------------------------------------------------------


def library_folder(name: str, tmp_path: Path) -> tuple[Path, Any]:
    """A folder as transformers saves its own model, beside the tokenizer files of an export."""
    options = SYSTEMS[name]
    export_checkpoint(
        save(tmp_path / "seed", make(**options)), "transformers", tmp_path / "x", QUIET
    )
    config = AutoConfig.from_pretrained(tmp_path / "x")
    # A tower with a layer behind the one that is read, as in the files on the hub.
    config.vision_config.num_hidden_layers = 3
    if name != "llava_onevision":
        config.vision_feature_layer = -2
    torch.manual_seed(7)
    model = CLASSES[name](config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            elif key.endswith("image_newline"):
                parameter.normal_()
    folder = tmp_path / "library"
    model.save_pretrained(folder)
    for file in (tmp_path / "x").iterdir():
        if file.suffix in (".json", ".jinja", ".model") and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder, model


def respell(folder: Path, target: Path, change: Any) -> Path:
    copied = copy(folder, target)
    state = load_file(folder / "model.safetensors")
    save_file({change(key): each for key, each in state.items()}, copied / "model.safetensors")
    return copied


def to_modules(key: str) -> str:
    """The spelling of the modules since 5.0 from that of the files."""
    key = key.replace("vision_tower.vision_model.", "vision_tower.")
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    return "model." + key.replace("language_model.model.", "language_model.")


def to_files(key: str) -> str:
    """The spelling of releases before 4.52 from that of the modules."""
    if key.startswith("lm_head"):
        return f"language_model.{key}"
    key = key.removeprefix("model.")
    if "vision_model" not in key:
        key = key.replace("vision_tower.", "vision_tower.vision_model.")
    return key.replace("language_model.", "language_model.model.")


@pytest.mark.parametrize("name", CLASSES)
def test_folders_of_transformers_load(name: str, tmp_path: Path) -> None:
    folder, library = library_folder(name, tmp_path)
    config = describe_checkpoint(folder)
    parts = load_pretrained(folder)
    assert config.image.strategy == parts[0].config.image.strategy
    assert largest(parts, library) <= 1e-4
    spelt = load_file(folder / "model.safetensors")
    by_module = any(key.startswith("model.") for key in spelt)
    both = {
        "old": to_files if by_module else str,
        "new": str if by_module else to_modules,
    }
    keys = []
    for spelling, change in both.items():
        other = respell(folder, tmp_path / spelling, change)
        keys.append(set(load_file(other / "model.safetensors")))
        assert_same(parts[0], load_pretrained(other)[0])
        # transformers reads the same.
        again = CLASSES[name].from_pretrained(other)
        assert_same(library, again)
    assert not keys[0] & keys[1] - {"image_newline"} and any(
        key.startswith("language_model.model.") for key in keys[0]
    )
    # Our own folder keeps the placeholder's id inside the vocabulary, and never embeds it.
    save(tmp_path / "ours", parts)
    kept = load_pretrained(tmp_path / "ours")
    assert kept[0].config.image.image_token_id == library.config.image_token_id
    assert largest(kept, library) <= 1e-4


@pytest.mark.parametrize("name", CLASSES)
def test_keys_of_transformers_map_one_to_one(name: str, tmp_path: Path) -> None:
    folder, library = library_folder(name, tmp_path)
    model, _ = load_pretrained(folder)
    assert find_layout(json.loads((folder / "config.json").read_text())) is LIBRARY
    for keys in (set(load_file(folder / "model.safetensors")), set(library.state_dict())):
        table = {key: our_key(LIBRARY, key, model.config) for key in keys}
        reached = [key for key in table.values() if key is not None]
        assert len(reached) == len(set(reached)) and set(reached) == model.state_dict().keys()
        dead = {key for key, ours in table.items() if ours is None}
        assert dead and all(".layers.2." in key or "post_layernorm" in key for key in dead)
    for ours in model.state_dict():
        published = LIBRARY.keys.to_published(ours, model.config)
        assert our_key(LIBRARY, published, model.config) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "'full' is not supported with a clip_vision"),
        ({"vision_feature_layer": [-2, -5]}, "names several layers"),
        ({"projector_hidden_act": "relu"}, "only a projector with biases and GELU loads"),
        ({"multimodal_projector_bias": False}, "only a projector with biases and GELU loads"),
        ({"vision_config": {"model_type": "pixtral"}}, "config.json: "),
    ],
)
def test_settings_of_transformers_that_have_no_place_here(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_checkpoint(save(tmp_path / "ours", make()), "transformers", out, QUIET)
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "strategy"),
    [
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}, "square"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
        # CLIP's own processor pads something else by this word.
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "square"),
        ({"image_processor_type": "SiglipImageProcessor", "do_center_crop": False}, "squeeze"),
        (None, "square"),
    ],
)
def test_strategy_of_the_image_processor(
    pixels: dict[str, Any] | None, strategy: str, tmp_path: Path
) -> None:
    """In its own file, or inside that of the processor, as newer releases save it."""
    out = tmp_path / "out"
    export_checkpoint(save(tmp_path / "ours", make()), "transformers", out, QUIET)
    (out / "preprocessor_config.json").unlink()
    mean = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if pixels is not None:
            content: dict[str, Any] = {**pixels, **mean}
            if file == "processor_config.json":
                (out / "preprocessor_config.json").unlink()
                content = {"image_processor": content}
            (out / file).write_text(json.dumps(content))
        image = load_pretrained(out)[0].config.image
        assert image.strategy == strategy
        assert (image.mean == (0.1, 0.2, 0.3)) == (pixels is not None)


def test_pictures_of_another_side_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(save(tmp_path / "ours", make()), "transformers", out, QUIET)
    for content, message in (
        (
            {"crop_size": {"height": 64, "width": 64}},
            f"of 64 pixels, its vision tower reads {SIDE}",
        ),
        ({"resample": 2}, "resizes with filter 2; only 3"),
    ):
        (out / "preprocessor_config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_pretrained(out)


def test_auto_class_reads_the_folder(tmp_path: Path) -> None:
    export_checkpoint(save(tmp_path / "ours", make()), "transformers", tmp_path / "out", QUIET)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id
