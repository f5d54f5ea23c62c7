"""Picture files to RGB and RGB to patches, unusual and hostile files included."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_uhd.config.model import CLIP_MEAN, CLIP_STD
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import fit_long_side, plan_slices
from llava_uhd.images.pictures import slice_grid_picture
from llava_uhd.images.pixels import cut_views, open_image, pack_patches, pack_views, unpack_view


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_palette_and_grey() -> None:
    palette = noise(9, 7).quantize(16)
    assert np.array_equal(open_image(encoded(palette)), palette.convert("RGB"))
    grey = noise(9, 7).convert("L")
    opened = np.asarray(open_image(encoded(grey)))
    assert opened.shape == (7, 9, 3) and (opened == np.asarray(grey)[..., None]).all()
    bits = grey.convert("1")
    assert set(np.unique(open_image(encoded(bits)))) == {0, 255}


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (200, 100, 0, 255))
    image.putpixel((1, 0), (200, 100, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    pixels = np.asarray(open_image(encoded(image)))[0]
    assert pixels.tolist() == [[200, 100, 0], [255, 255, 255], [204, 204, 204]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    opened = open_image(encoded(palette, transparency=0))
    assert np.asarray(opened)[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    shaded = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(open_image(encoded(shaded)))[0].tolist() == [[255, 255, 255]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    opened = np.asarray(open_image(encoded(Image.fromarray(values))))
    assert opened[0, :, 0].tolist() == [0, 1, 128, 255]
    dark = np.array([[0, 200, 255]], dtype=np.uint16)  # still 16 bits: nearly black
    assert np.asarray(open_image(encoded(Image.fromarray(dark)))).max() <= 1


def test_cmyk_and_animation() -> None:
    assert open_image(encoded(noise(8, 8).convert("CMYK"), "JPEG")).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    upright = open_image(encoded(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (0, 0, 0)
    # An image object is treated alike.
    opened = Image.open(io.BytesIO(encoded(image, exif=exif)))
    assert open_image(opened).size == (2, 4)


def refused(source: object, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_truncated(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = encoded(noise(64, 64), kind)
        path = tmp_path / f"cut.{kind.lower()}"
        path.write_bytes(data[: len(data) // 2])
        refused(path, str(path), "damaged or truncated")
        path.write_bytes(data[:3])
        refused(path, str(path))


def test_missing_empty_folder_text_and_url(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "none.png", "does not exist")
    refused(tmp_path, str(tmp_path), "folder")
    empty = tmp_path / "empty.png"
    empty.touch()
    refused(empty, str(empty), "0 bytes")
    text = tmp_path / "page.jpg"
    text.write_text("<html>404</html>")
    refused(text, str(text), "known format")
    script = tmp_path / "figure.eps"  # Pillow would start Ghostscript
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused(script, "known format")
    refused("https://example.com/a.png", "does not exist")
    refused(b"", "0 bytes")


def bomb(width: int, height: int) -> bytes:
    """PNG whose header promises a size that its data never fill."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    for size in ((14000, 14000), (60000, 60000)):  # above our limit, and above Pillow's
        path.write_bytes(bomb(*size))
        refused(path, str(path))
    path.write_bytes(bomb(0, 10))
    refused(path, str(path))
    with pytest.raises(UserError, match="more than the limit of 10"):
        open_image(encoded(noise(4, 4)), max_pixels=10)
    assert open_image(encoded(noise(4, 4)), max_pixels=16).size == (4, 4)


def test_views_equal_the_published_ones(golden: Path) -> None:
    folder = golden / "uhd_v1"
    cases = json.loads((folder / "tiny_cases.json").read_text())["cases"]
    assert len(cases) >= 6
    for case in cases:
        image = open_image(folder / case["image"])
        if case["mode"] == "eval":
            image = image.resize(fit_long_side(*image.size, 1024), Image.Resampling.BICUBIC)
        assert list(image.size) == case["size_after_pre_resize"]
        views = cut_views(image, plan_slices(*image.size))
        sums = [hashlib.sha256(view.tobytes()).hexdigest() for view in views]
        assert sums == [*case["sha256_slices"], case["sha256_overview"]], case["key"]


def test_patches_are_rows_of_the_picture() -> None:
    view = noise(42, 28)
    patches = pack_patches(view, 14, CLIP_MEAN, CLIP_STD)
    assert patches.shape == (6, 588) and patches.dtype == torch.float32
    pixels = torch.tensor(np.asarray(view)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    # The fourth patch: second row, first column.
    expected = pixels[:, 14:28, 0:14].flatten()
    torch.testing.assert_close(patches[3], expected, rtol=1e-5, atol=1e-6)


def test_pack_and_unpack() -> None:
    image = noise(700, 500)
    plan = plan_slices(*image.size)
    pixels, grids = pack_views(image, plan, CLIP_MEAN, CLIP_STD)
    assert grids.tolist() == [list(grid) for grid in plan.view_grids]
    assert grids.dtype == torch.long
    parts = pixels.split([rows * columns for rows, columns in grids.tolist()])
    views = cut_views(image, plan)
    assert len(parts) == len(views) == plan.num_views > 1
    for part, grid, view in zip(parts, plan.view_grids, views):
        assert unpack_view(part, grid, CLIP_MEAN, CLIP_STD).tobytes() == view.tobytes()


def test_a_plan_belongs_to_its_size() -> None:
    with pytest.raises(ValueError, match="plan is for"):
        cut_views(noise(10, 10), plan_slices(11, 10))


@pytest.mark.parametrize("size", [(672, 448), (1500, 200), (200, 1500), (30, 30), (3, 4000)])
def test_picture_of_the_grid(size: tuple[int, int]) -> None:
    image = noise(*size)
    plan = plan_slices(*size, bounded=True)
    picture = slice_grid_picture(image, plan)
    assert picture.mode == "RGB" and max(picture.size) < 2000
    pixels = np.asarray(picture)
    assert (pixels[:10] == 255).all() and (pixels[:, :10] == 255).all()  # a white margin
    red = (pixels == np.array([255, 60, 40])).all(2).sum()
    assert (red > 100) == (plan.grid is not None)  # the lines of the grid
    assert image.tobytes() == noise(*size).tobytes()  # the input stays as it was
