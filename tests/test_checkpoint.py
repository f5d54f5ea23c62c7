"""Checkpoints: save and load, published layouts in every form, and all that can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import Parts, assert_same, copy, disturb, logits, make_base, save, split
from fixtures_tiny import LLAMA, QWEN2, VISION, tiny_parts
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
)

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.manifest import write_manifest
from llava_uhd.checkpoint.parts import (
    PROJECTOR_FILE,
    projector_facts,
    read_projector,
    read_tower,
    read_tower_config,
    save_projector,
)
from llava_uhd.checkpoint.published import UHD_V1, our_key, published_key
from llava_uhd.checkpoint.weights import weight_files
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.vision.towers import VisionTower

# --- ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [LLAMA, {**LLAMA, "tie_word_embeddings": True}, QWEN2, {**QWEN2, "tie_word_embeddings": True}],
    ids=["llama", "llama tied", "qwen2", "qwen2 tied"],
)
def test_save_and_load(text: dict[str, Any], tmp_path: Path) -> None:
    parts = tiny_parts(text, template="plain", select_layer=-1)
    model, processor = parts
    save(tmp_path, parts)
    loaded, again = load_pretrained(tmp_path)
    assert not loaded.training and loaded.dtype == torch.float32
    assert any("inv_freq" in name for name, _ in loaded.named_buffers())
    assert_same(model, loaded)
    assert torch.equal(logits(model, processor), logits(loaded, again))
    for key in ("image", "projector", "compression", "template", "select_layer"):
        assert getattr(loaded.config, key) == getattr(model.config, key), key
    assert again.image_config == processor.image_config and again.template_name == "plain"
    tied = bool(text.get("tie_word_embeddings"))
    head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight.data_ptr() == table.weight.data_ptr()) == tied
    stored = load_file(tmp_path / "model.safetensors")
    assert ("language_model.lm_head.weight" not in stored) == tied


def test_auto_classes(tmp_path: Path) -> None:
    parts = tiny_parts()
    save(tmp_path, parts)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlavaUHDConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LlavaUHDProcessor
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = kind.from_pretrained(tmp_path).eval()
        assert type(loaded) is LlavaUHDForConditionalGeneration
        assert_same(parts[0], loaded)
        assert torch.equal(logits(*parts), logits(loaded, parts[1]))


def test_saved_twice_is_the_same(tmp_path: Path) -> None:
    save(tmp_path / "a", tiny_parts())
    save(tmp_path / "b", load_pretrained(tmp_path / "a"))
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_contradictory_generation_settings_are_saved(tmp_path: Path) -> None:
    """Vicuna's own: sampling values without sampling, which the library refuses to save."""
    model, processor = tiny_parts()
    model.generation_config.temperature = 0.9
    model.generation_config.top_p = 0.6
    model.generation_config.do_sample = False
    save(tmp_path, (model, processor))
    loaded, _ = load_pretrained(tmp_path)
    assert not loaded.generation_config.do_sample
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.9
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert values["temperature"] == 0.9 and values["do_sample"] is True


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "float16", torch.float64])
def test_dtypes(name: Any, tmp_path: Path) -> None:
    parts = tiny_parts()
    save(tmp_path, parts)
    loaded, processor = load_pretrained(tmp_path, dtype=name)
    assert {parameter.dtype for parameter in loaded.parameters()} == {loaded.dtype}
    wanted = torch.finfo(loaded.dtype)
    assert (wanted.bits, loaded.dtype != torch.float16 or name == "float16") == (
        (64, True) if name is torch.float64 else (16, True)
    )
    found = logits(loaded, processor)
    assert bool(found.isfinite().all())
    exact = logits(*parts)
    assert (found.float() - exact).norm() <= 0.1 * exact.norm()
    assert loaded.generate(**processor(text="a"), max_new_tokens=2).shape[1] == 4
    with pytest.raises(UserError, match="dtype 'int8'"):
        load_pretrained(tmp_path, dtype="int8")


def test_attention_implementation(tmp_path: Path) -> None:
    parts = tiny_parts()
    save(tmp_path, parts)
    eager, processor = load_pretrained(tmp_path, attn_implementation="eager")
    assert eager.language_model.config._attn_implementation == "eager"
    assert (logits(eager, processor) - logits(*parts)).abs().max() <= 1e-4


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Its four-bit kernel for CPUs takes rows of whole blocks of 64.
    save(tmp_path, tiny_parts({**LLAMA, "intermediate_size": 128}))
    model, processor = load_pretrained(tmp_path, quantization=quantization)
    assert bool(logits(model, processor).isfinite().all())
    kinds = {type(module).__name__ for module in model.language_model.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    for part in (model.vision_tower, model.projector):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_unknown_quantization(tmp_path: Path) -> None:
    save(tmp_path, tiny_parts())
    with pytest.raises(UserError, match="'3bit' is not one of 4bit, 8bit"):
        load_pretrained(tmp_path, quantization="3bit")


# --- published layouts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(golden: Path) -> Path:
    return golden / "uhd_v1/tiny_checkpoint"


@pytest.fixture(scope="module")
def expected(published: Path) -> Parts:
    return load_pretrained(published)


def test_published_to_ours_and_back(expected: Parts, published: Path, tmp_path: Path) -> None:
    save(tmp_path, expected)
    loaded = load_pretrained(tmp_path)
    assert_same(expected[0], loaded[0])
    assert torch.equal(logits(*expected), logits(*loaded))
    assert not loaded[0].config.image.bounded and loaded[1].template_name == "v1"
    stored = load_file(published / "model.safetensors")
    names = expected[0].state_dict().keys()
    assert {published_key(name, expected[0].config) for name in names} <= stored.keys()
    assert {our_key(UHD_V1, key, expected[0].config) for key in stored} - {None} == set(names)


def test_tower_of_our_checkpoint_can_be_replaced(
    expected: Parts, published: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "ours", expected)
    shutil.copytree(published / "clip", tmp_path / "clip")
    assert_same(expected[0], load_pretrained(folder, vision_tower=tmp_path / "clip")[0])
    disturb(tmp_path / "clip/model.safetensors")
    other, _ = load_pretrained(folder, vision_tower=tmp_path / "clip")
    for name, tensor in expected[0].state_dict().items():
        same = torch.equal(other.state_dict()[name], tensor)
        assert same != name.startswith("vision_tower."), name


def test_separators_follow_the_tokenizer(expected: Parts) -> None:
    image = expected[0].config.image
    assert (image.newline_id, image.image_token_id) == (13, 400)
    assert expected[0].config.text_config.vocab_size == 400


def test_tower_inside_the_checkpoint_is_preferred(
    expected: Parts, published: Path, tmp_path: Path
) -> None:
    folder = copy(published, tmp_path / "copy")
    disturb(folder / "clip/model.safetensors")
    assert_same(expected[0], load_pretrained(folder)[0])
    other, _ = load_pretrained(folder, vision_tower=folder / "clip")
    name = "vision_tower.layers.0.mlp.fc1.weight"
    assert torch.allclose(other.state_dict()[name], expected[0].state_dict()[name] + 1, atol=1e-2)


def test_tower_path_that_is_not_here(expected: Parts, published: Path, tmp_path: Path) -> None:
    folder = copy(published, tmp_path / "copy", "clip")
    with pytest.raises(UserError, match=r"vision tower './clip' is not here: pass vision_tower="):
        load_pretrained(folder)
    assert_same(expected[0], load_pretrained(folder, vision_tower=published / "clip")[0])
    # Its shape is enough: the weights lie in the checkpoint.
    (folder / "clip").mkdir()
    shutil.copy(published / "clip/config.json", folder / "clip")
    assert_same(expected[0], load_pretrained(folder)[0])
    with pytest.raises(UserError, match=r"vision tower \./gone does not exist"):
        load_pretrained(folder, vision_tower="./gone")


def test_known_tower_names_need_no_folder(published: Path, tmp_path: Path) -> None:
    """The published value; the shape that it stands for does not fit these tiny weights."""
    name = "./pretrained_models/clip-vit-large-patch14-336"
    folder = copy(published, tmp_path / "copy", "clip", mm_vision_tower=name)
    with pytest.raises(UserError, match=r"class_embedding is \(32,\), expected \(1024,\)"):
        load_pretrained(folder)


def test_checkpoint_without_vision_weights(
    expected: Parts, published: Path, tmp_path: Path
) -> None:
    folder = copy(published, tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in state.items() if "vision_tower" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(expected[0], load_pretrained(folder)[0])


def test_tower_inside_a_whole_clip_model(tmp_path: Path) -> None:
    """The folder that the hub holds: text half, projections and an index table beside the tower."""
    values = {key: value for key, value in VISION.items() if key != "model_type"}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1}
    whole = CLIPModel(CLIPConfig(vision_config=values, text_config=text))
    whole.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = read_tower_config(tmp_path)
    tower = VisionTower(config, -2)
    found = {
        k.removeprefix("vision_tower."): v for k, v in read_tower(tmp_path, config, -2).items()
    }
    tower.load_state_dict(found)
    image = torch.rand(1, 3, 32, 32)
    patches = image.reshape(1, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(16, -1)
    with torch.no_grad():
        output = whole.vision_model(image, output_hidden_states=True).hidden_states[-2][0, 1:]
        ours = tower(patches, torch.tensor([[4, 4]]))
    assert (ours - output).abs().max() <= 1e-5


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_forms_of_the_weights(
    expected: Parts, published: Path, tmp_path: Path, binary: bool, shards: bool
) -> None:
    folder = copy(published, tmp_path / "copy")
    if shards:
        split(folder, binary)
        assert len(weight_files(folder)) == 3
    elif binary:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        # The old format of torch, which cannot be mapped into memory.
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(expected[0], load_pretrained(folder)[0])


@pytest.fixture
def base(published: Path, tmp_path: Path) -> Path:
    return make_base(published, tmp_path / "base")


def test_published_projector_file(
    expected: Parts, published: Path, base: Path, tmp_path: Path
) -> None:
    left_out = ("model.safetensors", "tokenizer*", "special_tokens_map.json")
    folder = tmp_path / "projector"
    folder.mkdir()
    for name in ("config.json", "mm_projector.bin"):
        shutil.copy(published / name, folder)
    shutil.copytree(published / "clip", folder / "clip")
    assert not list(folder.glob(left_out[1]))
    with pytest.raises(UserError, match=r"only mm_projector.bin: pass base=FOLDER"):
        load_pretrained(folder)
    loaded = load_pretrained(folder, base=base)
    assert_same(expected[0], loaded[0])
    assert torch.equal(logits(*loaded), logits(*expected))


def test_our_projector_folder(expected: Parts, published: Path, base: Path, tmp_path: Path) -> None:
    model, processor = expected
    folder = tmp_path / "stage1"
    folder.mkdir()
    save_projector(folder / PROJECTOR_FILE, model.projector.state_dict(), model.config)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.raises(UserError, match="pass base and vision_tower"):
        load_pretrained(folder)
    clip = published / "clip"
    assert_same(model, load_pretrained(folder, base=base, vision_tower=clip)[0])
    write_manifest(folder, kind="projector", language_model=str(base), vision_tower=str(clip))
    assert_same(model, load_pretrained(folder)[0])


def test_projector_of_another_model_is_refused(tmp_path: Path) -> None:
    model, _ = tiny_parts()
    save_projector(tmp_path / PROJECTOR_FILE, model.projector.state_dict(), model.config)
    assert set(read_projector(tmp_path, model.config)) == {
        f"projector.{name}" for name in model.projector.state_dict()
    }
    facts = projector_facts(model.config)
    others = {
        "num_queries": tiny_parts(projector={"num_queries": 9})[0].config,
        "width": tiny_parts({**LLAMA, "hidden_size": 32})[0].config,
        "select_layer": tiny_parts(select_layer=-1)[0].config,
    }
    for name, config in others.items():
        wanted = rf"{name} {facts[name]} \(the model has {projector_facts(config)[name]}\)"
        with pytest.raises(UserError, match=wanted):
            read_projector(tmp_path, config)
    with pytest.raises(UserError, match=r"has no projector.*bash pretrain\.sh"):
        read_projector(tmp_path / "none", model.config)
