"""``bench upsample``: joint bilateral upsampling, our forms against the plain ones."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from llava_uhd.bench import plain_upsample as plain
from llava_uhd.bench.alone import Alone, compare_alone
from llava_uhd.bench.encode import image_size
from llava_uhd.bench.output import make_console, mebibytes, print_table, seconds, write_json
from llava_uhd.bench.timing import Comparison, Measurement, Variant, compare
from llava_uhd.errors import UserError
from llava_uhd.vision import adaptive_conv_tiles
from llava_uhd.vision.adaptive_conv import upsample_conv
from llava_uhd.vision.adaptive_conv_plan import Rule
from llava_uhd.vision.upsampler import STACKS, UpsamplerStack

# Largest difference to the first form, relative to its largest value.
ERROR_BOUNDS = {"float32": 1e-5, "bfloat16": 2**-6}

GPU_LOOPS = 20
PATCH = 14  # pixels of the guiding image for each cell of the tower's map

OURS, TILES = "ours", "ours without the GPU kernels"
EXACT = "sum of 49 shifts in float32"
UNFOLD, SHIFTS = plain.CONVOLUTIONS


CLOCKS = {
    "compare_on_cpu": "CPU time of a process for each form, and all memory that it takes.",
    "compare_together": "CPU time of this process, forms in turns; memory of the tensors.",
    "compare_on_gpu": "Wall time, forms in turns; memory of the tensors.",
}

# Kind, size and dtype of a task.
Key = tuple[str, tuple[int, int], str]


@dataclass(frozen=True)
class Task:
    """Something to compute.

    Attributes:
        kind: ``convolution`` of a map that is upsampled and padded; ``gradients``, the same with
            the gradients of map and kernels; ``kernels`` of a stage; ``stack``, all of it.
        size: (rows, columns) of the source.
        width: channels.
        scale: of the stack.
        batch: maps.
        dtype: name of the maps' dtype.
        device: where.
    """

    kind: str
    size: tuple[int, int]
    width: int
    scale: int = 4
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def key(self) -> Key:
        """What tells a task from others of one run."""
        return self.kind, self.size, self.dtype

    @property
    def least_bytes(self) -> int:
        """Traffic with a GPU's memory that no form can avoid: inputs read, results written."""
        size = 2 if self.dtype == "bfloat16" else 4
        rows, columns = self.size
        cells = self.batch * rows * columns
        maps = cells * self.width * size  # the source; a map of twice its size takes four times
        kernels = 4 * cells * 49 * size
        if self.kind == "kernels":
            return 4 * cells * (3 + 49) * size
        if self.kind == "stack":
            images = 3 * PATCH**2 * cells * size
            larger = sum(ratio**2 for ratio in STACKS if ratio <= self.scale)
            return maps * (1 + larger) + images + self.width * (self.width + 1) * size
        forward = maps + kernels + 4 * maps
        # Backward: the gradient of the output and both inputs read, two gradients written.
        return forward if self.kind == "convolution" else 2 * forward + maps + kernels

    def random(self, seed: int, *shape: int) -> torch.Tensor:
        """Normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(self.batch, *shape, generator=generator)
        return tensor.to(self.device, getattr(torch, self.dtype))


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "upsample", help="joint bilateral upsampling: unfold and sum of shifts against ours"
    )
    parser.add_argument("--map", type=image_size, default=(24, 24), metavar="WxH", help="patches")
    parser.add_argument("--width", type=int, default=1024, help="channels of the maps")
    parser.add_argument("--scale", type=int, choices=STACKS, default=4, help="of the map")
    parser.add_argument("--batch", type=int, default=1, help="maps")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--together",
        action="store_true",
        help="CPU: all variants in one process (faster; counts the memory of tensors only)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints, and returns 1 if a difference is beyond its bound."""
    for name in ("width", "batch", "repeats", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if min(options.map) < 2:
        raise UserError(f"--map: the plain forms need 2 patches along each axis, got {options.map}")
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device")
    size = (options.map[1], options.map[0])
    first = Task("convolution", size, options.width, options.scale, options.batch)
    first = dataclasses.replace(first, device=options.device)
    measure = compare_on_gpu if cuda else compare_on_cpu
    if options.together and not cuda:
        measure = compare_together
    comparisons = measure(first, options.repeats, options.threads)
    facts = {
        "map": list(size),
        "width": options.width,
        "scale": options.scale,
        "batch": options.batch,
        "device": torch.cuda.get_device_name(options.device) if cuda else "CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "clock": CLOCKS[measure.__name__],
    }
    console = report(facts, list(comparisons.values()))
    failed = [
        f"{comparison.title}: relative error {comparison.worst_error:.1e} is beyond {bound:.0e}"
        for (_, _, dtype), comparison in comparisons.items()
        if comparison.worst_error > (bound := ERROR_BOUNDS[dtype])
    ]
    if options.json:
        results = [comparison.to_dict() for comparison in comparisons.values()]
        write_json(options.json, {**facts, "comparisons": results, "passed": not failed})
    for line in failed:
        console.print(f"FAILED: {line}")
    return 1 if failed else 0


def tasks(first: Task) -> dict[str, Task]:
    """Title and task of every comparison, for maps of one dtype."""
    found: dict[str, Task] = {}
    rows, columns = first.size
    ratio = 1
    while ratio < first.scale:
        size = (rows * ratio, columns * ratio)
        title = f"{size[0]}x{size[1]} -> {size[0] * 2}x{size[1] * 2}"
        task = dataclasses.replace(first, size=size)
        found[f"bicubic, padding and 7x7 kernels, {title}"] = task
        if ratio == 1:
            learning = dataclasses.replace(task, kind="gradients")
            found[f"the same with its gradients, {title}"] = learning
        ratio *= 2
    # The kernels of the last stage, whose guidance is twice its source.
    title = f"kernels of the last stage, {rows * ratio}x{columns * ratio}"
    found[title] = dataclasses.replace(task, kind="kernels")
    title = f"whole stack, {rows}x{columns} -> {rows * ratio}x{columns * ratio}"
    found[title] = dataclasses.replace(first, kind="stack")
    return found


def compare_on_cpu(first: Task, repeats: int, threads: int) -> dict[Key, Comparison]:
    """Every form in a process of its own."""
    chosen = tasks(first)
    jobs = [
        Alone(title, task, dataclasses.replace(task, size=(4, 4)), cpu_forms(task))
        for title, task in chosen.items()
    ]
    comparisons = compare_alone(make_variant, jobs, repeats=repeats, threads=threads)
    return {task.key: each for task, each in zip(chosen.values(), comparisons, strict=True)}


def compare_together(first: Task, repeats: int, threads: int) -> dict[Key, Comparison]:
    """All forms in this process, in turns; memory is that of the tensors."""
    torch.set_num_threads(threads)
    results: dict[Key, Comparison] = {}
    for title, task in tasks(first).items():
        variants = {form: make_variant(task, form) for form in cpu_forms(task)}
        results[task.key] = compare(title, variants, repeats=repeats)
    return results


def cpu_forms(task: Task) -> tuple[str, ...]:
    """The forms of a task that a CPU compares, the plainest first."""
    return (UNFOLD, OURS) if task.kind == "kernels" else (UNFOLD, SHIFTS, OURS)


def compare_on_gpu(first: Task, repeats: int, threads: int) -> dict[Key, Comparison]:
    """All forms in this process, in float32 and in bfloat16."""
    results: dict[Key, Comparison] = {}
    for dtype in ERROR_BOUNDS:
        for title, task in tasks(dataclasses.replace(first, dtype=dtype)).items():
            forms = [EXACT, UNFOLD, SHIFTS, TILES, OURS]
            if task.kind in ("kernels", "stack"):
                if dtype != "float32":
                    continue  # the plain forms of these are for float32
                forms = list(cpu_forms(task))
            elif task.kind == "gradients":
                forms.remove(TILES)
            variants = {form: _looped(make_variant(task, form)) for form in forms}
            found = compare(title, variants, repeats=repeats, device=task.device)
            rows = [_one_loop(row) for row in found.rows]
            title = f"{title}, {dtype}, at least {task.least_bytes:,} bytes"
            speed = memory_speed(torch.device(task.device))
            if speed:
                title += f" in {seconds(task.least_bytes / speed)}"
            results[task.key] = Comparison(title, tuple(rows))
    return results


def memory_speed(device: torch.device) -> float | None:
    """Bytes per second of a GPU's memory, from its clock and its bus, where these are known."""
    facts = torch.cuda.get_device_properties(device)
    clock, bus = (getattr(facts, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * clock * 1e3 * bus / 8 or None


def _looped(variant: Variant) -> Variant:
    """Several runs as one: a GPU finishes one before the clock is read."""

    def run() -> Any:
        for _ in range(GPU_LOOPS - 1):
            variant.run()
        return variant.run()

    return Variant(run, variant.common)


def _one_loop(row: Measurement) -> Measurement:
    return dataclasses.replace(
        row, best_s=row.best_s / GPU_LOOPS, median_s=row.median_s / GPU_LOOPS
    )


def make_variant(task: Task, form: str) -> Variant:
    """One form of a task; the result for comparing is channels first."""
    rows, columns = task.size
    if task.kind in ("kernels", "stack"):
        return _stack_variant(task, form)
    source = task.random(0, task.width, rows, columns)
    kernel = task.random(1, 2 * rows, 2 * columns, 7, 7) / 7
    if form == EXACT:
        source, kernel = source.float(), kernel.float()
    if form not in (OURS, TILES):
        convolution = plain.CONVOLUTIONS.get(form, plain.shift_convolution)

        def upsampled(source: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
            return convolution(plain.upsample(source), kernel)

        return _with_gradients(task, upsampled, source, kernel)
    source = source.permute(0, 2, 3, 1).contiguous()
    if form == TILES:
        tiles = adaptive_conv_tiles.convolve
        return Variant(lambda: tiles(source, kernel, Rule.UPSAMPLE), _channels_first)
    return _with_gradients(task, upsample_conv, source, kernel, _channels_first)


def _channels_first(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 3, 1, 2).contiguous()


def _with_gradients(
    task: Task, form: Any, source: torch.Tensor, kernel: torch.Tensor, common: Any = None
) -> Variant:
    """Forward, or forward and backward where the task is ``gradients``."""
    common = common or (lambda maps: maps)
    if task.kind == "convolution":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return form(source, kernel)

        return Variant(forward, common)
    inputs = (source.requires_grad_(), kernel.requires_grad_())

    def gradients() -> tuple[torch.Tensor, ...]:
        output = form(*inputs)
        return torch.autograd.grad(output, inputs, output.detach())

    def both(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([common(results[0]).flatten(), results[1].flatten()])

    return Variant(gradients, both)


def _stack_variant(task: Task, form: str) -> Variant:
    rows, columns = task.size
    torch.manual_seed(0)
    stack = UpsamplerStack(task.width, task.scale)
    stack.reset_weights()
    stack = stack.to(task.device).eval()
    if task.kind == "kernels":
        image = task.random(1, 3, 2 * rows, 2 * columns)
        stage = stack.stages()[task.scale]

        def kernels() -> torch.Tensor:
            with torch.no_grad():
                return stage.kernel(image) if form == OURS else plain.stage_kernel(stage, image)

        return Variant(kernels)
    source = task.random(0, task.width, rows, columns)
    image = task.random(1, 3, PATCH * rows, PATCH * columns)
    if form == OURS:  # features of a tower come channels last
        source = source.contiguous(memory_format=torch.channels_last)

    def maps() -> dict[int, torch.Tensor]:
        with torch.no_grad():
            if form == OURS:
                return stack(source, image)
            return plain.run_stack(stack, source, image, plain.CONVOLUTIONS[form])

    return Variant(maps, lambda found: torch.cat([each.flatten() for each in found.values()]))


def report(facts: Mapping[str, Any], comparisons: Sequence[Comparison]) -> Console:
    """Prints the tables; returns where."""
    console = make_console()
    rows, columns = facts["map"]
    console.print(
        f"{facts['batch']} map(s) of {rows}x{columns}x{facts['width']}, {facts['scale']}x stack, "
        f"on {facts['device']}, {facts['threads']} thread(s), torch {facts['torch']}\n"
    )
    columns_shown = ("", "best", "median", "times faster", "peak memory", "times less", "relative")
    for comparison in comparisons:
        first = comparison.rows[0]
        lines = [
            (
                row.name,
                seconds(row.best_s),
                seconds(row.median_s),
                f"{comparison.speedup(row):.2f}",
                mebibytes(row.peak_bytes),
                f"{first.peak_bytes / row.peak_bytes:.2f}" if row.peak_bytes else "-",
                f"{row.relative_error:.1e}" if index else "-",
            )
            for index, row in enumerate(comparison.rows)
        ]
        print_table(console, comparison.title, columns_shown, lines)
    console.print(
        f"{facts['clock']} Results are included in the memory. The error is relative to the "
        "largest value of the first variant."
    )
    return console
