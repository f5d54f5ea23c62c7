"""``python -m llava_uhd.inspect IMAGE``: how a model sees an image, in numbers and as a picture.

With ``--pyramid CHECKPOINT`` (a LLaVA-UHD v2 model, or the folder of an upsampler): its feature
maps at 1x, 2x, 4x beside the image, coloured by their three strongest directions.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from PIL import Image

from llava_uhd.checkpoint.pyramid import open_pyramid
from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.errors import UserError, command
from llava_uhd.images.cost import image_cost
from llava_uhd.images.geometry import SlicePlan, map_side
from llava_uhd.images.maps import Newline, TokenMap, image_maps
from llava_uhd.images.pictures import slice_grid_picture
from llava_uhd.images.pixels import open_image, remove_detail
from llava_uhd.images.strategies import plan_image, prepared_size
from llava_uhd.images.tokens import view_token_shapes

DEFAULT_RECIPE = "uhd_v1/finetune_vicuna7b"


def main() -> None:
    """Prints the plan of one image and writes its picture."""
    options = parse()
    if options.pyramid is not None:
        show_pyramid(options)
        return
    recipe = load_recipe(options.recipe)
    config = describe_recipe(recipe)
    image, plan = prepare(open_image(options.image), config, recipe.data.overview_only)
    output = picture_path(options.image, options.output)
    print(f"{options.image} seen by {recipe.name}")
    for line in describe(plan, config):
        print(line)
    save_picture(slice_grid_picture(image, plan), output)
    print(f"Picture of the views: {output}")


def show_pyramid(options: argparse.Namespace) -> None:
    """Writes the picture of the feature maps."""
    image = open_image(options.image)
    output = picture_path(options.image, options.output, "pyramid")
    save_picture(open_pyramid(options.pyramid).picture(image), output)
    print(f"Picture of the feature maps: {output}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llava_uhd.inspect", description=__doc__)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help="whose model looks at it")
    parser.add_argument(
        "--pyramid", metavar="CHECKPOINT", help="show its feature maps instead of the views"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="default: IMAGE_slices.png or _pyramid.png here"
    )
    return parser.parse_args()


def prepare(
    image: Image.Image, config: LlavaUHDConfig, overview_only: bool = False
) -> tuple[Image.Image, SlicePlan]:
    """The image as the processor prepares it, and the plan of its views."""
    if config.image.detail_side is not None:
        image = remove_detail(image, config.image.detail_side)
    size = prepared_size(config.image, *image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    unprepared = dataclasses.replace(config.image, long_side=None)
    return image, plan_image(unprepared, size[0], size[1], overview_only)


def describe(plan: SlicePlan, config: LlavaUHDConfig) -> list[str]:
    """Lines on sizes, token layout and cost of an image under a plan."""
    shapes = view_token_shapes(config.projector, plan.view_grids)
    counts = [rows * columns for rows, columns in shapes]
    cost = image_cost(config, plan)
    width, height = plan.image_size
    first = int(plan.overview_first)
    lines = [f"  image      {width} x {height} pixels"]
    if plan.grid is not None and plan.refine_size is not None:
        columns, rows = plan.grid
        lines += [
            f"  grid       {columns} x {rows} (columns x rows)",
            f"  slices     {plan.num_slices} of {_view(plan, first)}, {counts[first]} tokens each, "
            f"cut from {plan.refine_size[0]} x {plan.refine_size[1]}",
        ]
    else:
        lines.append("  grid       none: one view")
    overview = 0 if plan.overview_first else -1
    lines.append(f"  overview   {_view(plan, overview)}, {counts[overview]} tokens")
    lines.append("  layout")
    if config.image.layout in ("slices", "rows"):
        lines += [f"    {row}" for row in token_layout(plan, counts, config.image.layout)]
    else:
        lines += [f"    {describe_map(each)}" for each in image_maps(config.image, plan, shapes)]
    separators = cost.positions - cost.visual_tokens
    lines += [
        f"  tokens     {cost.visual_tokens} visual + {separators} separators = {cost.positions} "
        "positions",
        f"  TFLOPs     {cost.total / 1e12:.4g}: tower {cost.tower / 1e12:.4g}, projector "
        f"{cost.projector / 1e12:.4g}, language model prefill {cost.language / 1e12:.4g}",
        "             (FLOP = 2 multiply-adds; causal attention, logits at one position, no text)",
    ]
    return lines


def _view(plan: SlicePlan, index: int) -> str:
    width, height = plan.view_sizes[index]
    rows, columns = plan.view_grids[index]
    return f"{width} x {height} ({columns} x {rows} patches)"


def token_layout(plan: SlicePlan, counts: list[int], layout: str = "slices") -> list[str]:
    r"""How the tokens of an image stand in the text.

    Example: a grid of 2 x 1 with 144 tokens a view: ``["[1: 144] , [2: 144] \n",
    "[overview: 144]"]``, with the separators as they are written; in the layout "rows":
    ``["12 rows of [1: 12] [2: 12] \n", ",", "[overview: 144]"]``.
    """
    rows = []
    if plan.grid is not None and layout == "rows":
        columns, side = plan.grid[0], map_side(counts)
        for start in range(0, plan.num_slices, columns):
            row = [f"[{at + 1}: {side}]" for at in range(start, start + columns)]
            rows.append(f"{side} rows of {' '.join(row)} \\n")
        rows.append("\\n" if columns == 1 else ",")
    elif plan.grid is not None:
        columns = plan.grid[0]
        for start in range(0, plan.num_slices, columns):
            row = [f"[{at + 1}: {counts[at]}]" for at in range(start, start + columns)]
            rows.append(" , ".join(row) + " \\n")
    return [*rows, f"[overview: {counts[-1]}]"]


def describe_map(each: TokenMap) -> str:
    """One map of tokens in words.

    Example: ``"2 x 2 views joined: 40 x 54 tokens kept, a newline after each row"``.
    """
    several = each.columns * each.rows > 1
    views = f"{each.columns} x {each.rows} views joined" if several else "view"
    text = f"{views}: {each.height} x {each.width} tokens kept"
    if (each.out_height, each.out_width) != (each.height, each.width):
        text += f", shrunk to {each.out_height} x {each.out_width}"
    newline = {Newline.END: ", a newline at the end", Newline.ROWS: ", a newline after each row"}
    return text + newline.get(Newline(each.newline), "")


def picture_path(image: Path, output: Path | None, kind: str = "slices") -> Path:
    """Where the picture goes.

    Raises:
        UserError: the name has no picture format, or the image itself would be overwritten.
    """
    path = output or Path(f"{image.stem}_{kind}.png")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output {path} must end in .png, .jpg or .webp")
    if path.exists() and path.resolve() == image.resolve():
        raise UserError(f"--output {path} is the image itself: choose another name")
    return path


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes the picture, with its folder.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    command(main)
