"""Tiny models of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, ours and transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from fixtures_checkpoint import Parts
from fixtures_tiny import LLAMA, picture

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor

# Pictures of 4 x 4 patches; a rest of 6 pixels is no whole patch, as with the real SigLIP.
SIDE, PATCH = 38, 8
SIZES = [(38, 38), (38, 76), (76, 38), (76, 76), (114, 38), (38, 114)]
MISTRAL: dict[str, Any] = {**LLAMA, "model_type": "mistral", "sliding_window": None}
QWEN2: dict[str, Any] = {**LLAMA, "model_type": "qwen2"}
QWEN3: dict[str, Any] = {**LLAMA, "model_type": "qwen3", "head_dim": 16}


def tower(siglip: bool = False, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        **changes,
    }


ONE_VIEW: dict[str, Any] = {"strategy": "pad", "layout": "flat"}
NEXT: dict[str, Any] = {"strategy": "anyres", "layout": "unpad", "pinpoints": SIZES}
ONEVISION: dict[str, Any] = {**NEXT, "max_tiles": 2, "several": "pad"}
POOLED: dict[str, Any] = {"pool_stride": 2}

# System -> options of `make`.
SYSTEMS: dict[str, dict[str, Any]] = {
    "llava_1_5": {"image": ONE_VIEW},
    "llava_next": {"image": NEXT, "text": MISTRAL, "template": "mistral_instruct"},
    "llava_onevision": {
        "image": ONEVISION,
        "text": QWEN2,
        "siglip": True,
        "template": "qwen_1_5",
        "video": {**POOLED, "strategy": "squeeze"},
    },
}


def make(
    text: dict[str, Any] = LLAMA,
    siglip: bool = False,
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    **options: Any,
) -> Parts:
    """A model with random weights large enough to disagree."""
    tokenizer = build_demo_tokenizer()
    vision = tower(siglip) if vision is None else vision
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    side = {"scale_resolution": vision["image_size"], "patch_size": vision["patch_size"]}
    config = LlavaUHDConfig(
        vision_config=vision,
        text_config={**ids, **text},
        image={**side, **options.pop("image", ONE_VIEW)},
        projector={"type": "mlp2x_gelu", **options.pop("projector", {})},
        **options,
    )
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    torch.manual_seed(seed)
    model = LlavaUHDForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model, processor


def prompts(videos: bool) -> list[tuple[str, dict[str, Any]]]:
    """Text alone, one image of several shapes, two images, and a video."""
    found: list[tuple[str, dict[str, Any]]] = [
        ("Why is the sky blue?", {}),
        ("First <image>\nthen <image> what?", {"images": [picture(50, 70), picture(90, 30, 1)]}),
    ]
    for size in ((70, 50), (30, 111), (38, 38), (200, 20)):
        found.append(("See <image>\nWhat is it?", {"images": [picture(*size)]}))
    if videos:
        frames = [picture(60, 40, seed) for seed in range(3)]
        found.append(("<video>\nWhat happens?", {"videos": [frames]}))
    return found
