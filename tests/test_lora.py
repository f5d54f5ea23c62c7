"""Adapters on disk: written, found, merged, refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import logits, save
from fixtures_lora import LANGUAGES, adapted, adapted_tiny
from fixtures_tiny import LLAMA, VISION, tiny_parts
from safetensors.torch import load_file, save_file

from llava_uhd import convert, merge_lora
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.lora import is_lora
from llava_uhd.checkpoint.lora_layers import LoraLayer, path_pattern
from llava_uhd.checkpoint.lora_merge import merge_folder
from llava_uhd.checkpoint.manifest import MANIFEST_FILE, read_manifest
from llava_uhd.checkpoint.sources import find_checkpoint
from llava_uhd.errors import UserError

pytest.importorskip("peft")

CLOSE = 1e-5


def difference(first: Any, second: Any) -> float:
    return float((logits(*first) - logits(*second)).abs().max())


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", LANGUAGES)
def test_loads_merged_and_beside(tmp_path: Path, name: str, dora: bool) -> None:
    trained = adapted_tiny(tmp_path, LANGUAGES[name], dora=dora)
    base = load_pretrained(tmp_path / "base")
    assert difference(trained, base) > 0.1, "the adapter must matter"
    merged = load_pretrained(tmp_path / "lora")
    assert difference(trained, merged) <= CLOSE
    assert not [key for key in merged[0].state_dict() if "lora_" in key]
    beside = load_pretrained(tmp_path / "lora", merge_lora=False)
    assert difference(trained, beside) == 0
    assert [key for key in beside[0].state_dict() if "lora_A" in key]
    assert not any(p.requires_grad for name, p in beside[0].named_parameters() if "lora_" in name)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_equals_peft(settings: dict[str, bool], dtype: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 40)).to(dtype)
    weight = net[0].weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], **settings)
    wrapped = get_peft_model(net, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    layer = wrapped.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = None
    if settings.get("use_dora"):
        magnitude = layer.lora_magnitude_vector["default"].weight.detach() * 1.5
        layer.lora_magnitude_vector["default"].weight.data = magnitude
    scaling = 12 / (2 if settings.get("use_rslora") else 4)
    ours = LoraLayer(a.detach(), b.detach(), scaling, magnitude).merge(weight)
    theirs = wrapped.merge_and_unload()[0].weight
    assert ours.dtype == theirs.dtype == dtype
    # In half precision theirs is rounded more than once.
    assert (ours - theirs).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2)


def test_merges_in_the_wanted_dtype(tmp_path: Path) -> None:
    adapted_tiny(tmp_path)
    model, _ = load_pretrained(tmp_path / "lora", dtype="bfloat16")
    exact, _ = load_pretrained(tmp_path / "lora")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name


def test_patterns_of_rank_and_scale(tmp_path: Path) -> None:
    """Other ranks and scales in some layers, as PEFT writes them."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, processor = tiny_parts()
    save(tmp_path / "base", (model, processor))
    language = model.language_model
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
        alpha_pattern={"up_proj": 16},
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(language, config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    out = tmp_path / "lora"
    wrapped.save_pretrained(out)
    assert isinstance(wrapped, PeftModel)
    model.config.save_pretrained(out)
    processor.save_pretrained(out)
    projector = {f"projector.{key}": value for key, value in model.projector.state_dict().items()}
    save_file(projector, out / "non_lora_trainables.safetensors")
    model.language_model = wrapped.get_base_model()
    for merge in (True, False):
        loaded = load_pretrained(out, base=tmp_path / "base", merge_lora=merge)
        assert difference((model, processor), loaded) <= CLOSE


def test_path_pattern() -> None:
    names = {f"m.layers.{i}.a.q" for i in range(3)}
    others = {*names, "m.layers.0.a", "m.layers.0.b.q", "tower.m.layers.0.a.q"}
    assert path_pattern(names, others) == r"m\.layers\.\d+\.a\.q"
    some = path_pattern({"m.layers.0.a.q"}, others)
    assert some == r"m\.layers\.0\.a\.q", "not every layer: spelt out"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGES)
def test_peft_reads_our_adapter_on_the_language_model(tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    model, processor = adapted_tiny(tmp_path, LANGUAGES[name])
    keys = set(load_file(tmp_path / "lora/adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    base, _ = load_pretrained(tmp_path / "base")
    alone = PeftModel.from_pretrained(base.language_model, str(tmp_path / "lora"))
    merged = alone.merge_and_unload()
    model.language_model = merged
    assert difference((model, processor), load_pretrained(tmp_path / "lora")) <= CLOSE


def test_folder_describes_itself(tmp_path: Path) -> None:
    adapted_tiny(tmp_path)
    out = tmp_path / "lora"
    assert is_lora(out) and not is_lora(tmp_path / "base")
    values = json.loads((out / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "base")
    assert (values["r"], values["lora_alpha"], values["lora_dropout"]) == (4, 8, 0.05)
    assert values["target_modules"].startswith(r"model\.layers\.\d+\.")
    learned = load_file(out / "non_lora_trainables.safetensors")
    assert {key.partition(".")[0] for key in learned} == {"projector"}
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava_uhd"


def test_newest_model_may_be_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted_tiny(tmp_path / "checkpoints/run")
    shutil.rmtree(tmp_path / "checkpoints/run/base")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint() == Path("checkpoints/run/lora")


def test_language_model_as_base(tmp_path: Path) -> None:
    """The base may also be the parts: a language model and a tower beside it."""
    trained = adapted_tiny(tmp_path)
    base, processor = load_pretrained(tmp_path / "base")
    base.language_model.save_pretrained(tmp_path / "language")
    processor.tokenizer.save_pretrained(tmp_path / "language")
    tower = {f"encoder.{k}" if k.startswith("layers.") else k: v
             for k, v in base.vision_tower.state_dict().items()}  # fmt: skip
    (tmp_path / "tower").mkdir()
    save_file(tower, tmp_path / "tower/model.safetensors", metadata={"format": "pt"})
    base.config.vision_config.save_pretrained(tmp_path / "tower")
    given = {"base": tmp_path / "language", "vision_tower": tmp_path / "tower"}
    assert difference(trained, load_pretrained(tmp_path / "lora", **given)) <= CLOSE
    file = tmp_path / "lora" / MANIFEST_FILE
    facts = {"kind": "lora", "language_model": str(given["base"])}
    file.write_text(json.dumps({**facts, "vision_tower": str(given["vision_tower"])}))
    assert difference(trained, load_pretrained(tmp_path / "lora")) <= CLOSE
    file.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="vision tower is not here.*pass vision_tower=FOLDER"):
        load_pretrained(tmp_path / "lora")


def test_adapter_on_an_adapter(tmp_path: Path) -> None:
    adapted_tiny(tmp_path / "first")
    model, processor = load_pretrained(tmp_path / "first/lora")
    trained = adapted(tmp_path / "second/unused", tmp_path / "second/lora", (model, processor))
    loaded = load_pretrained(tmp_path / "second/lora", base=tmp_path / "first/lora")
    assert difference(trained, loaded) <= 2 * CLOSE


def test_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trained = adapted_tiny(tmp_path)
    model, processor = load_pretrained(tmp_path / "lora", quantization="8bit")
    assert [key for key in model.state_dict() if "lora_A" in key], "never merged into rounded ones"
    kinds = {type(module).__name__ for module in model.language_model.modules()}
    assert "Linear8bitLt" in kinds
    close = difference(trained, (model, processor))
    base = load_pretrained(tmp_path / "base", quantization="8bit")
    assert close < 0.5 * difference(trained, base)
    before, _ = load_pretrained(tmp_path / "lora", quantization="8bit", merge_lora=True)
    assert not [key for key in before.state_dict() if "lora_A" in key], "merged, then quantised"


# --- whole models ---------------------------------------------------------------------------------


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    assert command.main() == 0


def test_merge_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = adapted_tiny(tmp_path, dora=True)
    (tmp_path / "lora" / MANIFEST_FILE).unlink()  # PEFT's own record names the base, too
    whole = tmp_path / "whole"
    run(merge_lora, monkeypatch, tmp_path / "lora", "--out", whole)
    shutil.rmtree(tmp_path / "base")
    assert difference(trained, load_pretrained(whole)) <= CLOSE
    facts = read_manifest(whole)
    assert (facts["kind"], facts["source"]) == ("model", str(tmp_path / "lora"))
    with pytest.raises(UserError, match="is not empty"):
        run(merge_lora, monkeypatch, tmp_path / "lora", "--out", whole)
    with pytest.raises(UserError, match="holds no adapter to merge"):
        run(merge_lora, monkeypatch, whole, "--out", tmp_path / "again")


def test_merged_model_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The published layout has these numbers as constants.
    parts = tiny_parts(
        vision={**VISION, "image_size": 336, "patch_size": 14},
        image={"scale_resolution": 336, "patch_size": 14, "bounded": False},
        projector={"num_queries": 144},
    )
    trained = adapted(tmp_path / "base", tmp_path / "lora", parts)
    run(merge_lora, monkeypatch, tmp_path / "lora", "--out", tmp_path / "whole")
    for source in ("whole", "lora"):
        out = tmp_path / f"published_{source}"
        run(convert, monkeypatch, tmp_path / source, "--to", "uhd_v1", "--out", out)
        assert difference(trained, load_pretrained(out)) <= CLOSE


def test_merge_keeps_the_precision_of_the_base(tmp_path: Path) -> None:
    adapted_tiny(tmp_path)
    base, _ = load_pretrained(tmp_path / "base", dtype="bfloat16")
    base.save_pretrained(tmp_path / "base")
    merge_folder(tmp_path / "lora", tmp_path / "whole")
    state = load_file(tmp_path / "whole/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    merge_folder(tmp_path / "lora", tmp_path / "exact", dtype=torch.float32)
    state = load_file(tmp_path / "exact/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


# --- refusals -------------------------------------------------------------------------------------


def change_settings(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


FIRST = "base_model.model.model.layers.0.mlp.down_proj"
BREAKS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors or"),
    (lambda f: (f / "non_lora_trainables.safetensors").unlink(), r"has no non_lora_trainables\.sa"),
    (lambda f: (f / "config.json").unlink(), r"has no config\.json, which says"),
    (lambda f: (f / "processor_config.json").unlink(), r"processor_config\.json does not exist"),
    (lambda f: change_settings(f, base_model_name_or_path=None) or (f / MANIFEST_FILE).unlink(),
     r"does not name its base .*pass base=FOLDER"),
    (lambda f: (f / MANIFEST_FILE).write_text('{"checkpoint": "gone/away"}'),
     r"adapter for 'gone/away', which is not here.*pass base=FOLDER"),
    (lambda f: change_settings(f, peft_type="IA3"), r"kind IA3, only LORA"),
    (lambda f: change_settings(f, r=8), r"has rank 4, adapter_config\.json says 8"),
    (lambda f: change_settings(f, r="four"), r"r must be a number above 0, got 'four'"),
    (lambda f: change_settings(f, layer_replication=[[0, 2]]), r"'layer_replication' are not read"),
    (lambda f: rewrite(f, lambda s: s.pop(f"{FIRST}.lora_B.weight")), r"only one of lora_A and"),
    (lambda f: rewrite(f, lambda s: s.clear()), r"holds no adapter"),
    (lambda f: rewrite(f, lambda s: s.update({"x.lora_embedding_A": torch.ones(1)})),
     r"no adapter of a linear layer"),
    (lambda f: rewrite(f, lambda s: s.update(
        {f"base_model.model.other.lora_{k}.weight": torch.ones(4, 4) for k in "AB"})),
     r"1 unknown weights: other\.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    adapted_tiny(tmp_path)
    damage(tmp_path / "lora")
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path / "lora")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({**LLAMA, "hidden_size": 32}, r"other shapes: .*the adapter is for \(.*recorded"),
        ({**LLAMA, "num_hidden_layers": 1}, r"layers that it lacks: language_model\.model\.layers"),
    ],
)
def test_adapter_of_another_model(tmp_path: Path, text: dict[str, Any], message: str) -> None:
    adapted_tiny(tmp_path)
    save(tmp_path / "other", tiny_parts(text=text))
    with pytest.raises(UserError, match=f"does not fit .*{message}"):
        load_pretrained(tmp_path / "lora", base=tmp_path / "other")


def test_another_base_of_the_same_shape_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted_tiny(tmp_path)
    load_pretrained(tmp_path / "lora")
    save(tmp_path / "half", load_pretrained(tmp_path / "base", dtype="bfloat16"))
    load_pretrained(tmp_path / "lora", base=tmp_path / "half")
    assert not caplog.records
    save(tmp_path / "other", tiny_parts(seed=5))
    with caplog.at_level(logging.WARNING):
        load_pretrained(tmp_path / "lora", base=tmp_path / "other")
    assert "was trained on another model of this shape" in caplog.text


def test_whole_weights_are_no_adapter(tmp_path: Path) -> None:
    """Left-over adapter files beside a whole model do not change what it is."""
    adapted_tiny(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "lora" / name, tmp_path / "base")
    assert not is_lora(tmp_path / "base")
    load_pretrained(tmp_path / "base")
