"""Pieces of a conversation, tokenised alone: what the published label rules count with."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llava_uhd.errors import UserError
from llava_uhd.text.encoding import Encoding, encode_spans
from llava_uhd.text.templates import IMAGE_MARKER, Span

logger = logging.getLogger(__name__)

# Stands for a whole image until its own ids are put in, as in the published code.
IMAGE_INDEX = -200


def piece_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, begin token included, with one `IMAGE_INDEX` for each image."""
    images = [[IMAGE_INDEX]] * text.count(IMAGE_MARKER)
    return encode_spans(tokenizer, [Span(text)], images).input_ids


def piece_length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of `piece_ids`."""
    return len(piece_ids(tokenizer, text))


def real_length(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """Ids that are not the padding token, which may also stand for an unknown word."""
    return sum(token != tokenizer.pad_token_id for token in ids)


def is_legacy(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """How a Llama tokenizer treats text behind a special token.

    Returns:
        True: it begins with a word-start mark, as at the start of a text ("legacy"); False: it does
        not; None: the tokenizer has no word-start marks.
    """
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer.eos_token
    if special is None or not tokenizer.convert_ids_to_tokens(alone[0]).startswith("\u2581"):
        return None
    behind = tokenizer(f"{special}a", add_special_tokens=False)["input_ids"][1:]
    return bool(behind == alone)


def forget(learn: list[bool], start: int, stop: int) -> None:
    """Marks ``learn[start:stop]`` as not learned, as far as it exists."""
    for place in range(max(start, 0), min(stop, len(learn))):
        learn[place] = False


def matches(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], counted: int, max_length: int | None
) -> bool:
    """The published check of a label rule; a warning if it fails.

    Args:
        tokenizer: which made the ids.
        ids: of the whole conversation.
        counted: how many the pieces had.
        max_length: conversations counted as this long or longer are not checked.
    """
    total = real_length(tokenizer, ids)
    if counted == total or (max_length is not None and counted >= max_length):
        return True
    logger.warning(
        "tokenization mismatch: %d tokens in pieces, %d in all: as published, nothing of this "
        "sample is learned (model.template_mode: clean has no such samples)",
        counted,
        total,
    )
    return False


def with_images(
    ids: Sequence[int], learn: Sequence[bool], images: Sequence[Sequence[int]]
) -> Encoding:
    """Puts the ids of the images where `IMAGE_INDEX` stands; they are never learned.

    Raises:
        UserError: another number of places than of images.
    """
    places = [place for place, token in enumerate(ids) if token == IMAGE_INDEX]
    if len(places) != len(images):
        raise UserError(
            f"the text has {len(places)} {IMAGE_MARKER} but {len(images)} images are given"
        )
    result = Encoding()
    start = 0
    for place, image in zip(places, images, strict=True):
        result.add(ids[start:place], learn[start:place])
        result.add_image(image)
        start = place + 1
    result.add(ids[start:], learn[start:])
    return result
