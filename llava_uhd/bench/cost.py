"""``bench cost``: parameters, visual tokens and operations of any model, from its shapes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rich.console import Console

from llava_uhd.bench.encode import image_size
from llava_uhd.bench.output import make_console, print_table, write_json
from llava_uhd.checkpoint.shapes import describe_checkpoint, describe_recipe, known_model
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.recipe import load_recipe
from llava_uhd.errors import UserError
from llava_uhd.images.cost import (
    PUBLISHED,
    Convention,
    Cost,
    built_tower_layers,
    count_parameters,
    image_cost,
)
from llava_uhd.images.geometry import Size
from llava_uhd.images.strategies import plan_image

LANGUAGE_MODELS = {"7b": "vicuna-7b-v1.5", "13b": "vicuna-13b-v1.5"}
QUERIES = {"llava15": None, "uhd64": 64, "uhd144": 144}
PRESETS = [f"{system}-{size}" for size in LANGUAGE_MODELS for system in QUERIES]
TITLES = {"llava15": "LLaVA-1.5", "uhd64": "LLaVA-UHD, 64 queries", "uhd144": "LLaVA-UHD, 144"}

# What module-hook profilers see of `PUBLISHED`.
HOOKED = dataclasses.replace(PUBLISHED, attention_inputs=False)

NOTES = """\
FLOP = 2 multiply-adds everywhere; tables in MACs show half.
"published count": all tower layers, full (not causal) attention, logits at every position, the
projector as first published: the convention of the paper's table (LLaVA-1.5-13B at 336x336: 15.50).
"without attention inputs": the same without the input projections of the resampler's attention,
which profilers that hook modules do not see.
"as computed here": only the tower layers in use, causal attention, logits at one position, the
resampler's equal but cheaper form.
The "94 %" of LLaVA-UHD belongs to the 64-query release (13B, 672x1008; paper: 14.63 of 15.50). The
published code and weights have 144 queries and cost about twice LLaVA-1.5."""


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "cost", help="parameters, visual tokens and FLOPs of a recipe, checkpoint or preset"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--recipe", metavar="NAME", help="a recipe's model")
    group.add_argument("--checkpoint", metavar="DIR", help="a checkpoint folder's model")
    group.add_argument("--preset", choices=PRESETS, help="a published combination")
    parser.add_argument(
        "--image", type=image_size, default=(672, 1008), metavar="WxH", help="size in pixels"
    )
    parser.add_argument("--text-tokens", type=int, default=0, help="text beside the image")
    parser.add_argument("--overview-only", action="store_true", help="as in the first stage")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the chosen model, then the published systems side by side."""
    if options.text_tokens < 0:
        raise UserError(f"--text-tokens must not be negative, got {options.text_tokens}")
    console = make_console()
    results: dict[str, Any] = {"image": list(options.image), "text_tokens": options.text_tokens}
    chosen = choose(options)
    if chosen is not None:
        name, config = chosen
        results["model"] = describe(console, name, config, options)
    results["systems"] = [
        row
        for size in LANGUAGE_MODELS
        for row in compare_systems(console, size, options.image, options.text_tokens)
    ]
    console.print(NOTES)
    if options.json:
        write_json(options.json, results)
    return 0


def choose(options: argparse.Namespace) -> tuple[str, LlavaUHDConfig] | None:
    """Name and configuration of the model that the command line names, if any."""
    if options.recipe:
        return options.recipe, describe_recipe(load_recipe(options.recipe))
    if options.checkpoint:
        return options.checkpoint, describe_checkpoint(options.checkpoint)
    if options.preset:
        return options.preset, preset_model(options.preset)
    return None


def preset_model(name: str) -> LlavaUHDConfig:
    """Model of a preset, for instance ``uhd144-7b``."""
    system, _, size = name.partition("-")
    return known_model(LANGUAGE_MODELS[size], QUERIES[system])


def describe(
    console: Console, name: str, config: LlavaUHDConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """Prints parameters and operations of one model, part by part."""
    width, height = options.image
    plan = plan_image(config.image, width, height, options.overview_only)
    ours = image_cost(config, plan, options.text_tokens)
    published = image_cost(config, plan, options.text_tokens, PUBLISHED)
    count = count_parameters(config)
    console.print(
        f"{name}: image {width}x{height} -> {plan.num_views} view(s), {ours.visual_tokens} visual "
        f"tokens, {ours.positions} positions with separators and {options.text_tokens} text tokens"
    )
    layers = config.vision_config.num_hidden_layers
    tower = f"vision tower, {layers} layers ({built_tower_layers(config)} run)"
    parts = (
        (tower, count.tower, ours.tower, published.tower),
        ("projector", count.projector, ours.projector, published.projector),
        ("language model", count.language, ours.language, published.language),
    )
    rows = [(part, f"{n:,}", tera(here), tera(there)) for part, n, here, there in parts]
    total = count.tower + count.projector + count.language
    rows.append(("sum", f"{total:,}", tera(ours.total), tera(published.total)))
    columns = ("", "parameters", "TFLOPs as computed here", "TFLOPs, published count")
    print_table(console, "", columns, rows)
    return {
        "name": name,
        "parameters": dataclasses.asdict(count),
        "flops": as_dict(ours),
        "flops_published_count": as_dict(published),
    }


def compare_systems(
    console: Console, size: str, image: Size, text_tokens: int
) -> list[dict[str, Any]]:
    """Prints LLaVA-1.5 and LLaVA-UHD with one language model."""
    found: list[dict[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    base: list[float] = []
    for system in QUERIES:
        config = preset_model(f"{system}-{size}")
        plan = plan_image(config.image, *image)
        costs = [
            image_cost(config, plan, text_tokens, convention)
            for convention in (PUBLISHED, HOOKED, Convention())
        ]
        base = base or [cost.total for cost in costs]
        shares = [f"{tera(cost.total)} ({cost.total / b:.0%})" for cost, b in zip(costs, base)]
        sizes = [f"{width}x{height}" for width, height in plan.view_sizes]
        views = f"{plan.num_slices} x {sizes[0]} + {sizes[-1]}" if plan.grid else sizes[-1]
        tokens = f"{costs[0].visual_tokens} / {costs[0].positions}"
        rows.append((TITLES[system], views, tokens, *shares))
        kinds = ("published_count", "without_attention_inputs", "as_computed_here")
        counts = {kind: as_dict(cost) for kind, cost in zip(kinds, costs)}
        ratios = {kind: cost.total / b for kind, cost, b in zip(kinds, costs, base)}
        found.append({"preset": f"{system}-{size}", "flops": counts, "of_llava15": ratios})
    title = f"Vicuna-{size.upper()}, image {image[0]}x{image[1]}, TFLOPs (of LLaVA-1.5)"
    kinds_shown = ("published count", "without attention inputs", "as computed here")
    columns = ("", "views", "visual tokens / positions", *kinds_shown)
    print_table(console, title, columns, rows)
    return found


def tera(flops: float) -> str:
    """``"15.50"`` for 15.5e12; more digits below one."""
    value = flops / 1e12
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def as_dict(cost: Cost) -> dict[str, Any]:
    """Fields and total."""
    return {**dataclasses.asdict(cost), "total": cost.total}
