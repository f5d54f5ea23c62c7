"""Our models in VLMEvalKit, against a stand-in with its interface."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_harness import importable, write_kit
from fixtures_model import ROOT, environment
from fixtures_tiny import picture

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.errors import UserError
from llava_uhd.eval.adapters import vlmevalkit, vlmevalkit_run
from llava_uhd.eval.protocols import PROTOCOLS, processor_for
from llava_uhd.text.prompting import prompt_text
from llava_uhd.text.templates import Turn

LETTER = "\nAnswer with the option's letter from the given choices directly."
SIX = "OCRBench MMMU_DEV_VAL SEEDBench_IMG MMBench_TEST_EN RealWorldQA HRBench4K".split()
NAN = float("nan")


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a.png", (70, 40)), ("b.png", (33, 90))):
        picture(*size, seed=len(name)).save(data / name)
    monkeypatch.setenv("LMUData", str(data))
    yield from importable(write_kit(tmp_path / "kit"), "vlmeval", monkeypatch)


@pytest.fixture
def model(kit: Path, tiny_checkpoint: Path) -> Any:
    return vlmevalkit.model_class()(model_path=str(tiny_checkpoint), dtype="float32")


def row(question: str = "What?", image: str = "a.png", **more: Any) -> dict[str, Any]:
    """A row of a table, with the empty cells that the kit leaves."""
    options = dict.fromkeys("ABCD", NAN)
    return {"index": 7, "question": question, "hint": NAN, "image": image, **options, **more}


def alone(
    checkpoint: Path, text: str, images: list[Path], protocol: str | None = None, beams: int = 1
) -> str:
    """The model's own answer."""
    model, processor = load_pretrained(checkpoint)
    if protocol:
        own = PROTOCOLS.get(protocol).images("ocrbench", processor.image_config)
        processor = processor_for(processor, own)
    prompt = prompt_text(processor.template, [Turn("human", text)])
    inputs = processor(text=[prompt], images=[list(images)])
    used = model.generate(**inputs, do_sample=False, max_new_tokens=8, num_beams=beams)
    new = used[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_of_the_published_data_sets(model: Any, kit: Path) -> None:
    assert list(vlmevalkit.PUBLISHED) == SIX
    assert all(model.use_custom_prompt(name) for name in SIX)
    assert not model.use_custom_prompt("MMStar") and not model.use_custom_prompt("POPE")
    image = {"type": "image", "value": str(kit.parent / "data/a.png")}
    choice = row(A="red", B="blue", hint="Look up.", answer="A", category="c")
    text = (
        "Hint: Look up.\nQuestion: What?\nOptions:\nA. red\nB. blue\n"
        f"Please select the correct answer from the options above. \n{LETTER}"
    )
    for name in SIX[1:]:
        assert model.build_prompt(choice, name) == [image, {"type": "text", "value": text}]
    plain = model.build_prompt(row("what is written?"), "OCRBench")
    assert plain == [image, {"type": "text", "value": "what is written?"}]
    chinese = model.build_prompt(row("什么?", A="红", B="蓝"), "MMBench_TEST_EN")
    assert chinese[1]["value"].endswith("above. \n\n请直接回答选项字母。")
    # An open question of MMMU asks for a letter too, as published.
    assert model.build_prompt(row(), "MMMU_DEV_VAL")[1]["value"] == f"Question: What?\n{LETTER}"


def test_places_of_mmmu(model: Any, kit: Path) -> None:
    question = row("Is <image 2> like <image 1>?", "a.png;b.png", A="yes", B="<image 2>")
    found = model.build_prompt(question, "MMMU_DEV_VAL")
    assert [part["value"].split("/")[-1] for part in found] == [
        *("Question: Is ", "b.png", " like ", "a.png", "?\nOptions:\nA. yes\nB. ", "b.png"),
        f"\nPlease select the correct answer from the options above. \n{LETTER}",
    ]
    one = vlmevalkit.first_image_only(found)
    assert one[0]["value"].endswith("b.png")
    assert one[1]["value"].startswith("Question: Is  like ?\nOptions:\nA. yes\nB. \nPlease")
    with pytest.raises(UserError, match="MMMU_DEV_VAL 7: names <image 3> of 1"):
        model.build_prompt(row("See <image 3>"), "MMMU_DEV_VAL")


def test_requests_of_other_data_sets(model: Any) -> None:
    def asked(text: str, dataset: str | None) -> str:
        (part,) = model.content([{"type": "text", "value": text}], dataset)
        return part["value"]

    short = "\nAnswer the question using a single word or phrase."
    assert asked("Is it?", "POPE") == f"Is it?{short}"
    assert asked("是吗?", "POPE") == "是吗?\n请用简单字母或短语回答问题"
    assert asked("Which?", "MMStar") == f"Which?{LETTER}"
    assert asked(f"Which?{LETTER}", "MMStar") == f"Which?{LETTER}"
    assert asked("Why?", "MMVet") == asked("Why?", None) == "Why?"


# --- answers --------------------------------------------------------------------------------------


def test_answers_as_the_model_alone(model: Any, kit: Path, tiny_checkpoint: Path) -> None:
    files = [kit.parent / "data" / name for name in ("a.png", "b.png")]
    model.decoding = vlmevalkit.Decoding(8)
    message = [{"type": "image", "value": str(file)} for file in files]
    message.append({"type": "text", "value": "What?"})
    assert model.generate(message, "MMVet") == alone(
        tiny_checkpoint, "<image>\n<image>\nWhat?", files
    )
    mixed = [{"type": "text", "value": "See "}, message[1], {"type": "text", "value": "!"}]
    given = [dict(part) for part in mixed]
    assert model.generate(mixed, "MMStar") == alone(
        tiny_checkpoint, f"See <image>\n!{LETTER}", files[1:]
    )
    assert mixed == given, "the kit's own message stays as it is"
    with pytest.raises(UserError, match="MMVet: .*gone.png"):
        model.generate([{"type": "image", "value": "gone.png"}, message[2]], "MMVet")


def test_published_protocol(kit: Path, tiny_checkpoint: Path) -> None:
    made = vlmevalkit.register(str(tiny_checkpoint), dtype="float32")
    assert made == ["llava_uhd", "llava_uhd2"]
    table = sys.modules["vlmeval.config"].supported_VLM
    published = table["llava_uhd2"]()
    assert published.decoding == vlmevalkit.Decoding(1024, 3)
    image = published.engine.processor.image_config
    assert (image.long_side, image.max_slices, image.bounded) == (1024, 9, False)
    own = table["llava_uhd"]()
    assert own.decoding == vlmevalkit.Decoding(1024, 1) and not own.one_image
    assert own.engine.processor.image_config.long_side is None
    published.decoding = vlmevalkit.Decoding(8, 3)
    files = [kit.parent / "data" / name for name in ("a.png", "b.png")]
    message = [{"type": "image", "value": str(file)} for file in files]
    message.append({"type": "text", "value": "What?"})
    assert published.generate(message, "MMVet") == alone(
        tiny_checkpoint, "<image>\nWhat?", files[:1], "uhd_v2", 3
    )


# --- the command ----------------------------------------------------------------------------------


def write_table(kit: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with (kit.parent / f"data/{name}.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows([{k: "" if v is NAN else v for k, v in row.items()} for row in rows])


def script(*words: str | Path, kit: Path | None, **more: str) -> subprocess.CompletedProcess[str]:
    known = environment(**{"VIRTUAL_ENV": sys.prefix, "NPROC": "1", **more})
    known.pop("VLMEVALKIT", None)
    if kit is not None:
        known["VLMEVALKIT"] = str(kit)
    return subprocess.run(
        ["sh", *map(str, words)],
        cwd=known["LMUData"],
        env=known,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.slow
def test_command(
    kit: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(kit, "OCRBench", [row("what is written?")])
    write_table(kit, "MMBench_TEST_EN", [row(A="red", B="blue", image="b.png")])
    run = (ROOT / "scripts/vlmevalkit.sh", tiny_checkpoint)
    out = tmp_path / "out"
    done = script(
        *(*run, "--data", "OCRBench,MMBench_TEST_EN", "--work-dir", out, "--verbose"), kit=kit
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(f"{out}/llava_uhd")
    assert "no scores of MMBench_TEST_EN:" in done.stderr
    tables = sorted(out.rglob("*.tsv"))
    assert [file.stem for file in tables] == ["llava_uhd_MMBench_TEST_EN", "llava_uhd_OCRBench"]
    for file in tables:
        (found,) = csv.DictReader(file.open(newline=""), delimiter="\t")
        assert found["index"] == "7" and found["prediction"]
    # A data set that is not there: the kit goes on and leaves with status 0.
    monkeypatch.setenv("VLMEVALKIT", str(kit))
    words = [str(tiny_checkpoint), "--data", "OCRBenchX", "--work-dir", str(out)]
    with pytest.raises(UserError, match=f"wrote no predictions of OCRBenchX under {out}"):
        vlmevalkit_run.main(words)


def test_commands_without_a_run(
    kit: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = script(ROOT / "VLMEvalKit/eval.sh", tiny_checkpoint, "--dry-run", kit=kit)
    assert published.returncode == 0, published.stderr
    line = f"vlmevalkit_run {tiny_checkpoint} --model llava_uhd2 --verbose --data {' '.join(SIX)}\n"
    assert published.stdout.endswith(line)
    for words in ((), ("--data", "OCRBench")):
        for file in ("VLMEvalKit/eval.sh", "scripts/vlmevalkit.sh"):
            bad = script(ROOT / file, *words, kit=kit)
            assert bad.returncode == 2 and "which checkpoint?" in bad.stderr
    monkeypatch.chdir(kit.parent)
    monkeypatch.delenv("VLMEVALKIT", raising=False)
    with pytest.raises(UserError, match="VLMEvalKit is no checkout of VLMEvalKit"):
        vlmevalkit_run.main([str(tiny_checkpoint), "--data", "X"])
