"""Configurations of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, as found on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.published import (
    LAYOUTS,
    find_layout,
)
from llava_uhd.checkpoint.published.towers import KNOWN_TOWERS
from llava_uhd.checkpoint.shapes import describe_checkpoint
from llava_uhd.config.model import LlavaUHDConfig, make_config
from llava_uhd.errors import UserError

LLAMA = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
MISTRAL = {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
QWEN = {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava"}
CLIP = make_config(KNOWN_TOWERS["clip-vit-large-patch14-336"], "tower")
SIGLIP = make_config(KNOWN_TOWERS["siglip-so400m-patch14-384"], "tower")
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TILED = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS}
JOINED = {"mm_patch_merge_type": "spatial"}
UNPAD = {"mm_patch_merge_type": "spatial_unpad"}


# --- recognition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "slug"),
    [
        (LLAMA, "llava_1_5"),
        ({"model_type": "llava_llama"}, "llava_1_5"),
        (MISTRAL, "llava_1_5"),
        (LLAMA | {"mm_projector_type": "linear"}, "llava_1_5"),
        # Nothing but the class is right here.
        (LLAMA | {"model_type": "llava_qwen"}, "llava_1_5"),
        (LLAMA | {"image_aspect_ratio": "square", **UNPAD}, "llava_1_5"),
        (LLAMA | TILED, "llava_next"),
        ({"model_type": "llava_mistral", **TILED, **UNPAD}, "llava_next"),
        (QWEN, "llava_onevision"),
        ({"model_type": "llava_qwen"}, "llava_onevision"),
        (QWEN | {"model_type": "qwen2", **TILED}, "llava_onevision"),
        # Classes of transformers share the name, and nothing else.
        ({"model_type": "llava", "vision_config": {}, "text_config": {}}, "transformers"),
        ({"model_type": "llava_onevision", "vision_config": {}}, "transformers"),
    ],
)
def test_layouts_are_told_by_class_and_keys(values: dict[str, Any], slug: str) -> None:
    assert [each.slug for each in LAYOUTS if each.matches(values, [])] == [slug]


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llava"},
        {"model_type": "llava_next"},
        {"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_llama"},
        {"architectures": ["LlavaGemmaForCausalLM"], "model_type": "llava_gemma"},
        {"architectures": "LlavaLlamaForCausalLM", "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    ],
)
def test_other_configurations_are_none_of_them(values: dict[str, Any]) -> None:
    assert find_layout(values) is None


@pytest.mark.parametrize("name", ["Mpt", "MPT", "Gemma", "Mixtral"])
def test_other_language_models_are_refused_by_name(name: str, tmp_path: Path) -> None:
    values = {"architectures": [f"Llava{name}ForCausalLM"], "mm_projector_type": "mlp2x_gelu"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    message = rf"a LLaVA with an? {name.upper()} language model, which is not supported"
    for read in (load_pretrained, describe_checkpoint):
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


# --- configuration --------------------------------------------------------------------------------


def read(values: dict[str, Any], vision: Any = CLIP) -> LlavaUHDConfig:
    layout = find_layout(values)
    assert layout is not None
    return layout.make_config(values, vision, [])


def test_every_key_may_be_absent() -> None:
    config = read({"architectures": ["LlavaLlamaForCausalLM"]})
    assert (config.image.strategy, config.image.layout) == ("square", "flat")
    assert (config.projector.type, config.select_layer, config.template) == ("linear", -2, "v1")
    assert config.text_config.hidden_size == 4096
    assert config.video.pool_stride == 1
    nulls = dict.fromkeys(
        ("image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type", "mm_vision_select_layer")
    )
    assert read({**LLAMA, **nulls}).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "vision", "image"),
    [
        ({}, CLIP, ("square", "flat", 336, "same", None)),
        ({}, SIGLIP, ("squeeze", "flat", 384, "same", None)),
        ({"image_aspect_ratio": "pad"}, CLIP, ("pad", "flat", 336, "same", None)),
        ({"image_aspect_ratio": "pad", **UNPAD}, SIGLIP, ("pad", "unpad", 384, "same", None)),
        (TILED, CLIP, ("anyres", "flat", 336, "same", None)),
        (TILED | JOINED, CLIP, ("anyres", "spatial", 336, "same", None)),
        (TILED | UNPAD, CLIP, ("anyres", "unpad", 336, "same", None)),
        # Written by the code of LLaVA-NeXT and OneVision, which pads each of several images.
        (TILED | UNPAD | {"mm_tunable_parts": None}, CLIP, ("anyres", "unpad", 336, "pad", None)),
        (
            {**UNPAD, "image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": PINPOINTS},
            CLIP,
            ("anyres", "unpad", 336, "same", 4),
        ),
    ],
)  # fmt: skip
def test_images(values: dict[str, Any], vision: Any, image: tuple[Any, ...]) -> None:
    found = read(LLAMA | values, vision).image
    assert image == (
        found.strategy, found.layout, found.scale_resolution, found.several, found.max_tiles,
    )  # fmt: skip
    if found.strategy == "anyres":
        assert found.pinpoints == tuple((width, height) for width, height in PINPOINTS)


def test_pinpoints_in_every_notation() -> None:
    anyres = QWEN | {"image_aspect_ratio": "anyres_max_9", **UNPAD}
    listed = [[384 * i, 384 * j] for i in (1, 2) for j in (1, 2)]
    for value in (listed, str(listed), "(1x1),...,(2x2)"):
        config = read(anyres | {"image_grid_pinpoints": value}, SIGLIP)
        assert config.image.pinpoints == ((384, 384), (384, 768), (768, 384), (768, 768))


@pytest.mark.parametrize(
    ("values", "template"),
    [
        (LLAMA, "v1"),
        (LLAMA | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}, "llava_llama_2"),
        (LLAMA | {"vocab_size": 64000}, "chatml_direct"),
        (LLAMA | {"vocab_size": 128256}, "llama_3"),
        (MISTRAL, "mistral_instruct"),
        (QWEN, "qwen_1_5"),
        (LLAMA | {"tune_mm_mlp_adapter": True}, "plain"),
        (QWEN | {"mm_tunable_parts": "mm_mlp_adapter"}, "plain"),
        (LLAMA | {"mm_use_im_start_end": True}, "v1_im_start_end"),
    ],
)
def test_templates_follow_the_language_model(values: dict[str, Any], template: str) -> None:
    assert read(values).template == template


@pytest.mark.parametrize(
    ("values", "pooling"),
    [
        ({}, (2, "bilinear", "one_token")),
        ({"mm_newline_position": "grid", "mm_spatial_pool_mode": "max"}, (2, "max", "grid")),
        # The published code pools by 2 whatever is recorded.
        ({"mm_spatial_pool_stride": 4, "mm_newline_position": None}, (2, "bilinear", "one_token")),
    ],
)
def test_videos_of_the_newer_code(values: dict[str, Any], pooling: tuple[Any, ...]) -> None:
    video = read(QWEN | values, SIGLIP).video
    assert (video.pool_stride, video.pool_mode, video.newline) == pooling
    assert video.strategy == "squeeze"
    assert read(QWEN | values, CLIP).video.strategy == "square"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_projector_type": "mlp2x_res2x_gelu"}, "mm_projector_type 'mlp2x_res2x_gelu' is not"),
        ({"mm_projector_type": "pooler"}, "mm_projector_type 'pooler' is not one that loads here"),
        ({"mm_projector_type": ["linear"]}, "mm_projector_type"),
        ({"mm_patch_merge_type": "spatial_nobase"}, "mm_patch_merge_type 'spatial_nobase' joins"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres' cuts images"),
        ({"image_aspect_ratio": "crop_split"}, "image_aspect_ratio 'crop_split' cuts images"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints is missing"),
        (
            {**TILED, "image_grid_pinpoints": [[300, 600]]},
            r"image\.pinpoints: 300 x 600 is no mult",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch' is not"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "'slicefour_patch' is not supported"),
        ({"s2": True}, "s2 is set"),
        ({"mm_newline_position": "nowhere"}, "mm_newline_position 'nowhere' is not one of one_tok"),
        ({"mm_use_im_start_end": True, "vocab_size": 128256}, "the template llama_3 has no form"),
        ({"mm_use_im_start_end": True, "tune_mm_mlp_adapter": True}, "the template plain has no f"),
    ],
)
def test_settings_that_mean_another_model_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(LLAMA | values)
    assert "\n" not in str(caught.value)
