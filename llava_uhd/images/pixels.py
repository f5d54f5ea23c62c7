"""Picture files to RGB, and RGB to packed, normalised patches.

What is done to unusual files, in this order: the EXIF orientation is applied, so the model sees
the picture upright as viewers show it; the first frame of an animation is taken; 16-bit grey is
scaled to 8 bits (value / 257, not clipped); transparency is laid over white; palettes, grey, CMYK
and the like are converted to RGB.
"""

from __future__ import annotations

import io
import warnings
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_uhd.config.model import CLIP_MEAN
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Canvas, Size, SlicePlan
from llava_uhd.images.stored import StoredFile

# Formats that Pillow decodes itself; others (EPS, PDF, ...) would start outside programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "MPO")

# A picture of more pixels is refused before it is decoded: 3 bytes each would be 0.5 GB.
MAX_PIXELS = 178_956_970

ImageSource = str | PathLike[str] | bytes | Image.Image | StoredFile


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens and fully decodes a picture.

    Args:
        source: path, encoded bytes, a PIL image, or a file inside another one.
        max_pixels: larger pictures are refused before decoding.

    Returns:
        PIL image of mode RGB, upright.

    Raises:
        UserError: missing, empty, truncated, unknown or oversized file; the message has the path.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"image data of {len(source)} bytes", max_pixels)
    if isinstance(source, StoredFile):
        with source.open() as stored:
            return _decode(stored, f"image {source}", max_pixels)
    if not isinstance(source, str | PathLike):
        raise UserError(
            f"an image must be a path, encoded bytes or a PIL image, got {type(source).__name__}"
        )
    path = Path(source)
    try:
        if not path.is_file():
            what = "is a folder, not an image file" if path.is_dir() else "does not exist"
            raise UserError(f"image {path} {what}")
        if path.stat().st_size == 0:
            raise UserError(f"image {path} is empty (0 bytes): copy or download it again")
        with path.open("rb") as stream:
            return _decode(stream, f"image {path}", max_pixels)
    except OSError as error:
        name = f"{str(path)[:200]!r}"
        raise UserError(f"image {name} cannot be opened ({error.strerror or error})") from error


def _decode(stream: IO[bytes], what: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow's own size warning; the limit below decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # A name that this build of Pillow lacks (AVIF, JPEG2000) is simply never matched.
            image = Image.open(stream, formats=[name for name in FORMATS if _can_open(name)])
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{what} has {width} x {height} pixels, more than the limit of {max_pixels}: "
                    "shrink it first"
                )
            return to_rgb(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{what} is larger than any sane picture: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{what} is not a picture of a known format ({', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        raise UserError(
            f"{what} cannot be decoded ({error}): it is damaged or truncated"
        ) from error


def _can_open(name: str) -> bool:
    Image.init()
    return name in Image.OPEN


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB copy of a PIL image, as the module's first lines say."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_bytes(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        # Float pictures carry no range of their own: [0, 1] if they fit it, else 8-bit values.
        scaled = values * 255 if 0 <= values.min() and values.max() <= 1 else values
    else:
        scaled = values / 257 if values.max() > 255 or image.mode.startswith("I;16") else values
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def cut_views(
    image: Image.Image, plan: SlicePlan, mean: tuple[float, ...] = CLIP_MEAN
) -> list[Image.Image]:
    """Resizes and cuts an RGB image into its views, in the plan's order.

    Everything is resized with Pillow's antialiased bicubic filter on 8-bit values, as published.

    Args:
        image: RGB.
        plan: of the image.
        mean: colour in [0, 1] of backgrounds that ask for it.

    Raises:
        ValueError: the plan was made for another size.
    """
    if image.size != plan.image_size:
        raise ValueError(f"plan is for {plan.image_size}, the image has {image.size}")
    slices = []
    if plan.refine_size is not None:
        if plan.slices_on is None:
            refined = _resized(image, plan.refine_size)
        else:
            refined = lay_out(image, plan.slices_on, mean)
        slices = [refined.crop(box) for box in plan.crop_boxes]
    whole = image if plan.overview_on is None else lay_out(image, plan.overview_on, mean)
    overview = _resized(whole, plan.overview_size)
    return [overview, *slices] if plan.overview_first else [*slices, overview]


def _resized(image: Image.Image, size: Size) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def lay_out(image: Image.Image, canvas: Canvas, mean: tuple[float, ...]) -> Image.Image:
    """Scales an RGB image and places it on a background.

    Args:
        image: RGB.
        canvas: where.
        mean: colour in [0, 1] of the fill "mean"; its 8-bit values are rounded down, as published.
    """
    colour = tuple(int(255 * value) for value in mean) if canvas.fill == "mean" else (0, 0, 0)
    background = Image.new("RGB", canvas.size, colour)
    background.paste(_resized(image, canvas.scaled), canvas.offset)
    return background


def pack_patches(
    view: Image.Image, patch_size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Normalises one RGB view and cuts it into patches.

    Returns:
        float32 (rows * columns, 3 * patch_size ** 2), patches row by row, values channel-first.
    """
    return _normalise(_cut_patches(view, patch_size), mean, std)


def _cut_patches(view: Image.Image, patch_size: int) -> np.ndarray:
    """RGB view to uint8 (rows * columns, 3, patch_size ** 2)."""
    pixels = np.asarray(view)
    height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    pixels = pixels[: rows * patch_size, : columns * patch_size]
    tiles = pixels.reshape(rows, patch_size, columns, patch_size, channels)
    tiles = tiles.transpose(0, 2, 4, 1, 3)  # (rows, columns, 3, p, p)
    return tiles.reshape(rows * columns, channels, -1)


def _normalise(
    patches: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """uint8 (P, 3, p * p) to float32 (P, 3 * p * p), in the published order of operations."""
    values = patches.astype(np.float32)
    values *= np.float32(1 / 255)
    values -= np.asarray(mean, np.float32)[:, None]
    values /= np.asarray(std, np.float32)[:, None]
    return torch.from_numpy(values.reshape(len(values), -1))


def pack_views(
    image: Image.Image, plan: SlicePlan, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns an RGB image into the packed patches of all its views.

    Returns:
        ``pixel_values`` float32 (P, 3 * patch_size ** 2), patches of all views one after another;
        ``view_grids`` int64 (V, 2), the (rows, columns) of each view; P is the sum of the products.
    """
    patches = [_cut_patches(view, plan.patch_size) for view in cut_views(image, plan, mean)]
    grids = torch.tensor(plan.view_grids, dtype=torch.long)
    return _normalise(np.concatenate(patches), mean, std), grids


def remove_detail(image: Image.Image, side: int) -> Image.Image:
    """The image as it looks after being squeezed into a square of ``side`` pixels.

    Returns:
        RGB image of the same size, blown up again from the square.

    Raises:
        UserError: ``side`` is below 1.
    """
    if side < 1:
        raise UserError(f"image.detail_side must be at least 1, got {side}")
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def unpack_view(
    patches: torch.Tensor, grid: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Image.Image:
    """Inverse of `pack_patches` up to rounding: the picture that the tower sees.

    Args:
        patches: (rows * columns, 3 * p * p) of one view.
        grid: (rows, columns).
        mean: used when packing.
        std: used when packing.
    """
    rows, columns = grid
    side = int((patches.shape[1] // 3) ** 0.5)
    tiles = patches.detach().float().cpu().numpy().reshape(rows, columns, 3, side, side)
    pixels = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    pixels = (pixels * np.asarray(std) + np.asarray(mean)) * 255
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
