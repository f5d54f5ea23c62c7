"""What the files of a sample tell without being decoded."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Size
from llava_uhd.images.stored import MediaFile, open_media

# EXIF orientations that swap width and height.
TURNED = (5, 6, 7, 8)
ORIENTATION_TAG = 0x0112


class Headers(NamedTuple):
    """What the headers of a sample's files tell.

    Attributes:
        images: their sizes, upright.
        videos: numbers of frames and their size.
        sentences: what the model is told about the times of the frames of each video.
    """

    images: list[Size]
    videos: list[tuple[int, Size]]
    sentences: list[str]


def image_size(path: MediaFile) -> Size:
    """Size of a picture as it will be seen upright, without decoding it.

    Raises:
        UserError: no picture.
    """
    try:
        with open_media(path) as stream, Image.open(stream) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION_TAG) in TURNED
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from error
    return (height, width) if turned else (width, height)
