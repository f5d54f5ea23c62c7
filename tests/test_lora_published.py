"""LoRA folders as the published training writes them, against PEFT's own computation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import logits, save
from fixtures_qwen import save_tokenizer
from fixtures_tiny import LLAMA
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.lora_merge import merge_folder
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError

peft = pytest.importorskip("peft")

# Language model -> its published class.
CLASSES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
}
CLOSE = 1e-5


def make_parts(folder: Path, kind: str = "llama") -> dict[str, Any]:
    """A language model, a tower, and the same with a projector as one published checkpoint.

    Returns:
        The published configuration.
    """
    if kind == "qwen2":
        tokenizer = save_tokenizer(folder / "language")
    else:
        tokenizer = build_demo_tokenizer()
    text = {**LLAMA, "model_type": kind, "vocab_size": len(tokenizer), "sliding_window": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**text, tie_word_embeddings=False)
    language = AutoModelForCausalLM.from_config(config)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    tower = CLIPVisionModel(vision)
    with torch.no_grad():
        for parameter in (*language.parameters(), *tower.parameters()):
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    tower.save_pretrained(folder / "tower")
    values = {
        **{key: value for key, value in text.items() if value is not None},
        "architectures": [CLASSES[kind]],
        "model_type": "llava",
        "mm_vision_tower": str(folder / "tower"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "tie_word_embeddings": False,
    }
    whole = folder / "whole"
    tokenizer.save_pretrained(whole)
    (whole / "config.json").write_text(json.dumps(values))
    weights = {key: value.clone() for key, value in language.state_dict().items()}
    weights |= projector("model.mm_projector.", seed=1)
    prefix = "model.vision_tower.vision_tower.vision_model."
    for key, value in load_file(folder / "tower/model.safetensors").items():
        weights[prefix + key.removeprefix("vision_model.")] = value.clone()
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    return values


def projector(prefix: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    return {prefix + key: torch.randn(shape) * 0.3 for key, shape in shapes.items()}


def make_lora(
    folder: Path,
    values: dict[str, Any],
    suffix: str,
    base: Path,
    targets: Iterable[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
) -> Any:
    """What the published training leaves behind, and PEFT's merged language model.

    The adapter is made by PEFT on the plain language model: its class in the published code has
    the same paths.
    """
    language = AutoModelForCausalLM.from_pretrained(folder / "language")
    config = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(language, config)
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    out = folder / "lora"
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(out)
    if suffix == "bin":
        state = load_file(out / "adapter_model.safetensors")
        torch.save(state, out / "adapter_model.bin")
        (out / "adapter_model.safetensors").unlink()
    learned = projector("base_model.model.model.mm_projector.", seed=3)
    torch.save(learned, out / "non_lora_trainables.bin")
    (out / "config.json").write_text(json.dumps(values))
    return wrapped.merge_and_unload()


def expected(folder: Path, language: Any) -> tuple[Any, Any]:
    """The whole checkpoint with PEFT's language model and the trained projector in it."""
    model, processor = load_pretrained(folder / "whole")
    model.language_model.load_state_dict(language.state_dict())
    trained = projector("", seed=3)
    own = dict(model.projector.named_parameters())
    assert len(own) == len(trained)
    with torch.no_grad():
        for parameter, value in zip(own.values(), trained.values(), strict=True):
            parameter.copy_(value)
    return model, processor


def difference(first: Any, second: Any) -> float:
    return float((logits(*first) - logits(*second)).abs().max())


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("base", ["language", "whole"])
@pytest.mark.parametrize("kind", CLASSES)
def test_published_folder(tmp_path: Path, kind: str, base: str, suffix: str) -> None:
    values = make_parts(tmp_path, kind)
    language = make_lora(tmp_path, values, suffix, tmp_path / base)
    wanted = expected(tmp_path, language)
    assert difference(wanted, load_pretrained(tmp_path / "whole")) > 0.1
    for merge in (True, False):
        assert difference(wanted, load_pretrained(tmp_path / "lora", merge_lora=merge)) <= CLOSE
    renamed = (tmp_path / "lora").rename(tmp_path / "anything")
    given = load_pretrained(renamed, base=tmp_path / base, vision_tower=tmp_path / "tower")
    assert difference(wanted, given) <= CLOSE
    merge_folder(renamed, tmp_path / "merged")
    for name in ("language", "whole", "tower", "anything"):
        shutil.rmtree(tmp_path / name)
    assert difference(wanted, load_pretrained(tmp_path / "merged")) <= CLOSE


@pytest.mark.parametrize("base", ["language", "whole"])
def test_class_of_the_plain_language_model(tmp_path: Path, base: str) -> None:
    """Files on the hub: the class is the base's, the ``model_type`` that of another library."""
    values = make_parts(tmp_path)
    values |= {"architectures": ["LlamaForCausalLM"], "_name_or_path": str(tmp_path / base)}
    language = make_lora(tmp_path, values, "bin", tmp_path / base)
    file = tmp_path / "lora/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    assert difference(expected(tmp_path, language), load_pretrained(tmp_path / "lora")) <= CLOSE


def test_our_checkpoint_as_base(tmp_path: Path) -> None:
    values = make_parts(tmp_path)
    language = make_lora(tmp_path, values, "bin", tmp_path / "whole")
    ours = save(tmp_path / "ours", load_pretrained(tmp_path / "whole"))
    wanted = expected(tmp_path, language)
    shutil.rmtree(tmp_path / "tower")
    assert difference(wanted, load_pretrained(tmp_path / "lora", base=ours)) <= CLOSE


def test_adapters_that_fell_on_the_tower(tmp_path: Path) -> None:
    """The published search for targets goes by the ends of names: a loaded tower has them, too."""
    values = make_parts(tmp_path)
    language = make_lora(tmp_path, values, "bin", tmp_path / "whole")
    model, processor = expected(tmp_path, language)
    file = tmp_path / "lora/adapter_model.bin"
    state = torch.load(file, weights_only=True)
    torch.manual_seed(4)
    for layer in range(3):  # the last layer is behind the selected one
        path = f"model.vision_tower.vision_tower.vision_model.encoder.layers.{layer}.self_attn"
        for name, shape in (("lora_A", (8, 32)), ("lora_B", (32, 8))):
            key = f"base_model.model.{path}.q_proj.{name}.weight"
            state[key] = torch.randn(shape) * 0.1
        if layer < 2:
            a, b = (state[f"base_model.model.{path}.q_proj.lora_{x}.weight"] for x in "AB")
            with torch.no_grad():
                model.vision_tower.layers[layer].self_attn.q_proj.weight += 2 * b @ a
    torch.save(state, file)
    before = difference((model, processor), expected(tmp_path, language))
    assert before > 1e-3
    for merge in (True, False):
        loaded = load_pretrained(tmp_path / "lora", merge_lora=merge)
        assert difference((model, processor), loaded) <= CLOSE


def test_whole_modules_beside_the_adapter(tmp_path: Path) -> None:
    """Trained biases and heads, in either of the two files."""
    values = make_parts(tmp_path, "qwen2")
    language = make_lora(tmp_path, values, "safetensors", tmp_path / "language")
    bias = torch.linspace(-1, 1, 64)
    head = torch.randn(language.lm_head.weight.shape) * 0.2
    file = tmp_path / "lora/adapter_model.safetensors"
    key = "base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias"
    save_file({**load_file(file), key: bias}, file)
    file = tmp_path / "lora/non_lora_trainables.bin"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "base_model.model.lm_head.weight": head}, file)
    with torch.no_grad():
        language.model.layers[1].self_attn.q_proj.bias.copy_(bias)
        language.lm_head.weight.copy_(head)
    assert difference(expected(tmp_path, language), load_pretrained(tmp_path / "lora")) <= CLOSE


def test_refusals(tmp_path: Path) -> None:
    values = make_parts(tmp_path)
    make_lora(tmp_path, values, "bin", Path("lmsys/vicuna-that-is-not-here"))
    lora = tmp_path / "lora"
    with pytest.raises(UserError, match=r"adapter for 'lmsys/vicuna-that.*pass base=FOLDER"):
        load_pretrained(lora)
    given = {"base": tmp_path / "language"}
    (lora / "config.json").write_text(json.dumps({**values, "mm_vision_tower": "gone/tower"}))
    with pytest.raises(UserError, match=r"vision tower is not here.*pass vision_tower=FOLDER"):
        load_pretrained(lora, **given)
    (lora / "config.json").write_text(json.dumps({**values, "mm_projector_type": "strange"}))
    with pytest.raises(UserError, match=r"config\.json.*'strange'"):
        load_pretrained(lora, **given)
    (lora / "config.json").write_text(json.dumps(values))
    (lora / "non_lora_trainables.bin").rename(lora / "kept")
    with pytest.raises(UserError, match=r"has no non_lora_trainables\.bin"):
        load_pretrained(lora, **given)
    torch.save({"base_model.model.model.other.weight": torch.ones(1), "x": [1]}, lora / "kept")
    (lora / "kept").rename(lora / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="plain dictionary of tensors"):
        load_pretrained(lora, **given)


def test_golden_checkpoint_as_base(golden: Path, tmp_path: Path) -> None:
    """The original system's checkpoint below an adapter with the published names."""
    whole = golden / "llava_1_5/model/checkpoint"
    base, processor = load_pretrained(whole)
    values = json.loads((whole / "config.json").read_text())
    base.language_model.save_pretrained(tmp_path / "language")
    language = make_lora(tmp_path, values, "bin", whole)
    learned = {
        f"base_model.model.model.mm_projector.{key}": value * 1.5
        for key, value in {
            key.removeprefix("model.mm_projector."): value
            for shard in sorted(whole.glob("*.safetensors"))
            for key, value in load_file(shard).items()
            if "mm_projector" in key
        }.items()
    }
    torch.save(learned, tmp_path / "lora/non_lora_trainables.bin")
    base.language_model.load_state_dict(language.state_dict())
    with torch.no_grad():
        for parameter in base.projector.parameters():
            parameter.mul_(1.5)
    assert difference((base, processor), load_pretrained(tmp_path / "lora")) <= CLOSE
