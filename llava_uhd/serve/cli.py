"""Chat in the terminal.

::

    python -m llava_uhd.serve.cli --model-path DIR --image-file FILE_OR_URL [...] --video-file FILE

Images and videos go with the next question. In the conversation: /image PATH [...], /video PATH
[...], /clear, /help, /exit;
the end of the input ends it too. When the input is no terminal, one line is one question and one
answer follows on stdout, nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from llava_uhd.checkpoint.compression import add_options, compress_model, read_options
from llava_uhd.checkpoint.load import load_pretrained, parse_dtype
from llava_uhd.checkpoint.sources import find_checkpoint
from llava_uhd.errors import UserError, command
from llava_uhd.images.pixels import ImageSource, open_image
from llava_uhd.model.devices import choose_device, choose_dtype
from llava_uhd.serve.chat import ChatEngine, Conversation, Sampling
from llava_uhd.serve.fetch import FetchLimits, fetch, is_url

HELP = """\
/image PATH_OR_URL [...]  show pictures with the next question (quote names with blanks)
/video PATH [...]         show videos (files, or folders of frames) with the next question
/clear                    forget the conversation, its pictures and videos
/help                     this list
/exit                     leave (so does the end of the input)"""


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.serve.cli",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
    )
    add = parser.add_argument
    add("--model-path", help="folder, name under checkpoints/, or hub id; default: the newest one")
    add("--model-base", help="base of a projector-only or LoRA checkpoint")
    add("--vision-tower", help="folder of a tower that replaces the checkpoint's")
    add("--image-file", nargs="+", action="extend", default=[], metavar="FILE_OR_URL",
        help="pictures for the first question; may be repeated")  # fmt: skip
    add("--video-file", nargs="+", action="extend", default=[], metavar="FILE",
        help="videos, or folders of frames, for the first question; may be repeated")  # fmt: skip
    add("--temperature", type=float, default=0.2, help="0: always the likeliest token; default 0.2")
    add("--top-p", type=float, help="draw from the likeliest tokens of this total probability")
    add("--max-new-tokens", type=int, default=512, help="longest answer; default 512")
    add("--seed", type=int, help="of the first answer; the next ones count on from it")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="needs bitsandbytes")
    bits.add_argument("--load-8bit", action="store_true", help="needs bitsandbytes")
    add("--device", help="cuda, cuda:N, mps, cpu; default: the best one here")
    add("--dtype", help="float32, bfloat16, float16; default: by device")
    add("--allow-private-urls", action="store_true",
        help="fetch URLs of private and loopback addresses too")  # fmt: skip
    add_options(parser)
    return parser.parse_args(words)


def read_image(name: str, limits: FetchLimits) -> ImageSource:
    """A path as it is, or the content of a URL.

    Raises:
        UserError: the URL is refused or cannot be fetched.
    """
    return fetch(name, limits) if is_url(name) else name


def load_engine(options: argparse.Namespace, console: Console) -> ChatEngine:
    """The model that the options name.

    Args:
        options: of the command line.
        console: hears where compression is off although it was asked for.

    Raises:
        UserError: no such model, device, precision or compression.
    """
    compression = read_options(options)
    quantization = "4bit" if options.load_4bit else "8bit" if options.load_8bit else None
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--load-{quantization} needs bitsandbytes: bash install.sh --extras qlora")
    device = choose_device(options.device)
    dtype: torch.dtype = parse_dtype(options.dtype) if options.dtype else choose_dtype(device)
    model, processor = load_pretrained(
        find_checkpoint(options.model_path),
        base=options.model_base,
        vision_tower=options.vision_tower,
        dtype=dtype,
        device=device,
        quantization=quantization,
    )
    off = compress_model(model, compression)
    if off:
        console.print(off, markup=False, highlight=False, soft_wrap=True)
    return ChatEngine(model, processor)


@dataclass
class Chat:
    """One session at a terminal or over a pipe.

    Attributes:
        engine: answers.
        sampling: of the first answer.
        limits: of fetched pictures.
        console: for people; stderr when stdout belongs to the answers.
        out: where answers go.
        plain: no prompts and colours.
        conversation: so far.
        mistakes: refused lines.
    """

    engine: ChatEngine
    sampling: Sampling
    limits: FetchLimits
    console: Console
    out: TextIO
    plain: bool
    conversation: Conversation = field(default_factory=Conversation)
    mistakes: int = 0

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines until /exit or their end."""
        for line in lines:
            text = line.strip()
            if text == "/exit":
                return
            if not text:
                continue
            try:
                if text.startswith("/"):
                    self._command(text)
                else:
                    self._ask(text)
            except UserError as error:
                self.mistakes += 1
                self._say(f"error: {error}")

    def show(self, name: str) -> None:
        """Attaches a picture to the next question.

        Raises:
            UserError: it cannot be read.
        """
        image = self.conversation.add_image(read_image(name, self.limits))
        width, height = image.size
        tokens = self.engine.processor.num_image_tokens(width, height)
        self._say(f"{name}: {width} x {height}, {tokens} tokens", only_people=True)

    def show_video(self, name: str) -> None:
        """Attaches a video to the next question.

        Raises:
            UserError: it cannot be read.
        """
        processor = self.engine.processor
        frames = self.conversation.add_video(name, processor.video_config).frames
        width, height = frames[0].size
        tokens = processor.num_video_tokens(len(frames), width, height)
        text = f"{name}: {len(frames)} frames of {width} x {height}, {tokens} tokens"
        self._say(text, only_people=True)

    def _command(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        actions: dict[str, Callable[[], None]] = {
            "/image": lambda: self._show_all("/image", rest, self.show),
            "/video": lambda: self._show_all("/video", rest, self.show_video),
            "/clear": self._clear,
            "/help": lambda: self._say(HELP),
        }
        if word not in actions:
            raise UserError(f"unknown command {word}: {', '.join([*actions, '/exit'])}")
        actions[word]()

    def _show_all(self, word: str, rest: str, show: Callable[[str], None]) -> None:
        try:
            names = shlex.split(rest)
        except ValueError as error:
            raise UserError(f"{word} {rest}: {error}") from error
        if not names:
            raise UserError(f"{word} needs a path" + (" or URL" if word == "/image" else ""))
        for name in names:
            show(name)

    def _clear(self) -> None:
        self.conversation.clear()
        self._say("the conversation is empty again", only_people=True)

    def _ask(self, text: str) -> None:
        pieces = self.engine.stream(self.conversation, text, self._next_sampling())
        try:
            # Before anything is shown: what is wrong with a question shows in its first piece.
            first = next(pieces, "")
            if not self.plain:
                self.console.print("[bold green]ASSISTANT:[/] ", end="")
            self._write(first)
            for piece in pieces:
                self._write(piece)
        except KeyboardInterrupt:
            if self.plain:
                raise
            self._write(" [stopped]")
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the device is out of memory: /clear, show fewer images, or start with --load-4bit"
            ) from error
        self._write("\n")

    def _next_sampling(self) -> Sampling:
        seed = self.sampling.seed
        if seed is None:
            return self.sampling
        # The same seed again would repeat the same draws in every turn.
        turn = len(self.conversation.turns) // 2
        return Sampling(**{**vars(self.sampling), "seed": seed + turn})

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _say(self, text: str, only_people: bool = False) -> None:
        if not (only_people and self.plain):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def typed_lines(console: Console) -> Iterator[str]:
    """Lines of a person; Ctrl-C at the prompt ends like the end of the input."""
    try:
        # Editing and history of the line, where Python has them.
        importlib.import_module("readline")
    except ImportError:
        console.print("(no line editing here)")
    while True:
        try:
            yield input("USER: ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def main(words: list[str] | None = None) -> int:
    """Runs the chat; 2 if a line of a piped conversation was refused."""
    options = parse_arguments(words)
    plain = not (sys.stdin.isatty() and sys.stdout.isatty())
    console = Console(stderr=plain)
    transformers_logging.set_verbosity_error()
    # Notes for developers of other libraries; users get errors of one line.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if plain:
        transformers_logging.disable_progress_bar()
    sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, options.seed)
    limits = FetchLimits(allow_private=options.allow_private_urls)
    # Mistakes first: loading a model may take minutes.
    images = [(name, open_image(read_image(name, limits))) for name in options.image_file]
    for name in options.video_file:
        if not Path(name).exists():
            raise UserError(f"--video-file {name} does not exist")
    chat = Chat(load_engine(options, console), sampling, limits, console, sys.stdout, plain)
    for name, image in images:
        chat.conversation.pending.append(image)
        if not plain:
            console.print(f"{name}: {image.width} x {image.height}", highlight=False, markup=False)
    for name in options.video_file:
        chat.show_video(name)
    if not plain:
        console.print("/help lists the commands", style="dim")
    chat.run(typed_lines(console) if not plain else sys.stdin)
    return 2 if plain and chat.mistakes else 0


if __name__ == "__main__":
    command(main)
