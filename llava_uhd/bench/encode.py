"""``bench encode``: views to tokens, our forms against the plain ones."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from llava_uhd.bench.output import make_console, mebibytes, print_table, seconds, write_json
from llava_uhd.bench.plain import encode_one_by_one, resample, roi_align, sampled_roi_align
from llava_uhd.bench.timing import Comparison, Variant, compare
from llava_uhd.checkpoint.published import CLIP_L_336
from llava_uhd.config.model import ImageConfig, LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Size
from llava_uhd.images.strategies import plan_image
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.projectors.pooling import pool_windows
from llava_uhd.projectors.resampler import SpatialResampler
from llava_uhd.vision.position import resample_positions
from llava_uhd.vision.towers import VisionTower

# Largest difference to the plain form, relative to its largest value, in float32.
ERROR_BOUND = 1e-5

Views = list[Size]


@dataclass(frozen=True)
class Preset:
    """A model size to measure.

    Attributes:
        vision: of the tower.
        width: of the language model.
        queries: of the resampler.
        image: how it is cut.
        size: default image.
        layers: tower layers that are run on a CPU by default (all that are needed on a GPU).
    """

    vision: Mapping[str, Any]
    width: int
    queries: int
    image: ImageConfig
    size: Size
    layers: int


PRESETS = {
    "clip-l": Preset(CLIP_L_336, 4096, 144, ImageConfig(), (672, 1008), 2),
    "tiny": Preset(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        width=256,
        queries=16,
        image=ImageConfig(scale_resolution=64, patch_size=8),
        size=(192, 128),
        layers=3,
    ),
}


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "encode", help="tower, window pooling and resampler: plain forms against ours"
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="clip-l", help="sizes of the parts"
    )
    parser.add_argument("--image", type=image_size, metavar="WxH", help="image size in pixels")
    parser.add_argument("--layers", type=int, help="tower layers to run (a CPU runs few)")
    parser.add_argument("--width", type=int, help="width of the language model")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def image_size(text: str) -> Size:
    """``"672x1008"`` to ``(672, 1008)``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT, for example 672x1008")
    return int(width), int(height)


def run(options: argparse.Namespace) -> int:
    """Measures, prints, and returns 1 if a difference is beyond the bound."""
    for name in ("repeats", "threads", "layers", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    preset = PRESETS[options.preset]
    device = torch.device(options.device)
    size = options.image or preset.size
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = make_config(preset, options.layers or _layers(preset, device), options.width)
    grids = plan_image(config.image, *size).view_grids
    measured = {"repeats": options.repeats, "device": device}
    with torch.inference_mode():
        tower, projector = make_modules(config, device)
        comparisons = [
            compare("vision tower", tower_variants(tower, grids, device), **measured),
            compare("window pooling", pooling_variants(projector, grids, device), **measured),
            compare("whole resampler", resampler_variants(projector, grids, device), **measured),
        ]
    facts = {
        "preset": options.preset,
        "image": list(size),
        "views": [list(grid) for grid in grids],
        "tower_layers": len(tower.layers),
        "width": config.hidden_size,
        "queries": config.projector.num_queries,
        "device": _device_name(device),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    console = report(facts, comparisons)
    worst = max(comparison.worst_error for comparison in comparisons)
    if options.json:
        results = [comparison.to_dict() for comparison in comparisons]
        bound = {"error_bound": ERROR_BOUND, "worst_error": worst, "passed": worst <= ERROR_BOUND}
        write_json(options.json, {**facts, "comparisons": results, **bound})
    if worst > ERROR_BOUND:
        console.print(f"FAILED: relative error {worst:.1e} is beyond {ERROR_BOUND:.0e}")
        return 1
    console.print(f"Equal within {worst:.1e} of the largest value (bound {ERROR_BOUND:.0e}).")
    return 0


def _layers(preset: Preset, device: torch.device) -> int:
    return preset.vision["num_hidden_layers"] - 1 if device.type == "cuda" else preset.layers


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def make_config(preset: Preset, layers: int, width: int | None = None) -> LlavaUHDConfig:
    """Model of a preset whose tower runs ``layers`` layers.

    Raises:
        UserError: a width that the resampler's heads of 128 channels do not divide.
    """
    width = width or preset.width
    if width % 128:
        raise UserError(f"--width must be a multiple of 128, got {width}")
    vision = {**preset.vision, "model_type": "clip_vision_model", "num_hidden_layers": layers + 1}
    text = {"model_type": "llama", "hidden_size": width, "num_attention_heads": width // 128}
    return LlavaUHDConfig(
        vision_config=vision,
        text_config={**text, "num_hidden_layers": 1, "num_key_value_heads": width // 128},
        image=dataclasses.replace(preset.image),
        projector={"num_queries": preset.queries},
    )


def make_modules(
    config: LlavaUHDConfig, device: torch.device
) -> tuple[VisionTower, SpatialResampler]:
    """Tower and resampler with the initial weights of a new model, in float32."""
    small = {**config.text_config.to_dict(), "vocab_size": 8, "intermediate_size": 8}
    model = LlavaUHDForConditionalGeneration(
        LlavaUHDConfig(config.vision_config, small, config.image, config.projector)
    ).eval()
    assert isinstance(model.projector, SpatialResampler)
    return model.vision_tower.to(device), model.projector.to(device)


def tower_variants(tower: VisionTower, grids: Views, device: torch.device) -> dict[str, Variant]:
    """Each view alone, and all views packed."""
    patches = sum(rows * columns for rows, columns in grids)
    pixels = torch.randn(patches, 3 * tower.config.patch_size**2, device=device)
    view_grids = torch.tensor(grids)
    return {
        "one view at a time": Variant(lambda: encode_one_by_one(tower, pixels, grids)),
        "packed views": Variant(lambda: tower(pixels, view_grids)),
    }


def pooling_variants(
    projector: SpatialResampler, grids: Views, device: torch.device
) -> dict[str, Variant]:
    """Keys and values of all views to their windows; a key is a value plus a position.

    Each form gets its inputs in the layout it likes best.
    """
    side, width = projector.grid_size, projector.proj.shape[0]
    shapes = sorted(set(grids))
    values = [torch.randn(grids.count(shape), *shape, width, device=device) for shape in shapes]
    tables = [
        resample_positions(projector.pos_embed, shape).reshape(1, *shape, width) for shape in shapes
    ]
    keys = [value + table for value, table in zip(values, tables)]
    first = [one.permute(2, 0, 1).contiguous() for maps in keys + values for one in maps]

    def from_plain(pooled: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([one.flatten(2).transpose(1, 2).flatten() for one in pooled])

    def from_matrices(pooled: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([one.transpose(0, 1).flatten() for one in pooled])

    def from_shared(pooled: list[torch.Tensor]) -> torch.Tensor:
        value, table = pooled[: len(shapes)], pooled[len(shapes) :]
        return from_matrices([a + b for a, b in zip(value, table)] + value)

    def matrices(maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [pool_windows(one, side) for one in maps]

    return {
        "RoIAlign by gathers": Variant(lambda: [roi_align(one, side) for one in first], from_plain),
        "RoIAlign by grid_sample": Variant(
            lambda: [sampled_roi_align(one, side) for one in first], from_plain
        ),
        "separable, keys and values": Variant(lambda: matrices(keys + values), from_matrices),
        "separable, values and positions": Variant(lambda: matrices(values + tables), from_shared),
    }


def resampler_variants(
    projector: SpatialResampler, grids: Views, device: torch.device
) -> dict[str, Variant]:
    """Features of the tower to tokens."""
    patches = sum(rows * columns for rows, columns in grids)
    width = getattr(projector.kv_proj, "in_features", projector.proj.shape[0])
    features = torch.randn(patches, width, device=device)
    view_grids = torch.tensor(grids)
    return {
        "as published": Variant(lambda: resample(projector, features, grids)),
        "ours": Variant(lambda: projector(features, view_grids)),
    }


def report(facts: Mapping[str, Any], comparisons: list[Comparison]) -> Console:
    """Prints the tables; returns where."""
    console = make_console()
    width, height = facts["image"]
    sizes = ", ".join(f"{rows}x{columns}" for rows, columns in facts["views"])
    console.print(
        f"{facts['preset']}: image {width}x{height}, {len(facts['views'])} views of {sizes} "
        f"patches; {facts['tower_layers']} tower layers; D = {facts['width']}, "
        f"{facts['queries']} queries; float32 on {facts['device']}, {facts['threads']} thread(s), "
        f"torch {facts['torch']}\n"
    )
    columns = ("", "best", "median", "times faster", "peak memory", "max abs error", "relative")
    for comparison in comparisons:
        rows = [
            (
                row.name,
                seconds(row.best_s),
                seconds(row.median_s),
                f"{comparison.speedup(row):.2f}",
                mebibytes(row.peak_bytes),
                f"{row.error:.1e}" if index else "-",
                f"{row.relative_error:.1e}" if index else "-",
            )
            for index, row in enumerate(comparison.rows)
        ]
        print_table(console, comparison.title, columns, rows)
    clock = "wall time" if facts["device"] != "CPU" else "CPU time of this process"
    console.print(
        f"Times are {clock}, variants in turns; peak memory counts the tensors a variant makes, "
        "its result included."
    )
    return console
