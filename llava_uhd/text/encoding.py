"""Spans of text and image plans to token ids and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from llava_uhd.errors import UserError
from llava_uhd.text.templates import IMAGE_MARKER, Span

IGNORE_INDEX = -100


@dataclass
class Encoding:
    """One sample as ids.

    Attributes:
        input_ids: with each image's placeholders and separators in place.
        labels: ids that are learned, `IGNORE_INDEX` elsewhere.
        runs: (start, stop) of each image in ``input_ids``.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], learn: Sequence[bool]) -> None:
        """Appends tokens."""
        self.input_ids += ids
        self.labels += [
            token if target else IGNORE_INDEX for token, target in zip(ids, learn, strict=True)
        ]

    def add_image(self, ids: Sequence[int]) -> None:
        """Appends the ids of one image; none of them is learned."""
        start = len(self.input_ids)
        self.add(ids, [False] * len(ids))
        self.runs.append((start, len(self.input_ids)))

    def cut(self, length: int, overlong: str) -> tuple[int, int]:
        """Shortens to at most ``length`` tokens without ever cutting inside an image.

        Args:
            length: most tokens to keep.
            overlong: "error" refuses to lose an image; "drop" removes the whole image that the cut
                falls into, and everything behind the cut.

        Returns:
            Numbers of tokens and of images removed.

        Raises:
            UserError: an image would be lost and ``overlong`` is "error".
        """
        total = len(self.input_ids)
        if total <= length:
            return 0, 0
        kept = [run for run in self.runs if run[1] <= length]
        lost = len(self.runs) - len(kept)
        if lost and overlong == "error":
            raise UserError(
                f"the sample has {total} tokens and a cut at {length} would lose {lost} of "
                f"{len(self.runs)} images: raise data.max_length, shorten the text, or set "
                "data.overlong to 'drop'"
            )
        if lost:
            length = min(length, self.runs[len(kept)][0])
        self.input_ids, self.labels, self.runs = self.input_ids[:length], self.labels[:length], kept
        return total - length, lost


def check_unicode(text: str) -> None:
    """Raises UserError if a text holds half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.end + 20]
        raise UserError(
            f"the text is not valid Unicode near {around!r}: write it as UTF-8"
        ) from error


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: the begin token, or nothing."""
    # Straight from the tokenizer's core: the library's call takes longer than the rest of a short
    # sample. What an earlier padded call may have left set is masked.
    empty = tokenizer.backend_tokenizer.encode("")
    ids = [token for token, real in zip(empty.ids, empty.attention_mask, strict=True) if real]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def encode_spans(
    tokenizer: PreTrainedTokenizerBase, spans: Sequence[Span], images: Sequence[Sequence[int]]
) -> Encoding:
    """Tokenises rendered text with images in it.

    The text between two images is tokenised on its own, so it begins with the tokenizer's
    word-start mark: the published behaviour, and the reason why ids after an image do not depend
    on what the image became. A token is learned if it overlaps learned characters.

    Args:
        tokenizer: a fast tokenizer (offsets are needed).
        spans: rendered text; `IMAGE_MARKER` marks the images.
        images: ids of each image, in order.

    Raises:
        UserError: the number of markers differs from the number of images, or the text is not
            Unicode.
    """
    text = "".join(span.text for span in spans)
    check_unicode(text)
    markers = text.count(IMAGE_MARKER)
    if markers != len(images):
        raise UserError(f"the text has {markers} {IMAGE_MARKER} but {len(images)} images are given")
    result = Encoding()
    first = start_ids(tokenizer)
    result.add(first, [False] * len(first))
    chunks, flags = [], []
    for chunk, learned in _chunks(text, spans):
        if chunk.startswith(" ") and _swallows_space(tokenizer):
            chunk, learned = " " + chunk, learned[:1] + learned
        chunks.append(chunk)
        flags.append(learned)
    encoded = tokenizer(
        chunks, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    for index, learned in enumerate(flags):
        if index:
            result.add_image(images[index - 1])
        offsets = encoded["offset_mapping"][index]
        learn = [any(learned[start:stop]) for start, stop in offsets]
        result.add(encoded["input_ids"][index], learn)
    return result


def _swallows_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a leading space takes the place of the word-start mark instead of following it.

    Fast Llama tokenizers do that; the slow ones, with which the published models were trained,
    write both.
    """
    spaced, bare = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" a", "a"))
    return spaced == bare


def _chunks(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, list[bool]]]:
    """Texts between the images, with one flag per character."""
    flags = [span.learn for span in spans for _ in span.text]
    start = 0
    for chunk in text.split(IMAGE_MARKER):
        yield chunk, flags[start : start + len(chunk)]
        start += len(chunk) + len(IMAGE_MARKER)
