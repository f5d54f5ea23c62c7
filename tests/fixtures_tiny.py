"""Models small enough to run in milliseconds, with weights large enough to disagree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
QWEN2: dict[str, Any] = {**LLAMA, "model_type": "qwen2"}


def tiny_parts(
    text: dict[str, Any] = LLAMA,
    seed: int = 0,
    vision: dict[str, Any] = VISION,
    **options: Any,
) -> tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]:
    """Model (evaluation mode, float32) and processor: views of about 32 x 32 pixels, 4 tokens each.

    Args:
        text: configuration of the language model; the vocabulary is added.
        seed: of the weights.
        vision: configuration of the tower.
        **options: of `LlavaUHDConfig`; ``image`` and ``projector`` are laid over the tiny ones.
    """
    tokenizer = build_demo_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image = {"scale_resolution": 32, "patch_size": 8, "max_slices": 7, **options.pop("image", {})}
    config = LlavaUHDConfig(
        vision_config=dict(vision),
        text_config={**ids, **text},
        image=image,
        projector={"num_queries": 4, **options.pop("projector", {})},
        **options,
    )
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    torch.manual_seed(seed)
    model = LlavaUHDForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Fresh weights make nearly uniform logits; larger ones make a wrong token show.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    settings = model.generation_config
    settings.eos_token_id = None  # fixed lengths are easier to compare
    settings.pad_token_id = tokenizer.pad_token_id
    return model, processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that resizing keeps something of them."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
