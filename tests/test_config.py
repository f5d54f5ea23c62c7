"""The model configuration: typed parts, copies, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError

TEXT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_a_language_model_keeps_its_causal_mask_when_its_config_is_used_again() -> None:
    text = LlamaConfig(**TEXT)
    model = AutoModelForCausalLM.from_config(text).eval()
    ids = torch.arange(8)[None]
    before = model(ids).logits
    LlavaUHDConfig(text_config=model.config)
    changed = ids.clone()
    changed[0, -1] = 20
    assert torch.equal(model(ids).logits, before)
    # Causal: the last token does not reach the positions before it.
    assert torch.equal(model(changed).logits[0, :-1], before[0, :-1])


def test_round_trip(tmp_path: Path) -> None:
    config = LlavaUHDConfig(
        text_config={"model_type": "llama", **TEXT},
        image={"max_slices": 3, "bounded": False},
        projector={"num_queries": 64},
        template="plain",
    )
    config.save_pretrained(tmp_path)
    loaded = LlavaUHDConfig.from_pretrained(tmp_path)
    assert loaded.image == config.image
    assert loaded.projector == config.projector
    assert loaded.compression == config.compression
    assert (loaded.template, loaded.select_layer) == ("plain", -2)
    assert loaded.hidden_size == 32


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match="max_slice'; did you mean 'max_slices'"):
        LlavaUHDConfig(image={"max_slice": 3})
    with pytest.raises(UserError, match="model_type"):
        LlavaUHDConfig(text_config={"hidden_size": 8})
