"""``bench compress``: what fewer visual tokens save, counted and measured."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_uhd.bench.compress_cost import (
    OFF,
    average,
    percent,
    print_published,
    published_rows,
    scheme_of,
    shown,
    token_layers,
)
from llava_uhd.bench.compress_passes import (
    DTYPES,
    FORWARD,
    HEAD_WIDTH,
    WHOLE,
    Task,
    Times,
    in_process,
)
from llava_uhd.bench.compress_picture import draw_times
from llava_uhd.bench.output import make_console, print_table, seconds, write_json
from llava_uhd.config.compression import Schedule, Stage
from llava_uhd.errors import UserError

# Least part of the counted saving that the schemes below must turn into saved time.
BOUND = 0.85
JUDGED = {"2/8": "heavy (2/8)", "four_stage": "four_stage"}

# "16/8" of 32 layers is "6/8" of 12; "2/8" is taken as it stands, and as its share, "1/8".
SCHEMES = "1/8,2/8,2/2,6/8,6/2,0/8,-1/8,four_stage"
TITLES = {WHOLE: "forward and backward", FORWARD: "forward"}

ABOUT = (
    "What visual context compression saves. First the paper's tables by its own definition, with "
    "the printed values beside; then training passes of a random language model are timed, each "
    "scheme against no compression, and compared with the operations that it spares. Fails "
    f"(status 1) if {' or '.join(JUDGED.values())} turns less than {BOUND:.0%} of its saved "
    "operations into saved time."
)

NOTES = """\
Each scheme is a training pass of the language model from given embeddings to the loss, against the
model's own pass without compression; passes take turns. Names are scaled to the depth (2 of 32
layers is 1 of 12), averages of several stages weigh them by their shares of the run. FLOP = 2
multiply-adds of matrix products, attention over the full square of positions, which counts the
uncompressed pass high: its kernels leave out part of what lies in the future. Realised: saved time
as a part of saved FLOPs."""


def clock_of(device: str, threads: int) -> str:
    """CPU time, which other programs disturb little, where it is one thread that works."""
    return "cpu" if device == "cpu" and threads == 1 else "wall"


def results(
    task: Task, schemes: Mapping[str, Schedule], times: Mapping[Stage, Times], clock: str
) -> list[dict[str, Any]]:
    """Counted and measured ratios of each scheme to the uncompressed pass, ready for JSON."""
    rows = []
    for name, schedule in schemes.items():
        tokens = average(schedule, lambda s: token_layers(s, task.layers, task.visual))
        flops, half = (flop_ratio(task, schedule, part) for part in (1.0, 0.5))
        row: dict[str, Any] = {
            "scheme": name,
            "stages": [stage.label for stage in schedule.stages],
            "shares": [float(share) for share in schedule.shares],
            "token_layers": tokens,
            "compression_ratio": token_layers(OFF, task.layers, task.visual) / tokens,
            "flop_ratio": flops,
            "flop_ratio_half_attention": half,
        }
        for part in (WHOLE, FORWARD):
            best, median = (
                time_ratio(schedule, {s: pick(getattr(t, clock)[part]) for s, t in times.items()})
                for pick in (min, statistics.median)
            )
            row[part] = {
                "time_ratio_best": best,
                "time_ratio_median": median,
                "realised_best": realised(best, flops),
                "realised_median": realised(median, flops),
            }
        rows.append(row)
    return rows


def flop_ratio(task: Task, schedule: Schedule, attention: float = 1.0) -> float:
    """Average operations of a schedule's stages, of the uncompressed pass; see `Task.flops`."""
    return average(schedule, lambda s: task.flops(s, attention)) / task.flops(OFF, attention)


def time_ratio(schedule: Schedule, times: Mapping[Stage, float]) -> float:
    """Average time of a schedule's stages, of the uncompressed one."""
    return average(schedule, lambda stage: times[stage]) / times[OFF]


def realised(time_part: float, flop_part: float) -> float | None:
    """Saved time as a part of saved operations; None where none are saved."""
    return (1 - time_part) / (1 - flop_part) if flop_part < 1 else None


def judge(rows: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """A line on the schemes that are held to the bound, and whether they keep it."""
    shares = {
        JUDGED[row["scheme"]]: row[WHOLE]["realised_best"]
        for row in rows
        if row["scheme"] in JUDGED and row[WHOLE]["realised_best"] is not None
    }
    if not shares:
        return f"Not judged: none of {', '.join(JUDGED)} is measured and saves anything.", True
    passed = all(share >= BOUND for share in shares.values())
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    line = f"Of the FLOPs saved in forward and backward, time realises: {told}"
    return f"{line} (at least {BOUND:.0%} wanted: {'kept' if passed else 'FAILED'})", passed


def register(commands: Any) -> None:
    """Adds the subcommand to ``python -m llava_uhd.bench``."""
    parser = commands.add_parser(
        "compress",
        help="visual context compression: what it saves, counted and measured",
        description=ABOUT,
    )
    default = Task()
    for name, of in (("layers", "decoder layers"), ("hidden", "width, a multiple of 64")):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=of)
    parser.add_argument("--mlp", type=int, help="width of the MLP; default: 8/3 of --hidden")
    parser.add_argument(
        "--vocabulary", type=int, default=default.vocabulary, help="rows of the head"
    )
    parser.add_argument("--batch", type=int, default=default.batch, help="rows")
    parser.add_argument("--visual-tokens", type=int, default=default.visual, help="in each row")
    parser.add_argument("--text-tokens", type=int, default=default.text, help="in each row")
    parser.add_argument(
        "--padding", type=int, default=0, help="text tokens that every second row is shorter"
    )
    parser.add_argument(
        "--schemes",
        default=SCHEMES,
        metavar="A,B",
        help='K/s, schedules by name or text ("2/8 2/2 off"); write --schemes=-1/8 with =',
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the weights")
    parser.add_argument("--device", default=default.device, help="cpu, cuda or cuda:N")
    parser.add_argument("--count-only", action="store_true", help="the paper's tables, no times")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw time against FLOPs")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def make_task(options: argparse.Namespace) -> Task:
    """Model and batch of a command line.

    Raises:
        UserError: a size that is no size.
    """
    mlp = options.mlp
    if mlp is None:
        mlp = -(-options.hidden * 8 // 3 // 32) * 32
    sizes = ("layers", "hidden", "vocabulary", "batch", "visual_tokens", "repeats", "threads")
    checked = {name: getattr(options, name) for name in sizes}
    for name, value in {**checked, "mlp": mlp}.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.hidden % HEAD_WIDTH:
        raise UserError(f"--hidden must be a multiple of {HEAD_WIDTH}, got {options.hidden}")
    if options.text_tokens < 2:
        raise UserError(f"--text-tokens must be at least 2, got {options.text_tokens}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device}: this machine has no CUDA device")
    task = Task(
        options.layers,
        options.hidden,
        mlp,
        options.vocabulary,
        options.batch,
        options.visual_tokens,
        options.text_tokens,
        options.padding,
        options.dtype,
        options.device,
    )
    if not 0 <= task.padding < task.prompt.logits:
        raise UserError(
            f"--padding must leave one of {task.prompt.logits} text tokens behind the picture, "
            f"got {task.padding}"
        )
    return task


def make_schemes(text: str, layers: int) -> dict[str, Schedule]:
    """``"2/8,four_stage"`` to schemes by name.

    Raises:
        UserError: none, one twice, or one that is no scheme.
    """
    names = [" ".join(name.split()) for name in text.split(",")]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--schemes names '{name}' twice")
    return {name: scheme_of(name, layers) for name in names}


def run(options: argparse.Namespace) -> int:
    """Counts, measures, prints, and returns 1 if a judged scheme realises too little."""
    task = make_task(options)
    schemes = make_schemes(options.schemes, task.layers)
    if options.plot and Path(options.plot).suffix.lower() != ".png":
        raise UserError(f"--plot {options.plot}: name a file that ends with .png")
    console = make_console()
    published = published_rows()
    print_published(console, published)
    figures: dict[str, Any] = {"published": published}
    passed = True
    if not options.count_only:
        stages = dict.fromkeys([OFF, *(s for one in schemes.values() for s in one.stages)])
        times = in_process(task, list(stages), options.repeats, options.threads)
        clock = clock_of(task.device, options.threads)
        rows = results(task, schemes, times, clock)
        line, passed = judge(rows)
        facts = {"threads": options.threads, "repeats": options.repeats, "clock": clock}
        describe(console, task, facts)
        report(console, rows, getattr(times[OFF], clock))
        console.print(NOTES)
        console.print(line)
        figures |= {**asdict(task), **facts, "torch": torch.__version__}
        figures["seconds"] = {stage.label: asdict(each) for stage, each in times.items()}
        figures |= {"schemes": rows, "bound": BOUND, "verdict": line, "passed": passed}
        if options.plot:
            draw_times(rows, BOUND, Path(options.plot))
    if options.json:
        write_json(options.json, figures)
    return 0 if passed else 1


def describe(console: Console, task: Task, facts: Mapping[str, Any]) -> None:
    """Prints what was measured."""
    padding = f", every second row {task.padding} shorter" if task.padding else ""
    console.print(
        f"\nMeasured: Llama of {task.layers} layers, width {task.hidden}, MLP {task.mlp}, "
        f"vocabulary {task.vocabulary}; {task.batch} rows of {task.visual} visual and {task.text} "
        f"text tokens{padding}; {task.dtype} on {task.device}, {facts['threads']} thread(s), "
        f"{facts['clock']} time of {facts['repeats']} turn(s), torch {torch.__version__}\n"
    )


def report(
    console: Console, rows: Sequence[Mapping[str, Any]], base: Mapping[str, list[float]]
) -> None:
    """Prints a table for the whole pass and one for its first part."""
    columns = ("", "tokens x layers", "CR", "FLOPs", "time, best", "median", "realised", "median")
    for part, title in TITLES.items():
        table = [
            (
                _title(row),
                f"{row['token_layers']:.0f}",
                percent(row["compression_ratio"]),
                f"{row['flop_ratio']:.3f}",
                f"{row[part]['time_ratio_best']:.3f}",
                f"{row[part]['time_ratio_median']:.3f}",
                shown(row[part]["realised_best"], ".0%"),
                shown(row[part]["realised_median"], ".0%"),
            )
            for row in rows
        ]
        best, median = seconds(min(base[part])), seconds(statistics.median(base[part]))
        print_table(console, f"{title}, of off: {best} ({median})", columns, table)


def _title(row: Mapping[str, Any]) -> str:
    """``"four_stage: 1/8 1/2 6/2 off"``; a single stage needs no second name."""
    stages = " ".join(row["stages"])
    return stages if row["scheme"] == stages else f"{row['scheme']}: {stages}"
