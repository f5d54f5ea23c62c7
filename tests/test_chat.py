"""One conversation: streaming, turns, images, stops, errors; and the terminal around it."""

from __future__ import annotations

import functools
import io
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_model import environment
from fixtures_tiny import picture, tiny_parts
from hypothesis import given
from hypothesis import strategies as st

from llava_uhd.errors import UserError
from llava_uhd.model.devices import choose_device, choose_dtype
from llava_uhd.serve.chat import ChatEngine, Conversation, Sampling
from llava_uhd.serve.cli import main
from llava_uhd.text.prompting import StopOnText, cut_at_stop, until_stop
from llava_uhd.text.templates import Turn

GREEDY = Sampling(temperature=0, max_new_tokens=14)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def engine() -> ChatEngine:
    return ChatEngine(*tiny_parts())


def direct(engine: ChatEngine, prompt: str, images: list[Any]) -> str:
    """The greedy answer by the library's plain call."""
    inputs = engine.processor(text=prompt, images=images or None)
    rows = engine.model.generate(**inputs, do_sample=False, max_new_tokens=14)
    new = rows[0, inputs["input_ids"].shape[1] :]
    return engine.processor.decode(new, skip_special_tokens=True).strip()


def test_turns_and_images_as_in_training(engine: ChatEngine) -> None:
    talk = Conversation()
    shown = [picture(80, 40, 1), picture(30, 90, 2), picture(64, 64, 3)]
    talk.add_image(shown[0])
    pieces = list(engine.stream(talk, "What is this?", GREEDY))
    first = direct(engine, f"{SYSTEM}USER: <image>\nWhat is this? ASSISTANT:", shown[:1])
    assert len(pieces) > 1 and "".join(pieces).strip() == first == talk.turns[1].text
    for image in shown[1:]:
        talk.add_image(image)
    second = engine.reply(talk, "And these?", GREEDY)
    prompt = (
        f"{SYSTEM}USER: <image>\nWhat is this? ASSISTANT: {first}</s>"
        "USER: <image>\n<image>\nAnd these? ASSISTANT:"
    )
    assert second == direct(engine, prompt, shown)
    assert [turn.role for turn in talk.turns] == ["human", "gpt"] * 2
    assert len(talk.images) == 3 and not talk.pending
    assert engine.reply(talk, "Why?", GREEDY) != first
    talk.clear()
    assert engine.reply(talk, "Hello", GREEDY) == direct(
        engine, f"{SYSTEM}USER: Hello ASSISTANT:", []
    )


def test_markers_say_where_images_stand(engine: ChatEngine) -> None:
    talk = Conversation()
    talk.add_image(picture(40, 40))
    with pytest.raises(UserError, match="has 2 <image> but 1 images"):
        engine.reply(talk, "<image> or <image>?", GREEDY)
    assert not talk.turns and len(talk.pending) == 1
    engine.reply(talk, "Is <image> red?", GREEDY)
    assert talk.turns[0] == Turn("human", "Is <image> red?")


def test_a_marker_in_an_answer_is_no_image() -> None:
    talk = Conversation()
    talk.record(Turn("human", "?"), " see <image> there\n")
    assert talk.turns[1].text == "see < image> there"


def test_errors_of_the_thread_arrive(engine: ChatEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation()
    talk.add_image(picture(40, 40))
    forward, calls = type(engine.model).forward, []

    @functools.wraps(forward)
    def breaks(self: Any, *args: Any, **inputs: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of something")
        return forward(self, *args, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model), "forward", breaks)
        with pytest.raises(RuntimeError, match="out of something"):
            list(engine.stream(talk, "What?", GREEDY))
    assert len(calls) == 5 and not talk.turns and len(talk.pending) == 1
    assert engine.reply(talk, "What?", GREEDY)


def test_closing_ends_the_generation(engine: ChatEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = type(engine.model).forward, []

    @functools.wraps(forward)
    def slow(self: Any, *args: Any, **inputs: Any) -> Any:
        calls.append(1)
        time.sleep(0.01)
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(engine.model), "forward", slow)
    talk = Conversation()
    pieces = engine.stream(talk, "What?", Sampling(temperature=0, max_new_tokens=500))
    said = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert len(calls) < 200
    assert talk.turns[1].text == said.strip()
    assert threading.active_count() < 10
    assert engine.reply(talk, "And?", GREEDY)


def test_seeds(engine: ChatEngine) -> None:
    def answer(**options: Any) -> str:
        return engine.reply(Conversation(), "What?", Sampling(max_new_tokens=12, **options))

    hot = {"temperature": 5.0}
    assert answer(seed=1, **hot) == answer(seed=1, **hot) != answer(seed=2, **hot)
    assert answer(temperature=0, seed=1) == answer(temperature=0, seed=2)
    assert answer(seed=3, top_p=1e-6, **hot) == answer(temperature=0)  # only the likeliest is left


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_impossible_sampling(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Sampling(**options)


def test_stop_texts(engine: ChatEngine) -> None:
    whole = engine.reply(Conversation(), "What?", GREEDY)
    stop = whole[5:9]  # across tokens
    talk = Conversation()
    sampling = Sampling(temperature=0, max_new_tokens=14, stop=(stop,))
    pieces = list(engine.stream(talk, "What?", sampling))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert talk.turns[1].text == whole[: whole.index(stop)].strip()


def test_too_long(engine: ChatEngine) -> None:
    talk = Conversation()
    for seed in range(2):
        talk.add_image(picture(90, 90, seed))
    with pytest.raises(UserError, match=r"\d{4} tokens, \d\d of them from images.* takes 2048"):
        engine.reply(talk, "word " * 2000, GREEDY)
    assert not talk.turns
    # The answer ends where the model's positions end.
    room = engine.context - engine.encode([Turn("human", "x" * 1960)], [])["input_ids"].shape[1]
    assert 0 < room < 100
    rows = []
    list(engine.stream(talk_with(rows), "x" * 1960, Sampling(0, max_new_tokens=500)))
    assert len(engine.processor.tokenizer(rows[0].turns[1].text)["input_ids"]) < 4 * room


def talk_with(rows: list[Conversation]) -> Conversation:
    rows.append(Conversation())
    return rows[0]


@given(
    st.lists(st.text("ab#\n", max_size=4), max_size=12),
    st.lists(st.text("b#\n", min_size=1, max_size=3), max_size=3),
)
def test_streamed_stops_equal_a_cut(pieces: list[str], stops: list[str]) -> None:
    assert "".join(until_stop(iter(pieces), stops)) == cut_at_stop("".join(pieces), stops)


def test_stop_on_text_looks_at_new_text_only(engine: ChatEngine) -> None:
    tokenizer = engine.processor.tokenizer
    ids = torch.tensor(tokenizer(["##12", "##1#"], add_special_tokens=False)["input_ids"])
    prompt = ids.shape[1] - 2
    assert StopOnText(tokenizer, ("#",), prompt)(ids, None).tolist() == [False, True]
    assert StopOnText(tokenizer, ("1#",), prompt)(ids, None).tolist() == [False, True]
    assert StopOnText(tokenizer, ("#",), ids.shape[1])(ids, None).tolist() == [False, False]
    assert StopOnText(tokenizer, (), prompt)(ids, None).tolist() == [False, False]


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu" and choose_device().type in ("cpu", "mps")
    assert choose_dtype(torch.device("cpu")) == torch.float32
    assert choose_dtype(torch.device("mps")) == torch.float16
    for name, message in (("cuda", "sees 0 GPUs"), ("gpu", "not one of"), ("meta", "not one of")):
        with pytest.raises(UserError, match=message):
            choose_device(name)


def talk(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    *words: str | Path,
) -> tuple[int, str, str]:
    """A piped conversation in this process: status, stdout, stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = main([*map(str, words), "--device", "cpu", "--max-new-tokens", "8"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for index, size in enumerate([(80, 40), (30, 90), (64, 64)]):
        picture(*size, seed=index).save(tmp_path / f"{index}.png")
    picture(20, 20).save(tmp_path / "with blank.png")
    return tmp_path


def answer_of(
    checkpoint: Path, pictures: Path, question: str, *names: str, before: tuple[str, ...] = ()
) -> str:
    """What the engine says after the same questions."""
    from llava_uhd.checkpoint.load import load_pretrained

    engine = ChatEngine(*load_pretrained(checkpoint))
    conversation = Conversation()
    for text in before:
        engine.reply(conversation, text, Sampling(0, max_new_tokens=8))
    for name in names:
        conversation.add_image(pictures / name)
    return engine.reply(conversation, question, Sampling(0, max_new_tokens=8))


def test_piped_conversation(
    tiny_checkpoint: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ("--model-path", tiny_checkpoint, "--temperature", "0")
    images = ("--image-file", pictures / "0.png", pictures / "1.png")
    more = ("--image-file", pictures / "2.png")
    got = talk(monkeypatch, capsys, "What?\n\n", *model, *images, *more)
    assert got == (0, answer_of(tiny_checkpoint, pictures, "What?", "0.png", "1.png", "2.png")
                   + "\n", "")  # fmt: skip
    lines = f"Who?\n/image '{pictures}/with blank.png'\nWhat?\n/exit\nWhy?\n"
    status, out, error = talk(monkeypatch, capsys, lines, *model)
    assert (status, error) == (0, "")
    first = answer_of(tiny_checkpoint, pictures, "Who?")
    second = answer_of(tiny_checkpoint, pictures, "What?", "with blank.png", before=("Who?",))
    assert out == f"{first}\n{second}\n"
    lines = f"Who?\n/image {pictures}/0.png\n/clear\nWho?\n"
    assert talk(monkeypatch, capsys, lines, *model)[1] == f"{first}\n{first}\n"


def test_refused_lines(
    tiny_checkpoint: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = "/image nothing.png\n/imagine\n/image\n/image 'a\n<image>?\n/help\nWho?\n"
    status, out, error = talk(monkeypatch, capsys, lines, "--model-path", tiny_checkpoint,
                              "--seed", "1")  # fmt: skip
    assert status == 2
    assert out.count("\n") == 1 + out.strip().count("\n")  # one answer in spite of all
    for message in (
        "error: image nothing.png does not exist",
        "error: unknown command /imagine: /image,",
        "error: /image needs a path",
        "No closing quotation",
        "error: the text has 1 <image> but 0 images",
        "/clear    ",
    ):
        assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-file", "nothing.png"], "image nothing.png does not exist"),
        (["--image-file", "http://127.0.0.1:9/a.png"], "is not a public address"),
        (["--temperature", "-1"], "temperature -1.0 must be"),
        (["--model-path", "no-such-model"], "checkpoint no-such-model does not exist"),
        (["--model-path", "./no"], "checkpoint ./no does not exist"),
        ([], "there is no finished model under checkpoints/: make one with 'bash scripts/quick"),
        (["--device", "tpu"], "device 'tpu' is not"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n"))
    with pytest.raises(UserError) as caught:
        main(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def server(pictures: Path) -> Iterator[str]:
    def handler(*args: Any) -> SimpleHTTPRequestHandler:
        return SimpleHTTPRequestHandler(*args, directory=str(pictures))

    serving = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()
    serving.server_close()


def test_images_from_urls(
    tiny_checkpoint: Path,
    pictures: Path,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ("--model-path", tiny_checkpoint, "--temperature", "0", "--allow-private-urls")
    status, out, error = talk(monkeypatch, capsys, "What?\n", *model, "--image-file",
                              f"{server}/0.png")  # fmt: skip
    assert status == 0, error
    assert out.strip() == answer_of(tiny_checkpoint, pictures, "What?", "0.png")


def wait_for(terminal: int, text: str, seconds: float = 120) -> str:
    """Reads a terminal until ``text`` comes."""
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


@pytest.mark.slow
def test_at_a_terminal(tiny_checkpoint: Path, pictures: Path) -> None:
    pty = pytest.importorskip("pty")
    words = ["--model-path", str(tiny_checkpoint), "--image-file", str(pictures / "0.png")]
    words += ["--temperature", "0", "--device", "cpu", "--max-new-tokens", "8"]
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_uhd.serve.cli", *words],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environment(TERM="xterm"),
        cwd=pictures,
    )
    os.close(inner)
    try:
        assert "80 x 40" in wait_for(outer, "USER: ")
        os.write(outer, b"What?\n")
        seen = wait_for(outer, "USER: ")
        answer = answer_of(tiny_checkpoint, pictures, "What?", "0.png")
        assert "ASSISTANT:" in seen and answer.splitlines()[0] in seen
        os.write(outer, b"/image nope.png\n")
        assert "error: image nope.png does not exist" in wait_for(outer, "USER: ")
        os.write(outer, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(outer)
