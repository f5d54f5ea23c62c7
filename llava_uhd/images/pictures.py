"""Pictures that show how an image is cut into views."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from llava_uhd.images.geometry import Size, SlicePlan
from llava_uhd.images.pixels import cut_views

BACKGROUND = (255, 255, 255)
TITLE = (24, 24, 27)
DETAIL = (95, 95, 105)
LINE = (255, 60, 40)
EDGE = (190, 190, 198)

MARGIN = 24  # pixels around and between the panels
CAPTION = 48  # pixels above each panel for its two lines of text
GAP = 8  # pixels between slices
TALL_PANEL = (440, 520)  # (width, height) that a panel fills at most, panels side by side
WIDE_PANEL = (1000, 420)  # the same for panels one above the other
WIDE = 2.2  # images of a larger width / height get their panels one above the other


@dataclass(frozen=True)
class Panel:
    """A picture with its caption.

    Attributes:
        title: first line.
        detail: second line.
        picture: RGB.
    """

    title: str
    detail: str
    picture: Image.Image


def slice_grid_picture(image: Image.Image, plan: SlicePlan) -> Image.Image:
    """Draws an image with its grid, its slices as they are cut, and its overview.

    Slices and overview are drawn at one scale, so their sizes can be compared; the numbers are
    the reading order of the views.

    Args:
        image: RGB, of the size the plan was made for.
        plan: of its views.

    Returns:
        RGB picture of about 1500 x 650 pixels, or 1050 x 1500 for wide images.

    Raises:
        ValueError: the plan was made for another size.
    """
    views = cut_views(image, plan)
    wide = image.width / image.height > WIDE
    limit = WIDE_PANEL if wide else TALL_PANEL
    panels = [_original_panel(image, plan, limit)]
    scale = _view_scale(plan, limit)
    if plan.overview_first:
        panels.append(_overview_panel(views[0], plan, scale))
    if plan.grid is not None:
        slices = views[1:] if plan.overview_first else views[:-1]
        panels.append(_slices_panel(slices, plan, scale))
    if not plan.overview_first:
        panels.append(_overview_panel(views[-1], plan, scale))
    return _arrange(panels, wide)


def _fit(size: Size, limit: Size) -> float:
    """Largest scale at which ``size`` stays inside ``limit``; grows at most 4 times."""
    return min(limit[0] / size[0], limit[1] / size[1], 4.0)


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _view_scale(plan: SlicePlan, limit: Size) -> float:
    """The scale of slices and overview: both panels fit."""
    scale = _fit(plan.overview_size, limit)
    if plan.grid is not None and plan.refine_size is not None:
        gaps = tuple(GAP * (count - 1) for count in plan.grid)
        room = (max(limit[0] - gaps[0], 1), max(limit[1] - gaps[1], 1))
        scale = min(scale, _fit(plan.refine_size, room))
    return scale


def _original_panel(image: Image.Image, plan: SlicePlan, limit: Size) -> Panel:
    picture = _scaled(image, _fit(image.size, limit))
    detail = "not cut: one view"
    if plan.grid is not None and plan.slices_on is not None:
        columns, rows = plan.grid
        detail = f"padded to {columns} x {rows} tiles (columns x rows)"
    elif plan.grid is not None:
        columns, rows = plan.grid
        draw = ImageDraw.Draw(picture)
        for column in range(1, columns):
            x = round(picture.width * column / columns)
            draw.line([(x, 0), (x, picture.height)], LINE, 3)
        for row in range(1, rows):
            y = round(picture.height * row / rows)
            draw.line([(0, y), (picture.width, y)], LINE, 3)
        detail = f"best grid: {columns} x {rows} (columns x rows)"
    return Panel(f"Image, {image.width} x {image.height}", detail, _framed(picture))


def _slices_panel(slices: list[Image.Image], plan: SlicePlan, scale: float) -> Panel:
    assert plan.grid is not None and plan.slice_size is not None and plan.refine_size is not None
    columns, rows = plan.grid
    pieces = [_scaled(piece, scale) for piece in slices]
    width, height = pieces[0].size
    size = (columns * width + (columns - 1) * GAP, rows * height + (rows - 1) * GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    for index, piece in enumerate(pieces):
        row, column = divmod(index, columns)
        number = index + 1 + int(plan.overview_first)
        sheet.paste(_numbered(piece, number), (column * (width + GAP), row * (height + GAP)))
    grid = plan.view_grids[int(plan.overview_first)]
    patches = f"{grid[1]} x {grid[0]} patches each"
    full = f"cut from {plan.refine_size[0]} x {plan.refine_size[1]}"
    side = f"{plan.slice_size[0]} x {plan.slice_size[1]}"
    return Panel(f"{plan.num_slices} slices of {side}", f"{patches}, {full}", sheet)


def _overview_panel(overview: Image.Image, plan: SlicePlan, scale: float) -> Panel:
    rows, columns = plan.view_grids[0 if plan.overview_first else -1]
    title = f"Overview, {overview.width} x {overview.height}"
    number = 1 if plan.overview_first else plan.num_views
    picture = _numbered(_scaled(overview, scale), number)
    place = f", read {'first' if plan.overview_first else 'last'}" if plan.num_slices else ""
    return Panel(title, f"{columns} x {rows} patches{place}", picture)


def _framed(picture: Image.Image) -> Image.Image:
    ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=EDGE)
    return picture


def _numbered(picture: Image.Image, number: int) -> Image.Image:
    """The picture with its place in the reading order, if there is room for it."""
    if min(picture.size) >= 24:
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(14)
        right = 12 + draw.textlength(str(number), font)
        draw.rounded_rectangle((2, 2, right, 22), 5, fill=(255, 255, 255), outline=EDGE)
        draw.text((7, 12), str(number), TITLE, font, anchor="lm")
    return _framed(picture)


def _arrange(panels: list[Panel], wide: bool) -> Image.Image:
    """Captions over pictures, side by side or one above the other."""
    title_font, detail_font = ImageFont.load_default(18), ImageFont.load_default(14)
    sizes = []
    for panel in panels:
        texts = (title_font.getlength(panel.title), detail_font.getlength(panel.detail))
        width = max(panel.picture.width, *(round(length) + 1 for length in texts))
        sizes.append((width, panel.picture.height + CAPTION))
    if wide:
        width = max(each[0] for each in sizes) + 2 * MARGIN
        height = sum(each[1] for each in sizes) + MARGIN * (len(panels) + 1)
    else:
        width = sum(each[0] for each in sizes) + MARGIN * (len(panels) + 1)
        height = max(each[1] for each in sizes) + 2 * MARGIN
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = top = MARGIN
    for panel, size in zip(panels, sizes, strict=True):
        draw.text((left, top), panel.title, TITLE, title_font)
        draw.text((left, top + 23), panel.detail, DETAIL, detail_font)
        canvas.paste(panel.picture, (left, top + CAPTION))
        if wide:
            top += size[1] + MARGIN
        else:
            left += size[0] + MARGIN
    return canvas


def data_uri(image: Image.Image, side: int | None = None) -> str:
    """A picture as text for an HTML file.

    Args:
        image: of any mode.
        side: the longer side has so many pixels at most, and the file is a JPEG; None: a PNG of
            all pixels.
    """
    kind, image, stream = "png" if side is None else "jpeg", image.convert("RGB"), io.BytesIO()
    if side is not None:
        image.thumbnail((side, side))
    image.save(stream, kind.upper(), **({} if side is None else {"quality": 80}))
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()
