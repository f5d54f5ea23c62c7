"""Before a run: samples with their learned tokens, and a refusal where there is nothing to learn.

::

    python -m llava_uhd.train.preview RECIPE [--section.key value ...]

shows the same without training, and without loading the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from llava_uhd.checkpoint.assemble import check_parts
from llava_uhd.checkpoint.recipe_parts import read_processor
from llava_uhd.data.dataset import BrokenFileError, ConversationDataset, open_records
from llava_uhd.errors import UserError, command
from llava_uhd.text.encoding import IGNORE_INDEX, Encoding
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.visuals import markers_of
from llava_uhd.train.drawn import is_plain, source_table
from llava_uhd.train.embedded import demo_tokenizer, use_embedded
from llava_uhd.train.start import console, is_first_rank, parse

# Samples that are checked, spread evenly over the data.
CHECKED = 64

# Longer pieces of text are shown without their middle: so many characters of head and tail.
HEAD, TAIL = 500, 200

LEARNED_STYLE, VISUAL_STYLE, OTHER_STYLE = "bold green", "cyan", "dim"
# What an end-of-answer mark looks like that must be a token of its own.
MARK = re.compile(r"<.*>|\[.*\]")


@dataclass(frozen=True)
class Sample:
    """A sample as it is trained on.

    Attributes:
        index: of its record.
        where: file, place and id of its record.
        encoding: after the cut at ``data.max_length``; separators inside images are placeholders.
        kinds: "image" or "video" for each of its runs.
        total: tokens before the cut.
        learned_before: learned tokens before the cut.
    """

    index: int
    where: str
    encoding: Encoding
    kinds: list[str]
    total: int
    learned_before: int

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return count_learned(self.encoding)


class Piece(NamedTuple):
    """A part of a sample as it is shown.

    Attributes:
        text: what is shown.
        kind: "learned", "visual" or "other".
    """

    text: str
    kind: str


def main() -> None:
    """Command line, see the module's first lines."""
    recipe = parse("llava_uhd.train.preview", "Show what a recipe learns, without training.")
    check_parts(recipe.model)
    data = use_embedded(recipe).data
    records = open_records(data)
    processor = read_processor(recipe.model, demo_tokenizer)
    seed = int(recipe.trainer.arguments.get("seed") or 42)
    dataset = ConversationDataset(records, processor, data, seed)
    if not is_plain(records):
        console.print(source_table(records))
    preview(dataset, console if is_first_rank() else None)


def preview(dataset: ConversationDataset, console: Console | None) -> None:
    """Shows the first samples and checks some more.

    Pictures are not decoded: sizes come from their headers.

    Args:
        dataset: of the run.
        console: to show on; None checks only.

    Raises:
        UserError: the template's marks are no tokens of the tokenizer, or too few samples have a
            learned token. With ``data.max_unlearned`` 1 nothing is refused.
    """
    config = dataset.config
    if config.max_unlearned < 1:
        check_template(dataset.processor)
    if console is not None and config.preview:
        for sample in _readable(dataset, range(len(dataset)), config.preview):
            show(sample, dataset, console)
    checked = list(_readable(dataset, spread(len(dataset), CHECKED), CHECKED))
    empty = [sample for sample in checked if sample.learned == 0]
    if console is not None and checked:
        learned = sum(sample.learned for sample in checked) / len(checked)
        length = sum(len(sample.encoding.input_ids) for sample in checked) / len(checked)
        console.print(
            f"{len(checked)} samples checked: {learned:,.0f} of {length:,.0f} tokens are learned "
            f"on average; {len(empty)} have no learned token",
            soft_wrap=True,
        )
    if config.max_unlearned < 1 and len(empty) > config.max_unlearned * len(checked):
        raise UserError(_refusal(dataset, empty, len(checked)))


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, evenly spread.

    Example: ``spread(10, 4)`` is ``[0, 2, 5, 7]``.
    """
    wanted = min(count, most)
    return [place * count // wanted for place in range(wanted)]


def count_learned(encoding: Encoding) -> int:
    """Learned tokens; the first token of a sample is never predicted."""
    return sum(label != IGNORE_INDEX for label in encoding.labels[1:])


def look(dataset: ConversationDataset, index: int) -> Sample:
    """Encodes a sample without its pixels.

    Raises:
        BrokenFileError: an image or video cannot be read.
        UserError: the sample does not fit.
    """
    config, where = dataset.config, dataset.records.where(index)
    encoding = dataset.encoding(index)
    total, learned = len(encoding.input_ids), count_learned(encoding)
    if config.max_length is not None:
        try:
            encoding.cut(config.max_length, config.overlong)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    record = dataset.records[index]
    text = "".join(turn.text for turn in record.turns)
    kinds = [marker.strip("<>") for marker in markers_of(text, len(record.videos))]
    return Sample(index, where, encoding, kinds, total, learned)


def _readable(dataset: ConversationDataset, indices: Sequence[int], most: int) -> Iterator[Sample]:
    """Samples of these indices; broken files are passed over where training passes over them."""
    found = 0
    for index in indices:
        if found == most:
            return
        try:
            sample = look(dataset, index)
        except BrokenFileError:
            if dataset.config.on_broken_image == "error":
                raise
            continue
        found += 1
        yield sample


def check_template(processor: LlavaUHDProcessor) -> None:
    """Raises UserError if the tokenizer spells out a mark of the template instead of knowing it."""
    template, tokenizer = processor.template, processor.tokenizer
    ends = [stop for stop in template.stop_strings if MARK.fullmatch(stop)]
    marks = dict.fromkeys([*template.special_tokens, *ends])
    missing = [mark for mark in marks if not _is_token(tokenizer, mark)]
    if missing:
        spelled = tokenizer.convert_ids_to_tokens(
            tokenizer(missing[0], add_special_tokens=False)["input_ids"]
        )
        raise UserError(
            f"template '{processor.template_name}' does not fit the tokenizer: "
            f"{', '.join(missing)} must be tokens of their own, but {missing[0]} is written as "
            f"{' '.join(spelled)!r}: "
            "set model.template to that of the language model, or data.max_unlearned to 1 to train "
            "nevertheless"
        )


def _is_token(tokenizer: PreTrainedTokenizerBase, mark: str) -> bool:
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    single = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    return single or mark in tokenizer.get_added_vocab()


def show(sample: Sample, dataset: ConversationDataset, console: Console) -> None:
    """Prints a sample: learned tokens in colour, or in ``[[ ]]`` where there is none."""
    length = len(sample.encoding.input_ids)
    cut = f", cut from {sample.total}" if length < sample.total else ""
    coloured = console.is_terminal and console.color_system is not None
    marked = "green" if coloured else "in [[ ]]"
    heading = f"{sample.where}: {sample.learned} of {length} tokens are learned ({marked}){cut}"
    console.print(Text(heading, style="bold"), soft_wrap=True)
    console.print(render(sample, dataset.processor.tokenizer, coloured), soft_wrap=True)


def render(sample: Sample, tokenizer: PreTrainedTokenizerBase, coloured: bool) -> Text:
    """A sample as text."""
    text = Text()
    for piece in pieces(sample, tokenizer):
        shown = shorten(piece.text)
        if piece.kind == "visual":
            text.append(shown, VISUAL_STYLE if coloured else "")
        elif piece.kind == "other":
            text.append(shown, OTHER_STYLE if coloured else "")
        else:
            text.append(shown if coloured else f"[[{shown}]]", LEARNED_STYLE if coloured else "")
    return text


def shorten(text: str) -> str:
    """The text, without its middle if it is long."""
    left = len(text) - HEAD - TAIL
    return text if left <= 0 else f"{text[:HEAD]} <... {left} characters ...> {text[-TAIL:]}"


def pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A sample in parts: images and videos by their numbers of tokens, text as decoded."""
    encoding = sample.encoding
    found: list[Piece] = []
    place = 0
    for (start, stop), kind in zip(encoding.runs, sample.kinds, strict=False):
        found += _text_pieces(encoding, place, start, tokenizer)
        found.append(Piece(f"<{kind}: {stop - start} tokens>", "visual"))
        place = stop
    return found + _text_pieces(encoding, place, len(encoding.input_ids), tokenizer)


def _text_pieces(
    encoding: Encoding, start: int, stop: int, tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    """Decodes ids between two images, in stretches that are learned or not."""
    found: list[Piece] = []
    flags = [label != IGNORE_INDEX for label in encoding.labels]
    before, place = "", start
    while place < stop:
        end = place
        while end < stop and flags[end] == flags[place]:
            end += 1
        # Decoded from the start of the text: a tokenizer may drop the space in front of a piece.
        whole = tokenizer.decode(encoding.input_ids[start:end], skip_special_tokens=False)
        fits = whole.startswith(before)
        text = whole[len(before) :] if fits else tokenizer.decode(encoding.input_ids[place:end])
        found.append(Piece(text, "learned" if flags[place] else "other"))
        before, place = whole, end
    return found


def _refusal(dataset: ConversationDataset, empty: Sequence[Sample], checked: int) -> str:
    example = empty[0]
    rendered = render(example, dataset.processor.tokenizer, coloured=False).plain
    return (
        f"{len(empty)} of {checked} samples that were checked have no learned token, more than "
        f"data.max_unlearned ({dataset.config.max_unlearned}) allows: {_reason(dataset, example)}\n"
        f"  The first of them, {example.where}:\n  {rendered}"
    )


def _reason(dataset: ConversationDataset, sample: Sample) -> str:
    """Why a sample has no learned token, and what to do."""
    processor = dataset.processor
    if sample.learned_before:
        return (
            f"the cut at data.max_length {dataset.config.max_length} takes their answers away: "
            "raise it, or shorten the samples"
        )
    answers = dataset.records[sample.index].turns[1::2]
    if not any(turn.text.strip() for turn in answers):
        return "their answers are empty: leave them out"
    if processor.template_mode == "faithful":
        return (
            f"the published code of template '{processor.template_name}' masks samples whose "
            "tokens it miscounts, which happens with a tokenizer that it was not written for: set "
            "model.template_mode to clean, or model.template to that of the language model"
        )
    return f"template '{processor.template_name}' marks nothing of them as learned"


if __name__ == "__main__":
    command(main)
