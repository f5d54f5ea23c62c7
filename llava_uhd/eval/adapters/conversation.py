"""What other harnesses ask, as an item: texts, images and videos in their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from llava_uhd.errors import UserError
from llava_uhd.eval.task import Item
from llava_uhd.images.pixels import ImageSource, open_image
from llava_uhd.images.video import VideoSource
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER, Turn

logger = logging.getLogger(__name__)

MARKER = {"image": IMAGE_MARKER, "video": VIDEO_MARKER}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")


class Part(NamedTuple):
    """A piece of a message.

    Attributes:
        kind: of it.
        value: the text, or an image or video as `image_source` and `video_source` give it.
    """

    kind: Literal["text", "image", "video"]
    value: Any


class Message(NamedTuple):
    """What one side says.

    Attributes:
        role: "user", "assistant" or "system".
        parts: in reading order.
    """

    role: str
    parts: Sequence[Part]


class Asked:
    """Sends items as they are: all markers stand in their texts already."""

    def turns(self, item: Item) -> list[Turn]:
        """The conversation of an item that `make_item` made.

        Raises:
            Exception: why the item could not be made, see `failed_item`.
        """
        error = item.extra.get("error")
        if error is not None:
            raise error
        return [*item.history, Turn("human", item.question)]


def failed_item(key: int, error: Exception) -> Item:
    """An item that could not be made: answering it fails with this error, and no other does."""
    return Item(key, "", extra={"error": error})


def make_item(key: int, messages: Sequence[Message]) -> Item:
    """An item from the messages of a conversation.

    A system message goes before the first question, since a template has its own. Each image or
    video stands on its own line where its part stands, as in training. Where the texts of a message
    have as many markers as the message has images, behind which the texts come (MMMU, LLaVA
    Interleave Bench), the images go to the markers instead.

    Args:
        key: id of the item.
        messages: the last one is the user's.

    Raises:
        UserError: no question at the end, or a role that is not known.
    """
    turns: list[Turn] = []
    before = ""
    for message in messages:
        text = message_text(message.parts)
        if message.role == "system":
            before += f"{text}\n"
            continue
        if message.role not in ("user", "assistant"):
            raise UserError(f"a message has the role '{message.role}': user, assistant or system")
        role = "human" if message.role == "user" else "gpt"
        text, before = before + text, ""
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n{text}")
        else:
            turns.append(Turn(role, text))
    if not turns or turns[-1].role != "human":
        raise UserError("a conversation must end with a message of the user")
    parts = [part for message in messages for part in message.parts]
    return Item(
        key,
        turns[-1].text,
        tuple(part.value for part in parts if part.kind == "image"),
        history=tuple(turns[:-1]),
        videos=tuple(part.value for part in parts if part.kind == "video"),
    )


def message_text(parts: Sequence[Part]) -> str:
    r"""The text of a message with a marker for each of its images and videos.

    Example: an image and the text ``"What?"`` give ``"<image>\nWhat?"``; two images and the text
    ``"Is <image> like <image>?"`` give that text; one image and that text, ``"<image>\nIs  like
    ?"``, since nobody knows which of the two is meant.
    """
    pieces = [(part.kind, part.value) for part in parts]
    for kind, marker in MARKER.items():
        given = [index for index, (each, _) in enumerate(pieces) if each == kind]
        named = sum(value.count(marker) for each, value in pieces if each == "text")
        if not named:
            continue
        first = next(i for i, (each, value) in enumerate(pieces) if each == "text" and value)
        if named == len(given) and all(index < first for index in given):
            pieces = [piece for piece in pieces if piece[0] != kind]
            continue
        logger.warning("a text has %d %s but %d are given: left out", named, marker, len(given))
        pieces = [
            (each, value.replace(marker, "") if each == "text" else value) for each, value in pieces
        ]
    return "".join(value if each == "text" else f"{MARKER[each]}\n" for each, value in pieces)


def image_source(value: Any) -> ImageSource:
    """An image as harnesses hand it over: PIL, path, bytes, array (H, W, 3) or a datasets dict.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, Image.Image | str | PathLike | bytes):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        return Image.fromarray(value)
    if isinstance(value, Mapping):
        found = value.get("bytes") or value.get("path")
        if found:
            return image_source(found)
    raise UserError(f"an image is given as {type(value).__name__}, which is not understood")


def video_source(value: Any) -> VideoSource:
    """A video as harnesses hand it over: path, frames, array (T, H, W, 3) or a dict with a path.

    Raises:
        UserError: anything else, or a cut of a video.
    """
    if isinstance(value, str | PathLike):
        return value
    if _is_moving(value):
        return [open_image(image_source(each)) for each in value]
    if isinstance(value, Mapping):
        if value.get("video_start") is not None or value.get("video_end") is not None:
            raise UserError("a part of a video is asked for (video_start): cut the file first")
        found = value.get("path") or value.get("url")
        if isinstance(found, str):
            return found
    raise UserError(f"a video is given as {type(value).__name__}, which is not understood")


def _is_moving(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 4)


def visual_part(value: Any) -> Part:
    """An image or a video, told apart by what it is: paths by their ending."""
    if isinstance(value, str | PathLike):
        still = Path(value).suffix.lower() in PICTURES
        return Part("image", value) if still else Part("video", value)
    moving = _is_moving(value)
    if isinstance(value, Mapping) and "bytes" not in value:
        path = str(value.get("path") or value.get("url") or "")
        moving = not path.lower().endswith(PICTURES)
    return Part("video", video_source(value)) if moving else Part("image", image_source(value))
