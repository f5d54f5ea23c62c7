"""``bench project``: the multi-scale projector, its plain form against the fast one."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from torch import nn

from llava_uhd.bench.alone import peak_process_bytes
from llava_uhd.bench.encode import PRESETS
from llava_uhd.bench.output import make_console, mebibytes, print_table, seconds, write_json
from llava_uhd.config.model import SCALES, LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.images.cost import PUBLISHED, Convention, tower_flops
from llava_uhd.images.cost_projectors import HiwinCost
from llava_uhd.projectors.hiwin import FORMS, HiwinProjector
from llava_uhd.projectors.hiwin_weights import Grid
from llava_uhd.vision.towers import VisionTower
from llava_uhd.vision.upsampler import UpsamplerStack, stack_scale

# Largest difference between the forms, relative to the largest value, in float32.
OUTPUT_BOUND, GRADIENT_BOUND = 1e-5, 1e-4

# Values of each result that are compared (evenly spread).
SAMPLES = 2**17

PLAIN: Final = "plain"
FAST: Final = "fast"

NOTES = """\
CPU time of a process for each form and pass, which runs once unless --repeats says more; memory is
all that the process takes beyond modules and inputs. "maps given": the feature maps are inputs, so
only the projector is compared; the upsampler is the same in both forms. Gradients are those of the
projector's own parameters: tower and upsampler rest, as in the first stage."""


@dataclass(frozen=True)
class Task:
    """What one process computes.

    Attributes:
        preset: of the tower and the widths.
        width: of the language model.
        scales: of the maps.
        views: square views of the tower's own size.
        kind: ``given`` maps, ``whole`` with the upsampler, or the ``tower`` itself.
        backward: gradients as well.
    """

    preset: str
    width: int
    scales: tuple[int, ...]
    views: int
    kind: str = "given"
    backward: bool = False

    @property
    def config(self) -> LlavaUHDConfig:
        """Of the model around it."""
        preset = PRESETS[self.preset]
        heads = max(self.width // 128, 1)
        return LlavaUHDConfig(
            vision_config={**preset.vision, "model_type": "clip_vision_model"},
            text_config={
                "model_type": "llama",
                "hidden_size": self.width,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
            },
            projector={"type": "hiwin", "num_queries": preset.queries, "scales": self.scales},
        )

    @property
    def grids(self) -> list[Grid]:
        """(rows, columns) of each view."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return [(side, side)] * self.views


@dataclass(frozen=True)
class Finding:
    """What a process measured.

    Attributes:
        times: seconds of each run.
        peak_bytes: memory beyond modules and inputs.
        samples: of the output and of each gradient, with the largest absolute value of all.
    """

    times: list[float]
    peak_bytes: int
    samples: dict[str, tuple[np.ndarray, float]]


class GivenMaps(HiwinProjector):
    """A projector whose maps are made beforehand; "pixels" hold the number of their view."""

    maps: dict[int, torch.Tensor]

    def feature_maps(
        self, features: torch.Tensor, pixel_values: torch.Tensor | None, grid: Grid
    ) -> dict[int, torch.Tensor]:
        """The views' maps; see `HiwinWeights.feature_maps`."""
        assert pixel_values is not None
        start = int(pixel_values[0, 0, 0])
        return {scale: maps[start : start + len(features)] for scale, maps in self.maps.items()}


def fill_weights(module: nn.Module, width: int) -> None:
    """Random weights of the size of trained ones; the upsampler's are those of a new one."""
    torch.manual_seed(0)  # the upsampler draws from the common generator
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=width**-0.5, generator=generator)
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.fill_(1)
            elif isinstance(part, UpsamplerStack):
                part.reset_weights()


def make_run(task: Task, form: str) -> Callable[[], dict[str, torch.Tensor]]:
    """Builds modules and inputs; the result runs them once: output and gradients by name."""
    config, grids, count = task.config, task.grids, task.views
    generator = torch.Generator().manual_seed(1)
    width, patch = config.vision_config.hidden_size, config.vision_config.patch_size
    rows, columns = grids[0]
    view_grids = torch.tensor(grids)
    pixels = torch.randn(count * rows * columns, 3 * patch**2, generator=generator)
    if task.kind == "tower":
        tower = VisionTower(config.vision_config, config.select_layer)
        fill_weights(tower, width)
        return lambda: {"output": tower(pixels, view_grids)}
    module = GivenMaps(config) if task.kind == "given" else HiwinProjector(config)
    module.form = PLAIN if form == PLAIN else FAST
    fill_weights(module, task.width)
    if stack_scale(task.scales):
        module.upsampler.requires_grad_(False)
    features = torch.randn(count * rows * columns, width, generator=generator)
    if isinstance(module, GivenMaps):
        sizes = [(scale, (count, scale * rows, scale * columns, width)) for scale in task.scales]
        module.maps = {scale: torch.randn(size, generator=generator) for scale, size in sizes}
        pixels = torch.arange(count).repeat_interleave(rows * columns)[:, None].float()
    slope = torch.randn(count * module.grid_size**2, task.width, generator=generator)

    def run() -> dict[str, torch.Tensor]:
        module.zero_grad()
        out = module(features, view_grids, pixels)
        if not task.backward:
            return {"output": out}
        out.backward(slope)
        own = {name: each.grad for name, each in module.named_parameters() if each.requires_grad}
        return {
            "output": out.detach(),
            **{name: grad for name, grad in own.items() if grad is not None},
        }

    return run


def measure(task: Task, form: str, repeats: int, threads: int) -> Finding:
    """In a process of its own: runs, timed, the first one with an eye on the memory."""
    torch.set_num_threads(threads)
    small = Task("tiny", 256, task.scales, 1, task.kind, task.backward)
    times: list[float] = []
    last: dict[str, torch.Tensor] = {}
    with torch.set_grad_enabled(task.backward):
        make_run(small, form)()  # loads what the libraries load on first use
        run = make_run(task, form)

        def timed() -> None:
            last.clear()
            start = time.process_time()
            last.update(run())
            times.append(time.process_time() - start)

        peak = peak_process_bytes(timed)
        for _ in range(repeats - 1):
            timed()
    return Finding(times, peak, {name: _sample(value) for name, value in last.items()})


def _sample(values: torch.Tensor) -> tuple[np.ndarray, float]:
    flat = values.detach().flatten()
    # An odd distance, so that not one column of a matrix is taken again and again.
    step = max(flat.numel() // SAMPLES, 1) | 1
    return flat[::step].clone().numpy(), float(flat.abs().max())


def in_process(task: Task, form: str, repeats: int, threads: int) -> Finding:
    """`measure` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, task, form, repeats, threads).result()


def largest_errors(plain: Finding, fast: Finding) -> dict[str, float]:
    """Relative error of the output, and of the worst gradient."""
    found = {"output": 0.0, "gradients": 0.0}
    for name, (expected, largest) in plain.samples.items():
        error = float(np.abs(fast.samples[name][0] - expected).max()) / (largest or 1.0)
        kind = "output" if name == "output" else "gradients"
        found[kind] = max(found[kind], error)
    return found


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "project", help="the multi-scale projector: plain form against the fast one"
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="clip-l", help="sizes of the parts"
    )
    parser.add_argument("--width", type=int, help="width of the language model")
    parser.add_argument(
        "--scales", type=scale_list, default=(1, 4), metavar="1,4", help="of the maps"
    )
    parser.add_argument("--views", type=int, default=7, help="square views of the tower's size")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each form")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def scale_list(text: str) -> tuple[int, ...]:
    """``"1,4"`` to ``(1, 4)``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    words = text.split(",")
    allowed = {str(scale) for scale in SCALES}
    if not set(words) <= allowed or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of scales of {SCALES}: 1,4")
    return tuple(sorted(int(word) for word in words))


TITLES = {
    ("given", False): "forward, maps given",
    ("given", True): "forward and backward, maps given",
    ("whole", False): "forward with the upsampler",
}


def run(options: argparse.Namespace) -> int:
    """Measures, prints, and returns 1 if a difference is beyond its bound."""
    for name in ("views", "repeats", "threads", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    width = options.width or PRESETS[options.preset].width
    if width % 128:
        raise UserError(f"--width must be a multiple of 128, got {width}")
    each = {"repeats": options.repeats, "threads": options.threads}
    base = (options.preset, width, options.scales, options.views)
    console = make_console()
    task = Task(*base)
    describe(console, task, options.threads)
    comparisons = []
    for (kind, backward), title in TITLES.items():
        part = Task(*base, kind, backward)
        findings = {form: in_process(part, form, **each) for form in (PLAIN, FAST)}
        assert findings.keys() == FORMS.keys()
        comparisons.append(compare(title, findings))
        print_comparison(console, comparisons[-1])
    tower = in_process(Task(*base, "tower"), "", **each)
    relation = against_tower(task, min(tower.times), comparisons[-1])
    print_relation(console, relation)
    console.print(NOTES)
    failed = [
        f"{one['title']}: relative error {one['errors'][kind]:.1e} of {kind} is beyond {bound:.0e}"
        for one in comparisons
        for kind, bound in (("output", OUTPUT_BOUND), ("gradients", GRADIENT_BOUND))
        if one["errors"][kind] > bound
    ]
    if options.json:
        facts = {**asdict(task), "threads": options.threads, "torch": torch.__version__}
        results = {"comparisons": comparisons, "tower": relation, "passed": not failed}
        write_json(options.json, {**facts, **results})
    for line in failed:
        console.print(f"FAILED: {line}")
    return 1 if failed else 0


def compare(title: str, findings: Mapping[str, Finding]) -> dict[str, Any]:
    """Times, memory and errors of both forms, ready for JSON."""
    plain, fast = findings[PLAIN], findings[FAST]
    rows = {
        form: {
            "best_s": min(one.times),
            "median_s": statistics.median(one.times),
            "peak_bytes": one.peak_bytes,
        }
        for form, one in findings.items()
    }
    return {
        "title": title,
        "rows": rows,
        "speedup": min(plain.times) / min(fast.times),
        "memory_ratio": plain.peak_bytes / max(fast.peak_bytes, 1),
        "errors": largest_errors(plain, fast),
    }


def against_tower(task: Task, tower_s: float, whole: Mapping[str, Any]) -> dict[str, Any]:
    """Operations and time of the projector, its upsampler included, beside the tower's."""
    cost, grids, config = HiwinCost(), task.grids, task.config
    flops = {
        "tower": tower_flops(config, grids),
        PLAIN: cost.flops(config, grids, PUBLISHED),
        FAST: cost.flops(config, grids, Convention()),
    }
    times = {"tower": tower_s, **{form: row["best_s"] for form, row in whole["rows"].items()}}
    return {"flops": flops, "seconds": times}


def describe(console: Console, task: Task, threads: int) -> None:
    """Prints what is measured."""
    rows, columns = task.grids[0]
    vision, queries = task.config.vision_config, task.config.projector.num_queries
    scales = " + ".join(f"{scale}x" for scale in task.scales)
    console.print(
        f"{task.preset}: {task.views} views of {rows}x{columns} patches, C = {vision.hidden_size}, "
        f"D = {task.width}, {queries} queries, scales {scales}; float32 on CPU, {threads} "
        f"thread(s), torch {torch.__version__}\n"
    )


def print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """Prints the table of one pass."""
    rows = []
    for form, row in comparison["rows"].items():
        last = form == FAST
        errors = comparison["errors"]
        rows.append(
            (
                form,
                seconds(row["best_s"]),
                f"{comparison['speedup']:.2f}" if last else "1.00",
                mebibytes(row["peak_bytes"]),
                f"{1 / comparison['memory_ratio']:.3f}" if last else "1.000",
                f"{errors['output']:.1e}" if last else "-",
                f"{errors['gradients']:.1e}" if last and errors["gradients"] else "-",
            )
        )
    columns = ("", "time", "times faster", "peak memory", "of plain", "output error", "gradients")
    print_table(console, comparison["title"], columns, rows)


def print_relation(console: Console, relation: Mapping[str, Any]) -> None:
    """Prints the table of the projector beside the tower."""
    flops, times = relation["flops"], relation["seconds"]
    names = {"tower": "vision tower", PLAIN: "projector, plain", FAST: "projector, fast"}
    rows = [
        (
            names[key],
            f"{flops[key] / 1e12:.3g}",
            f"{flops[key] / flops['tower']:.2f}",
            seconds(times[key]),
            f"{times[key] / times['tower']:.2f}",
        )
        for key in names
    ]
    title = "forward, the projector with its upsampler beside the tower"
    print_table(console, title, ("", "TFLOPs", "of tower", "time", "of tower"), rows)
