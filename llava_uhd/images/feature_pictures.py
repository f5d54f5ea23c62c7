"""Pictures of feature maps: their three strongest directions as red, green and blue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw

GAP = 6  # pixels between panels
CAPTION = 14  # height in pixels of the line above a panel
MAX_ROWS = 20_000  # places that the directions are found from


def principal_colours(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Colours maps by one common set of directions, so that they can be compared.

    Args:
        maps: each (C, h, w), any float dtype and sizes.

    Returns:
        uint8 (h, w, 3) for each.
    """
    tables = [each.detach().float().cpu().flatten(1).T for each in maps]  # (h * w, C)
    rows = torch.cat([table[:: -(-len(table) // MAX_ROWS)] for table in tables])
    mean = rows.mean(0)
    centred = (rows - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    count = min(3, vectors.shape[1])
    directions = vectors[:, -count:].flip(1).float()
    # Either sign is right; the same one every time is easier to look at.
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, range(count)].sign()
    shown = [(table - mean) @ directions for table in tables]
    everything = torch.cat(shown)[: 10 * MAX_ROWS]
    low, high = (everything.quantile(share, dim=0) for share in (0.01, 0.99))
    pictures = []
    for each, values in zip(maps, shown, strict=True):
        scaled = ((values - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
        scaled = torch.nn.functional.pad(scaled, [0, 3 - count])
        pictures.append((scaled * 255).round().byte().view(*each.shape[1:], 3))
    return pictures


def pyramid_picture(
    image: Image.Image, maps: Mapping[int | str, torch.Tensor], height: int = 224
) -> Image.Image:
    """An image and the feature maps made of it, side by side.

    Args:
        image: RGB.
        maps: scale (1, 2, 4, ...) or any title -> (C, h, w) map of the whole image.
        height: of a panel in pixels; the width follows from the image.

    Returns:
        RGB: the image, then the maps in their order, each with its title and size above it.
    """
    width = max(1, round(height * image.width / image.height))
    titles = ["image"]
    panels = [image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)]
    for (name, each), colours in zip(
        maps.items(), principal_colours(list(maps.values())), strict=True
    ):
        title = f"{name}x" if isinstance(name, int) else name
        titles.append(f"{title} ({each.shape[1]} x {each.shape[2]})")
        small = Image.fromarray(colours.numpy())
        panels.append(small.resize((width, height), Image.Resampling.NEAREST))
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left = index * (width + GAP)
        pen.text((left + 1, 0), title, fill=(40, 40, 40), font_size=11)
        sheet.paste(panel, (left, CAPTION))
    return sheet


def stack_sheets(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    width = max(sheet.width for sheet in sheets)
    height = sum(sheet.height + GAP for sheet in sheets) - GAP
    page = Image.new("RGB", (width, height), (255, 255, 255))
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height + GAP
    return page
