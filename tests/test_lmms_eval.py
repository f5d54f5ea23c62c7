"""The plug-in for lmms-eval, against a stand-in with its interface."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_harness import importable, write_lmms
from fixtures_model import ROOT
from fixtures_tiny import picture
from PIL import Image

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.errors import UserError
from llava_uhd.eval.adapters import lmms_eval as plugin
from llava_uhd.eval.adapters.engine import read_decoding
from llava_uhd.text.prompting import prompt_text
from llava_uhd.text.templates import Turn

PICTURES = [picture(40 + 25 * i, 64 - 8 * i, seed=i) for i in range(5)]
TOKENS = 6


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    plugin._classes.cache_clear()
    yield from importable(write_lmms(tmp_path / "stub"), "lmms_eval", monkeypatch)
    plugin._classes.cache_clear()


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> Any:
    return load_pretrained(tiny_checkpoint)


@pytest.fixture
def alone(parts: Any) -> Callable[..., str]:
    """The model's own answer to one question: text with markers, images, videos."""
    model, processor = parts

    def answer(text: str | list[Turn], images: Any = (), videos: Any = (), **more: Any) -> str:
        turns = [Turn("human", text)] if isinstance(text, str) else text
        prompt = prompt_text(more.pop("template", processor.template), turns)
        used = more.pop("processor", processor)
        inputs = used(
            text=[prompt],
            images=[list(images)] if images else None,
            videos=[list(videos)] if videos else None,
        )
        options = {"max_new_tokens": TOKENS, "do_sample": False, **more}
        rows = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.batch_decode(rows, skip_special_tokens=True)[0].strip()

    return answer


def make(kind: str, checkpoint: Path, documents: list[Any], **options: Any) -> Any:
    made = getattr(plugin, kind)(pretrained=str(checkpoint), dtype="float32", **options)
    made.task_dict = {"toy": {"test": documents}}
    return made


def simple(documents: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Requests of the simple kind, one for each document."""
    shared = {"max_new_tokens": TOKENS, "until": ["\n\n"], **options}
    return [
        SimpleNamespace(
            args=(
                each["text"],
                dict(each.get("options", shared)),
                lambda document: document["visuals"],
                *(index, "toy", "test"),
            ),
            metadata=each.get("metadata", {}),
        )
        for index, each in enumerate(documents)
    ]


def chat(documents: list[dict[str, Any]]) -> list[Any]:
    """Requests of the chat kind."""
    options = {"max_new_tokens": TOKENS, "until": ["\n\n"]}
    return [
        SimpleNamespace(
            args=(
                "context",
                lambda document: document["messages"],
                dict(options),
                *(index, "toy", "test"),
            ),
            metadata=each.get("metadata", {}),
        )
        for index, each in enumerate(documents)
    ]


def user(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A message: texts, pictures, and (kind, value) pairs."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, tuple):
            content.append({"type": part[0], "url": part[1]})
        else:
            content.append({"type": "image", "url": part})
    return {"role": role, "content": content}


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "clip.frames"
    folder.mkdir()
    for index in range(3):
        picture(48, 32, seed=20 + index).save(folder / f"{index}.png")
    return folder


# --- how the harness finds it ---------------------------------------------------------------------


def test_import_needs_no_harness() -> None:
    code = "import llava_uhd.eval.adapters.lmms_eval, llava_uhd.eval.adapters.vlmevalkit, sys"
    code += "; print({'lmms_eval', 'vlmeval'} & set(sys.modules))"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_entry_point_leads_to_both_classes(harness: Path) -> None:
    (point,) = [p for p in entry_points(group="lmms_eval.models") if p.dist.name == "stub"]
    found = point.load()()
    assert (point.name, found.model_id) == ("llava_uhd", "llava_uhd")
    from lmms_eval.api.model import lmms

    for path, is_simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, name = path.rsplit(".", 1)
        made = getattr(importlib.import_module(module), name)
        assert issubclass(made, lmms) and not made.__abstractmethods__
        assert made.is_simple is is_simple
        assert made is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError):
        plugin.LlavaUHDOther  # noqa: B018


# --- simple ---------------------------------------------------------------------------------------


def test_simple_answers_as_the_model_alone(
    harness: Path, tiny_checkpoint: Path, alone: Callable[..., str], frames: Path
) -> None:
    array = np.asarray(PICTURES[3])
    documents: list[dict[str, Any]] = [
        {"text": "What is red?", "visuals": [PICTURES[0]]},
        {"text": "Which of both is the larger picture?", "visuals": PICTURES[1:3]},
        {"text": "Say something.", "visuals": None},
        {"text": "Say more.", "visuals": []},
        {"text": "Is <image> like <image>?", "visuals": PICTURES[:2]},
        {"text": "What happens?", "visuals": [str(frames)]},
        {"text": "And here?", "visuals": [array]},
        {"text": "Two <image> and one given", "visuals": [PICTURES[4], PICTURES[2]]},
    ]
    expected = [
        alone("<image>\nWhat is red?", PICTURES[:1]),
        alone("<image>\n<image>\nWhich of both is the larger picture?", PICTURES[1:3]),
        alone("Say something."),
        alone("Say more."),
        alone("Is <image> like <image>?", PICTURES[:2]),
        alone("<video>\nWhat happens?", videos=[frames]),
        alone("<image>\nAnd here?", [PICTURES[3]]),
        alone("<image>\n<image>\nTwo  and one given", [PICTURES[4], PICTURES[2]]),
    ]
    assert len(set(expected)) > 5, "the questions must be told apart"
    for size in (1, 3, "8"):
        model = make("LlavaUHDSimple", tiny_checkpoint, documents, batch_size=size)
        assert model.generate_until(simple(documents)) == expected
        seen = {request[0]: answer for _, request, answer in model.cache_hook.seen}
        assert seen == {each["text"]: text for each, text in zip(documents, expected)}
    assert (model.batch_size, model.rank, model.world_size) == (8, 0, 1)
    assert model.generate_until([]) == []


def test_options_of_requests(
    harness: Path, tiny_checkpoint: Path, alone: Callable[..., str]
) -> None:
    text, images = "What is red?", [PICTURES[0]]
    whole = alone(f"<image>\n{text}", images, max_new_tokens=12)
    stop = whole[4:6]
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 12},
        {"max_new_tokens": 3, "temperature": 0, "top_p": None},
        {"max_new_tokens": 12, "until": stop},
        {"max_new_tokens": 12, "until": [stop, "\n\n"], "do_sample": False, "temperature": 0.5},
        {"max_new_tokens": 5, "num_beams": 3},
        {"max_new_tokens": 12},
    ]
    documents = [{"text": text, "visuals": images, "options": each} for each in options]
    model = make("LlavaUHDSimple", tiny_checkpoint, documents, batch_size=2)
    cut = whole[: whole.index(stop)].strip()
    assert model.generate_until(simple(documents)) == [
        whole,
        alone(f"<image>\n{text}", images, max_new_tokens=3),
        *(cut, cut),
        alone(f"<image>\n{text}", images, max_new_tokens=5, num_beams=3),
        whole,
    ]


def test_decoding() -> None:
    assert read_decoding({}) == read_decoding({"until": None, "temperature": 0, "top_p": 0.9})
    assert read_decoding({"until": ["\n\n"]}).stops == ()  # stands there where a task has none
    assert read_decoding({"until": ["\n", "\n\n"]}).stops == ("\n",)
    sampled = read_decoding({"temperature": 0.2, "top_p": 0.7, "max_new_tokens": 16})
    assert sampled.sampling == {"do_sample": True, "temperature": 0.2, "top_p": 0.7}
    assert not read_decoding({"temperature": 0.2, "do_sample": False}).sampling
    for bad in ({"max_new_tokens": "many"}, {"num_beams": -1}):
        with pytest.raises(UserError):
            read_decoding(bad)


def test_frames_as_images(harness: Path, tiny_checkpoint: Path, alone: Callable[..., str]) -> None:
    clip = [picture(48, 32, seed=40 + i) for i in range(6)]
    metadata = {"task_type": "video", "sample_frames": 3}
    expected = alone("<video>\nWhat?", videos=[[clip[0], clip[2], clip[5]]])
    documents = [{"text": "What?", "visuals": clip, "metadata": metadata}]
    made = make("LlavaUHDSimple", tiny_checkpoint, documents)
    assert made.generate_until(simple(documents)) == [expected]
    talks = [{"messages": [user(*clip, "What?")], "metadata": metadata}]
    made = make("LlavaUHDChat", tiny_checkpoint, talks)
    assert made.generate_until(chat(talks)) == [expected]


def test_a_failing_question_is_named_after_the_others(
    harness: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    documents = [
        {"text": "one", "visuals": [PICTURES[0]]},
        {"text": "two", "visuals": [str(broken)]},
        {"text": "three", "visuals": [{"neither": "path nor bytes"}]},
        {"text": "four", "visuals": []},
    ]
    model = make("LlavaUHDSimple", tiny_checkpoint, documents, batch_size=4)
    with pytest.raises(UserError, match=r"2 of 4 questions failed: toy [12]: .*and 1 more"):
        model.generate_until(simple(documents))
    answered = {request[0] for _, request, _ in model.cache_hook.seen}
    assert answered == {"one", "four"}


def test_likelihood(harness: Path, tiny_checkpoint: Path, parts: Any) -> None:
    model, processor = parts
    documents = [{"visuals": [PICTURES[0]], "answer": "a cup"}, {"visuals": [], "answer": "blue"}]
    made = make("LlavaUHDSimple", tiny_checkpoint, documents)
    targets: list[Any] = ["a red cup", lambda document: document["answer"]]
    requests = [
        SimpleNamespace(args=("Which?", target, lambda d: d["visuals"], index, "toy", "test"))
        for index, target in enumerate(targets)
    ]
    found = made.loglikelihood(requests)
    cases = [("<image>\nWhich?", "a red cup", [PICTURES[0]]), ("Which?", "blue", [])]
    for (loss, greedy), (text, answer, images) in zip(found, cases, strict=True):
        turns = [Turn("human", text), Turn("gpt", answer)]
        sample = processor.encode_conversation(turns, images)
        with torch.no_grad():
            inputs = {k: sample[k] for k in ("pixel_values", "view_grids") if k in sample}
            ids, labels = sample["input_ids"][None], sample["labels"][None]
            expected = model(input_ids=ids, labels=labels, **inputs).loss
        assert loss == pytest.approx(float(expected), rel=1e-4)
        assert greedy is False
    with pytest.raises(UserError, match="rounds"):
        made.generate_until_multi_round(requests)


# --- chat -----------------------------------------------------------------------------------------


def test_chat_answers_as_the_model_alone(
    harness: Path, tiny_checkpoint: Path, alone: Callable[..., str], frames: Path
) -> None:
    first, second = PICTURES[:2]
    clip = [Image.open(path) for path in sorted(frames.iterdir())]
    talks: list[list[dict[str, Any]]] = [
        [user(first, "What is red?")],
        [user("Compare ", first, "with ", second, "please.")],
        [user(first, second, "Is <image> like <image>?")],
        [user("Be brief.", role="system"), user("Why?")],
        [user(first, "One?"), user("Yes.", role="assistant"), user(second, "Two?")],
        [user(("video", str(frames)), "What happens?")],
        [user(("video", clip), "What happens?", ("image", first))],
    ]
    pair = [Turn("human", "<image>\nOne?"), Turn("gpt", "Yes."), Turn("human", "<image>\nTwo?")]
    expected = [
        alone("<image>\nWhat is red?", [first]),
        alone("Compare <image>\nwith <image>\nplease.", [first, second]),
        alone("Is <image> like <image>?", [first, second]),
        alone("Be brief.\nWhy?"),
        alone(pair, [first, second]),
        alone("<video>\nWhat happens?", videos=[frames]),
        alone("<video>\nWhat happens?<image>\n", [first], [clip]),
    ]
    assert len(set(expected)) > 5
    documents = [{"messages": talk} for talk in talks]
    for size in (1, 4):
        model = make("LlavaUHDChat", tiny_checkpoint, documents, batch_size=size)
        assert model.generate_until(chat(documents)) == expected
    bad = [[user(("audio", "a.wav"), "What?")], [user("I?"), user("You.", role="assistant")]]
    for talk in bad:
        model.task_dict = {"toy": {"test": [{"messages": talk}]}}
        with pytest.raises(UserError, match="sound|end with a message"):
            model.generate_until(chat([{}]))


# --- model_args -----------------------------------------------------------------------------------


def test_model_args(
    harness: Path, tiny_checkpoint: Path, parts: Any, alone: Callable[..., str], frames: Path
) -> None:
    published = {"conv_template": "qwen_1_5", "model_name": "llava_qwen", "device_map": "auto"}
    documents = [{"text": "What?", "visuals": [PICTURES[0]]}]
    model = make(
        *("LlavaUHDSimple", tiny_checkpoint, documents),
        **published,
        attn_implementation="eager",
        max_batch_size=None,
    )
    assert model.engine.processor.template_name == "qwen_1_5"
    assert model.model.config.text_config._attn_implementation == "eager"
    template = model.engine.processor.template
    assert model.generate_until(simple(documents)) == [
        alone("<image>\nWhat?", [PICTURES[0]], template=template)
    ]
    for option, forced in (("max_frames", False), ("max_frames_num", True)):
        made = make("LlavaUHDSimple", tiny_checkpoint, [], **{option: 2}, device_map="cpu")
        video = made.engine.processor.video_config
        assert (video.max_frames, video.force_sample) == (2, forced)
        assert made.device.type == "cpu" and made.model.dtype == torch.float32
        clip = [{"text": "What?", "visuals": [str(frames)]}]
        made.task_dict = {"toy": {"test": clip}}
        processor = made.engine.processor
        assert made.generate_until(simple(clip)) == [
            alone("<video>\nWhat?", videos=[frames], processor=processor)
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pretrained=CHECKPOINT_DIR is missing"),
        ({"pretrained": "/nowhere", "frames": 3}, "unknown option frames"),
        ({"pretrained": "/nowhere", "max_frames": "few"}, "few"),
        ({"pretrained": "/nowhere", "batch_size": 0}, "batch_size 0"),
        ({"pretrained": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_mistakes(harness: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plugin.LlavaUHDChat(**options)
