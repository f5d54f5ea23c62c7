"""Checkpoints written in published layouts, and published ones in ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_checkpoint import Parts, assert_same, logits, save, v2_folders
from fixtures_tiny import LLAMA, QWEN2, VISION, picture
from safetensors.torch import load_file

from llava_uhd import convert
from llava_uhd.checkpoint import export
from llava_uhd.checkpoint.differences import compare
from llava_uhd.checkpoint.export import TARGETS, ExportOptions, export_checkpoint
from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.manifest import write_manifest
from llava_uhd.checkpoint.parts import PROJECTOR_FILE, read_projector, save_projector
from llava_uhd.checkpoint.published import LAYOUTS, UHD_V2, find_layout
from llava_uhd.checkpoint.published.values import text_config, text_values
from llava_uhd.config.model import CompressionConfig, LlavaUHDConfig
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import IMAGE_MARKER

# Golden folder -> its layout.
CASES = {
    "uhd_v1": "uhd_v1",
    "full_llama": "uhd_v2",
    "full_llama_old": "uhd_v2_old",
    "full_qwen2": "uhd_v2",
}


@pytest.fixture(scope="module")
def folders(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    v2 = v2_folders(golden / "uhd_v2", tmp_path_factory.mktemp("uhd_v2"))
    return v2 | {"uhd_v1": golden / "uhd_v1/tiny_checkpoint"}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Parts]:
    return {name: load_pretrained(folder) for name, folder in folders.items()}


def assert_equal(first: Parts, second: Parts, run: bool = False) -> None:
    """The same weights, settings and ids, of a sliced picture; ``run``: and logits."""
    assert_same(first[0], second[0])
    if run:
        assert torch.equal(logits(*first), logits(*second))
    for part in ("image", "projector", "template", "select_layer"):
        assert getattr(first[0].config, part) == getattr(second[0].config, part), part
    text, image = "USER: <image>\nWhat?\nNow, where? ASSISTANT:", picture(700, 300)
    ids, again = (each[1](text=text, images=[image])["input_ids"] for each in (first, second))
    assert torch.equal(ids, again)


@pytest.mark.parametrize("name", CASES)
def test_published_to_ours_to_published(
    name: str, folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path
) -> None:
    ours = save(tmp_path / "ours", loaded[name])
    out = tmp_path / "out"
    notes = export_checkpoint(ours, CASES[name], out).notes
    assert [note for note in notes if "tokenizer.model" not in note] == []
    values = json.loads((out / "config.json").read_text())
    layout = find_layout(values, list(load_file(out / "model.safetensors")))
    assert layout is not None and layout.slug == CASES[name]
    assert_equal(loaded[name], load_pretrained(out), run=True)
    published = json.loads((folders[name] / "config.json").read_text())
    # Where it was trained, how it was stored, and by which version.
    published = {key: value for key, value in published.items() if key[0] != "_"}
    for key in ("mm_vision_tower", "torch_dtype", "transformers_version"):
        values.pop(key, None), published.pop(key)
    published["tokenizer_model_max_length"] = values["tokenizer_model_max_length"]
    assert {key: values[key] for key in published} == published
    for file in out.glob("*token*"):
        assert IMAGE_MARKER not in file.read_text(), file


@pytest.mark.parametrize("name", CASES)
def test_dead_weights_are_kept_on_request(
    name: str, folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path
) -> None:
    """Then the file is the published one, bit for bit: a strict reader misses nothing."""
    ours = save(tmp_path / "ours", loaded[name])
    options = ExportOptions(keep_unused=folders[name], dtype=torch.bfloat16)
    assert export_checkpoint(ours, CASES[name], tmp_path / "out", options).notes == []
    published = load_file(folders[name] / "model.safetensors")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == published.keys()
    for key, tensor in published.items():
        assert written[key].dtype == torch.bfloat16 and torch.equal(written[key], tensor), key
    for file in folders[name].glob("*token*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert_equal(loaded[name], load_pretrained(tmp_path / "out"))


def test_command(
    folders: dict[str, Path],
    loaded: dict[str, Parts],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Published to ours, ours to published, both by command; weights in several files."""
    monkeypatch.setattr(export, "MAX_SHARD", "300KB")

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        assert convert.main() == 0
        return capsys.readouterr().out

    ours, out = tmp_path / "ours", tmp_path / "out"
    run(folders["full_qwen2"], "--to", "llava_uhd", "--out", ours)
    values = json.loads((ours / "config.json").read_text())
    assert values["model_type"] == "llava_uhd" and values["dtype"] == "bfloat16"
    assert_equal(loaded["full_qwen2"], load_pretrained(ours))
    told = run(
        *(ours, "--to", "uhd_v2", "--out", out, "--keep-unused", folders["full_qwen2"]),
        *("--vision-tower", folders["full_qwen2"] / "clip-tiny-patch14-336"),
    )
    assert f"{ours} -> {out} (uhd_v2)" in told
    assert (
        len(list(out.glob("model-*.safetensors"))) > 2 and not (out / "clip-vision-tower").exists()
    )
    assert_equal(loaded["full_qwen2"], load_pretrained(out))


def test_projector_alone(
    folders: dict[str, Path], loaded: dict[str, Parts], tmp_path: Path
) -> None:
    """A first stage of ours becomes ``mm_projector.bin``."""
    model, processor = loaded["full_llama"]
    ours = tmp_path / "ours"
    ours.mkdir()
    save_projector(ours / PROJECTOR_FILE, model.projector.state_dict(), model.config)
    model.config.save_pretrained(ours)
    processor.save_pretrained(ours)
    write_manifest(ours, kind="projector", language_model=str(folders["full_llama"]))
    for name, keep in (("plain", None), ("strict", folders["full_llama"])):
        out = tmp_path / name
        export_checkpoint(ours, "uhd_v2", out, ExportOptions(keep_unused=keep))
        state = torch.load(out / "mm_projector.bin", weights_only=True)
        stored = load_file(folders["full_llama"] / "model.safetensors")
        whole = {key for key in stored if ".mm_projector." in key}
        missing = {key for key in whole if key not in state}
        assert bool(missing) == (keep is None)
        found = read_projector(out, model.config)
        for key, tensor in model.projector.state_dict().items():
            assert torch.equal(found[f"projector.{key}"], tensor)
        # The recorded language model brings the files that ours cannot write.
        assert (out / "tokenizer.model").is_file()
    assert {key for key in state if ".mm_projector." in key} == whole
    with pytest.raises(UserError, match="holds a projector only"):
        export_checkpoint(ours, "llava_uhd", tmp_path / "other")


# --- models of our own ----------------------------------------------------------------------------


def make(text: dict[str, Any] = LLAMA, siglip: bool = False, **options: Any) -> Parts:
    """A tiny model that keeps to the constants of the published code."""
    tokenizer = build_demo_tokenizer()
    vision = {**VISION, "patch_size": 14, "image_size": 56}
    if siglip:
        vision["model_type"] = "siglip_vision_model"
    image = {"scale_resolution": 384 if siglip else 336, "newline_id": 13, "max_slices": 9}
    config = LlavaUHDConfig(
        vision_config=vision,
        text_config={**text, "vocab_size": len(tokenizer)},
        image={**image, "bounded": False, **options.pop("image", {})},
        projector={"type": "hiwin", "scales": (1, 4), **options.pop("projector", {})},
        **options,
    )
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    torch.manual_seed(1)
    return LlavaUHDForConditionalGeneration(config).eval(), processor


SPATIAL = {"type": "spatial_resampler", "scales": (1,)}


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("uhd_v2", {"text": QWEN2, "siglip": True, "template": "qwen_1_5"}),
        ("uhd_v2", {"siglip": True, "projector": {"num_queries": 64, "scales": (1, 2, 4)}}),
        ("uhd_v2", {"projector": {"num_queries": 256, "scales": (1,)}}),
        ("uhd_v2", {"projector": {"scales": (1, 8)}, "template": "plain"}),
        (
            "uhd_v2",
            {"projector": {**SPATIAL, "num_queries": 64}, "text": QWEN2, "template": "qwen_1_5"},
        ),
        ("uhd_v2", {"projector": SPATIAL}),
        ("uhd_v2_old", {"image": {"layout": "rows"}, "projector": {"scales": (1, 2)}}),
        ("uhd_v2_old", {"image": {"layout": "rows"}, "projector": SPATIAL}),
        ("uhd_v2", {"text": {**LLAMA, "tie_word_embeddings": True}}),
    ],
)  # fmt: skip
def test_models_of_ours(target: str, options: dict[str, Any], tmp_path: Path) -> None:
    parts = make(**options)
    ours = save(tmp_path / "ours", parts)
    export_checkpoint(ours, target, tmp_path / "out")
    family = "siglip" if options.get("siglip") else "clip"
    assert (tmp_path / f"out/{family}-vision-tower/config.json").is_file()
    again = load_pretrained(tmp_path / "out")
    # Not recorded: in the old dialect the table rests after the first stage.
    again[0].config.projector.train_positions = True
    assert_equal(parts, again, run=options.get("siglip", False))


def test_settings_that_the_layout_does_not_say(tmp_path: Path) -> None:
    ours = save(tmp_path / "ours", make(image={"bounded": True, "max_slices": 7}))
    notes = export_checkpoint(ours, "uhd_v2", tmp_path / "out").notes
    assert notes[0] == "image.max_slices is 7, the layout means 9"
    assert notes[1] == "image.bounded is True, the layout means False"
    assert len(notes) == 3 and "tokenizer.model" in notes[2]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("uhd_v2_old", {}, r"image\.layout is slices, the layout means rows"),
        ("uhd_v2", {"image": {"layout": "rows"}}, r"layout is rows, the layout means slices"),
        ("uhd_v1", {}, "holds a spatial_resampler of 144 queries, not a hiwin of 144"),
        ("uhd_v2", {"projector": {"num_queries": 81}}, "not a hiwin of 81"),
        ("uhd_v2", {"projector": {"num_heads": 2}}, r"projector\.num_heads is 2, .* means 1"),
        ("uhd_v2", {"projector": {"layer_norm_eps": 1e-5}}, r"projector\.layer_norm_eps"),
        ("uhd_v2", {"image": {"scale_resolution": 448}}, r"scale_resolution is 448, .* means 336"),
        ("uhd_v2", {"image": {"strategy": "squeeze"}}, r"image\.strategy is squeeze"),
        ("uhd_v2", {"image": {"newline_id": 14}}, r"image\.newline_id is 14, .* means 13"),
        ("uhd_v2", {"siglip": True, "select_layer": -1}, "select_layer is -1, .* means -2"),
        ("uhd_v2", {"image": {"detail_side": 9}}, r"image\.detail_side is 9"),
        ("uhd_v2_old", {"text": QWEN2, "image": {"layout": "rows"}}, "holds Llama .* only"),
        ("uhd_v2", {"text": {**LLAMA, "model_type": "qwen3", "head_dim": 16}}, "no 'qwen3'"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_hold(
    target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ours = save(tmp_path / "ours", make(**options))
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(ours, target, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_compression_is_left_to_who_loads_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are those of an ordinary model; that it compresses is told, not lost."""
    model, processor = make()
    model.config.compression = CompressionConfig("avgpool1d", 2, 8)
    export_checkpoint(save(tmp_path / "ours", (model, processor)), "uhd_v2", tmp_path / "out")
    assert "avgpool1d" in caplog.text and "--compression.layer 2" in caplog.text
    assert load_pretrained(tmp_path / "out")[0].config.compression == CompressionConfig()


def test_separators_of_a_new_training_are_no_constants() -> None:
    """A Qwen2 model trained here has its own comma and newline; the published code would not."""
    values = {"model_type": "llava_qwen", "mm_projector_type": "adapt_spatial_resampler_v2"}
    vision = LlavaUHDConfig().vision_config
    config = UHD_V2.make_config({**values, "vocab_size": 152064}, vision, [])
    config.image.comma_id, config.image.newline_id = 11, 198
    with pytest.raises(UserError, match=r"comma_id is 11, .* 29892; image\.newline_id is 198"):
        compare(UHD_V2, {**values, "vocab_size": 152064}, config, [], None)  # type: ignore[arg-type]


def test_rotary_settings_survive() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    config = LlavaUHDConfig(text_config={**LLAMA, "vocab_size": 8, "rope_parameters": scaling})
    values = text_values(config)
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert text_config(values).rope_parameters == config.text_config.rope_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "uhd_v3"}, r"unknown layout 'uhd_v3'; did you mean 'uhd_v\d'"),
        ({"out": "ours"}, "is not empty: choose another folder"),
        ({"keep_unused": "nothing"}, "has no published weights"),
        ({"keep_unused": "ours"}, "are not part of the LLaVA-UHD v2 layout"),
        ({"tokenizer": "nothing"}, "has no tokenizer files"),
    ],
)
def test_mistakes(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    save(tmp_path / "ours", make())
    (tmp_path / "nothing").mkdir()
    places = {key: tmp_path / name for key, name in changes.items() if key != "target"}
    out = places.pop("out", tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint(
            tmp_path / "ours", changes.get("target", "uhd_v2"), out, ExportOptions(**places)
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "the same command, mended, must find no remains"


def test_every_layout_can_be_written() -> None:
    slugs = [layout.slug for layout in LAYOUTS]
    assert len(set(slugs)) == len(slugs) and TARGETS == (*slugs, "llava_uhd", "original")
