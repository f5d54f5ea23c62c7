"""Weights, towers and projector files of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import assert_same, copy, disturb, save, split
from fixtures_llava import QWEN2, SYSTEMS, make, tower
from fixtures_tiny import LLAMA as LANGUAGE
from fixtures_tiny import picture
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, SiglipConfig, SiglipModel

from llava_uhd.checkpoint.export import ExportOptions, export_checkpoint
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.published import (
    LLAVA_1_5,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    find_layout,
    our_key,
    published_key,
)
from llava_uhd.checkpoint.published.layout import VISION_PREFIX
from llava_uhd.checkpoint.published.towers import KNOWN_TOWERS, tower_config_of_weights
from llava_uhd.config.model import make_config
from llava_uhd.errors import UserError

# --- weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(golden: Path) -> dict[str, Path]:
    return {name: golden / name / "model/checkpoint" for name in ("llava_1_5", "llava_onevision")}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: each for file in folder.glob("*.safetensors") for key, each in load_file(file).items()
    }


@pytest.mark.parametrize("name", ["llava_1_5", "llava_onevision"])
def test_golden_keys_map_one_to_one(name: str, folders: dict[str, Path]) -> None:
    model, _ = load_pretrained(folders[name])
    layout = find_layout(json.loads((folders[name] / "config.json").read_text()))
    assert layout is not None
    weights = stored(folders[name])
    ours = {key: our_key(layout, key, model.config) for key in weights}
    reached = [key for key in ours.values() if key is not None]
    assert len(reached) == len(set(reached)) and set(reached) == model.state_dict().keys()
    for key, mapped in ours.items():
        if mapped is None:
            assert any(re.fullmatch(pattern, key) for pattern in layout.unused), key
            assert key.startswith(VISION_PREFIX)
        else:
            assert published_key(mapped, model.config) == key
            assert torch.equal(model.state_dict()[mapped], weights[key]), key


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", {"weight", "bias"}),
        ("mlp1x_gelu", {"0.weight", "0.bias"}),
        ("mlp3x_gelu", {f"{n}.{what}" for n in (0, 2, 4) for what in ("weight", "bias")}),
        ("identity", set()),
    ],
)
def test_projectors_of_every_kind(kind: str, names: set[str], tmp_path: Path) -> None:
    wide = {**tower(), "hidden_size": 64} if kind == "identity" else None
    parts = make(projector={"type": kind}, vision=wide)
    export_checkpoint(save(tmp_path / "ours", parts), "llava_1_5", tmp_path / "out")
    keys = stored(tmp_path / "out")
    prefix = "model.mm_projector."
    assert {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} == names
    assert_same(parts[0], load_pretrained(tmp_path / "out")[0])


EXTRA = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": "recomputed",
    "model.vision_resampler.layers.0.weight": "never called",
    f"{VISION_PREFIX}embeddings.position_ids": "index table",
    f"{VISION_PREFIX}head.attention.in_proj_weight": "behind the selected layer",
    "model.image_newline": "without learned newlines",
}


def test_every_other_key_stands_in_a_list_with_its_reason(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(folders["llava_1_5"], tmp_path / "copy")
    file = folder / "model-00002-of-00002.safetensors"
    weights = load_file(file) | dict.fromkeys(EXTRA, torch.zeros(1))
    save_file({key: each.clone() for key, each in weights.items()}, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(EXTRA, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_pretrained(folder)[0], load_pretrained(folders["llava_1_5"])[0])
    for key, reason in EXTRA.items():
        found = [why for pattern, why in LLAVA_1_5.unused.items() if re.fullmatch(pattern, key)]
        assert found and reason in found[0], key
    # With learned newlines the last of them is read.
    config = load_pretrained(folders["llava_onevision"])[0].config
    assert our_key(LLAVA_ONEVISION, "model.image_newline", config) == "image_newline"
    with pytest.raises(KeyError):
        our_key(LLAVA_1_5, "mystery.weight", config)


def test_missing_newline_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["llava_onevision"], tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    del state["model.image_newline"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="1 missing weights: image_newline"):
        load_pretrained(folder)


def test_head_may_be_tied_to_the_table(tmp_path: Path) -> None:
    """As in the published 0.5B, which has no head on disk; the larger ones have one."""
    for tied in (True, False):
        parts = make(
            **{**SYSTEMS["llava_onevision"], "text": {**QWEN2, "tie_word_embeddings": tied}}
        )
        out = tmp_path / f"out_{tied}"
        export_checkpoint(save(tmp_path / f"ours_{tied}", parts), "llava_onevision", out)
        assert ("lm_head.weight" in stored(out)) != tied
        again, _ = load_pretrained(out)
        assert_same(parts[0], again)
        shared = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert shared == tied


# --- towers ---------------------------------------------------------------------------------------


def test_tower_inside_goes_before_its_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    expected, _ = load_pretrained(folders["llava_1_5"])
    folder = copy(folders["llava_1_5"], tmp_path / "copy")
    disturb(folder / "vision_tower/model.safetensors")
    assert_same(expected, load_pretrained(folder)[0])
    replaced, _ = load_pretrained(folder, vision_tower=folder / "vision_tower")
    table = "vision_tower.embeddings.class_embedding"
    assert torch.equal(replaced.state_dict()[table], expected.state_dict()[table] + 1)


def without_tower(source: Path, target: Path, *left_out: str, **changes: Any) -> Path:
    folder = copy(source, target, "*.safetensors", "*.index.json", *left_out, **changes)
    kept = {key: each for key, each in stored(source).items() if "vision_tower" not in key}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_tower_outside(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the checkpoint, then to here; else named; else one line says what to pass."""
    source = folders["llava_1_5"]
    expected, _ = load_pretrained(source)
    assert (source / "vision_tower/model.safetensors").is_file()
    folder = copy(source, tmp_path / "beside", "*.safetensors", "*.index.json")
    shutil.copytree(source / "vision_tower", folder / "vision_tower", dirs_exist_ok=True)
    kept = {key: each for key, each in stored(source).items() if "vision_tower" not in key}
    save_file(kept, folder / "model.safetensors")
    assert_same(expected, load_pretrained(folder)[0])
    bare = without_tower(source, tmp_path / "bare", "vision_tower", mm_vision_tower="towers/clip")
    with pytest.raises(UserError, match=r"'towers/clip' is not here: pass vision_tower=FOLDER"):
        load_pretrained(bare)
    assert_same(expected, load_pretrained(bare, vision_tower=source / "vision_tower")[0])
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers/clip").symlink_to(source / "vision_tower")
    monkeypatch.chdir(tmp_path)
    assert_same(expected, load_pretrained(bare)[0])


def test_tower_on_the_hub_without_a_network(folders: dict[str, Path], tmp_path: Path) -> None:
    name = "openai/clip-vit-large-patch14-336"
    folder = without_tower(
        folders["llava_1_5"], tmp_path / "copy", "vision_tower", mm_vision_tower=name
    )
    with pytest.raises(UserError, match=rf"its vision tower '{name}' is not here: pass") as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_absolute_path_of_another_machine(folders: dict[str, Path], tmp_path: Path) -> None:
    """The weights are inside, the shape is theirs."""
    path = "/elsewhere/towers/siglip-so400m-patch14-384"
    folder = copy(folders["llava_onevision"], tmp_path / "copy", mm_vision_tower=path)
    assert_same(load_pretrained(folders["llava_onevision"])[0], load_pretrained(folder)[0])


@pytest.mark.parametrize("whole", [False, True])
def test_local_siglip_is_known_by_its_own_configuration(whole: bool, tmp_path: Path) -> None:
    """Whatever the folder is called; the published code takes every local folder for CLIP."""
    parts = make(**SYSTEMS["llava_onevision"])
    export_checkpoint(save(tmp_path / "ours", parts), "llava_onevision", tmp_path / "out")
    folder = tmp_path / "clip"
    values = {key: value for key, value in tower(siglip=True).items() if key != "model_type"}
    torch.manual_seed(3)
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "vocab_size": 40}
        model = SiglipModel(SiglipConfig(vision_config=values, text_config=text))
    else:
        model = AutoModel.from_config(make_config(tower(siglip=True), "tower"))
    model.save_pretrained(folder)
    found, _ = load_pretrained(tmp_path / "out", vision_tower=folder)
    assert found.config.vision_config.model_type == "siglip_vision_model"
    table = (
        model.vision_model.embeddings.position_embedding.weight
        if whole
        else (model.embeddings.position_embedding.weight)
    )
    own = found.state_dict()["vision_tower.embeddings.position_embedding.weight"]
    assert torch.equal(own, table)


def shapes_of(name: str, layers: int, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a well-known tower, as a checkpoint holds them."""
    config = make_config({**KNOWN_TOWERS[name], **changes, "num_hidden_layers": layers}, "tower")
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return {
        VISION_PREFIX + key.removeprefix("vision_model."): tuple(each.shape)
        for key, each in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "layers"),
    [("clip-vit-large-patch14-336", 24), ("clip-vit-large-patch14", 24),
     ("siglip-so400m-patch14-384", 26)],
)  # fmt: skip
def test_shapes_of_published_towers_are_known(
    name: str, layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """From the weights they come out as published, without a guess where the name is known."""
    shapes = shapes_of(name, layers)
    expected = make_config(KNOWN_TOWERS[name], "tower")
    with caplog.at_level(logging.WARNING):
        found = tower_config_of_weights({"mm_vision_tower": f"x/{name}"}, shapes, VISION_PREFIX)
        assert not caplog.records
        blind = tower_config_of_weights({"mm_vision_tower": "./tower"}, shapes, VISION_PREFIX)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    for each in (found, blind):
        assert each is not None and each.to_dict() == expected.to_dict()
    assert tower_config_of_weights({}, {"lm_head.weight": (2, 2)}, VISION_PREFIX) is None


def test_guessed_heads_are_told(caplog: pytest.LogCaptureFixture) -> None:
    changes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    shapes = shapes_of("siglip-so400m-patch14-384", 11, **changes, patch_size=16, image_size=224)
    found = tower_config_of_weights({"mm_vision_tower": "./tower"}, shapes, VISION_PREFIX)
    assert found is not None
    assert (found.num_attention_heads, found.num_hidden_layers, found.image_size) == (12, 12, 224)
    assert "12 are taken; if that is wrong, pass vision_tower=FOLDER" in caplog.text


# --- projectors alone -----------------------------------------------------------------------------


@pytest.fixture
def first_stage(tmp_path: Path) -> dict[str, Path]:
    """A published first stage: projector, configuration, and elsewhere language model and tower."""
    parts = make(projector={"type": "linear"}, image={"strategy": "square", "layout": "flat"})
    save(tmp_path / "ours", parts)
    export_checkpoint(
        tmp_path / "ours", "llava_1_5", tmp_path / "whole", ExportOptions(check=False)
    )
    weights = stored(tmp_path / "whole")
    folder = tmp_path / "projector"
    folder.mkdir()
    values = json.loads((tmp_path / "whole/config.json").read_text())
    values |= {"tune_mm_mlp_adapter": True, "mm_vision_tower": str(tmp_path / "tower")}
    (folder / "config.json").write_text(json.dumps(values))
    torch.save({k: v for k, v in weights.items() if "projector" in k}, folder / "mm_projector.bin")
    language = AutoModelForCausalLM.from_config(parts[0].config.text_config)
    language.load_state_dict(
        {k: v for k, v in weights.items() if "projector" not in k and "vision" not in k}
    )
    language.save_pretrained(tmp_path / "base")
    for file in (tmp_path / "whole").glob("token*"):
        shutil.copy(file, tmp_path / "base")
    full = AutoModel.from_config(make_config(tower(), "tower"))
    full.save_pretrained(tmp_path / "tower")
    return {name: tmp_path / name for name in ("whole", "projector", "base", "tower")}


def test_projector_file_with_a_base(first_stage: dict[str, Path]) -> None:
    base, folder = first_stage["base"], first_stage["projector"]
    with pytest.raises(UserError, match=r"holds only mm_projector\.bin: pass base=FOLDER"):
        load_pretrained(folder)
    model, processor = load_pretrained(folder, base=base)
    whole, _ = load_pretrained(first_stage["whole"], vision_tower=first_stage["tower"])
    assert_same(model, whole)
    assert processor.template_name == model.config.template == "plain"


def test_rows_beside_a_projector_are_told(
    first_stage: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = first_stage["projector"] / "mm_projector.bin"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "model.embed_tokens.weight": torch.zeros(2, 64)}, file)
    model, _ = load_pretrained(first_stage["projector"], base=first_stage["base"])
    whole, _ = load_pretrained(first_stage["whole"], vision_tower=first_stage["tower"])
    assert_same(model, whole)
    assert "also holds model.embed_tokens.weight, which is not read" in caplog.text


def test_projector_of_another_language_model(first_stage: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((first_stage["base"] / "config.json").read_text())
    (first_stage["base"] / "config.json").write_text(json.dumps({**values, "hidden_size": 128}))
    with pytest.raises(UserError, match="has width 128, the projector was trained for 64"):
        load_pretrained(first_stage["projector"], base=first_stage["base"])


# --- tokens around an image -----------------------------------------------------------------------


def test_start_and_end_tokens(tmp_path: Path) -> None:
    """Models whose images stand between two learned tokens, which their tokenizer has."""
    parts = make(template="v1_im_start_end", text={**LANGUAGE, "vocab_size": 512})
    out = tmp_path / "out"
    quiet = ExportOptions(check=False)
    export_checkpoint(save(tmp_path / "ours", parts), "llava_1_5", out, quiet)
    assert json.loads((out / "config.json").read_text())["mm_use_im_start_end"] is True
    with pytest.raises(UserError, match="has no token <im_start>, which stands beside every image"):
        load_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(out)
    model, processor = load_pretrained(out)
    assert_same(parts[0], model)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    ids = processor(text=text, images=[picture(50, 50)])["input_ids"][0].tolist()
    start, end = processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    first = ids.index(start)
    assert ids[first + 1 : ids.index(end)] == [processor.image_token_id] * 16
    assert max(start, end) < 512


def test_forms_of_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """Shards of safetensors, shards of ``.bin`` as first published, one file."""
    expected, _ = load_pretrained(folders["llava_1_5"])
    weights = stored(folders["llava_1_5"])
    for binary in (False, True):
        folder = copy(
            folders["llava_1_5"], tmp_path / f"copy_{binary}", "*.safetensors", "*.index.json"
        )
        save_file(weights, folder / "model.safetensors")
        assert_same(expected, load_pretrained(folder)[0])
        split(folder, binary)
        assert_same(expected, load_pretrained(folder)[0])


def test_next_is_read_as_it_was_written(tmp_path: Path) -> None:
    parts = make(**SYSTEMS["llava_next"])
    export_checkpoint(save(tmp_path / "ours", parts), "original", tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert find_layout(values) is LLAVA_NEXT
    assert values["architectures"] == ["LlavaMistralForCausalLM"]
    assert values["image_grid_pinpoints"][1] == [38, 76]
    model, _ = load_pretrained(tmp_path / "out")
    assert_same(parts[0], model)
    assert model.config.image == parts[0].config.image
