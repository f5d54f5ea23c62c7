"""What compression saves, by arithmetic alone: visual tokens and operations of each layer.

Source of the definition and of all printed figures: LLaVolta (arXiv 2406.20092). The sum of visual
tokens over all layers is its "#Tokens"; the compression ratio (CR) is that of the uncompressed
model divided by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from llava_uhd.bench.cost import LANGUAGE_MODELS, preset_model
from llava_uhd.bench.output import print_table
from llava_uhd.config.compression import (
    PUBLISHED_LAYERS,
    SCHEDULES,
    Schedule,
    Stage,
    parse_schedule,
    resolve_schedule,
)
from llava_uhd.errors import UserError
from llava_uhd.images.cost import LanguageShape, language_shape
from llava_uhd.language.compressors import num_kept

OFF = Stage()

# Of LLaVA-1.5; the text is what the paper's operations come to.
PUBLISHED_VISUAL, PUBLISHED_TEXT = 576, 61


@dataclass(frozen=True)
class Prompt:
    """One row of a batch.

    Attributes:
        visual: tokens of its picture, one run.
        text: other tokens.
        logits: positions with logits.
    """

    visual: int
    text: int
    logits: int = 1


@dataclass(frozen=True)
class Printed:
    """What the paper prints for a scheme.

    Attributes:
        tokens: visual tokens summed over layers, averaged over the stages; None: not printed.
        percent: compression ratio.
        tera: TFLOPs of the language model in the last stage; None: not printed.
        source: which table.
    """

    tokens: int | None
    percent: int
    tera: float | None
    source: str


PRINTED_STAGES = {
    "off": Printed(18432, 100, 8.26, "tables 2 and 5"),
    "2/8": Printed(3312, 557, 2.14, "tables 3 and 5"),
    "2/4": Printed(None, 337, 3.02, "table 5"),
    "2/2": Printed(None, 188, 4.77, "table 5"),
    "2/16": Printed(None, 825, None, "text"),
    "16/8": Printed(None, 178, 5.00, "table 5"),
    "16/4": Printed(None, 160, 5.47, "table 5"),
    "16/2": Printed(None, 133, 6.40, "table 5"),
    "16/16": Printed(None, 188, None, "text"),
    "1/64": Printed(855, 2156, None, "table 4"),
}
PRINTED_SCHEDULES = {
    "heavy": PRINTED_STAGES["2/8"],
    "light": PRINTED_STAGES["16/8"],
    "two_stage": Printed(10062, 183, 8.26, "table 2"),
    "three_stage_deeper": Printed(10597, 174, 8.26, "table 2"),
    "three_stage_wider": Printed(10407, 177, 8.26, "table 2"),
    "four_stage": Printed(11088, 166, 8.26, "table 2"),
    "four_stage_deeper": Printed(10863, 170, 8.26, "table 2"),
    "last_stage": Printed(7848, 235, 5.47, "table 2"),
}

PUBLISHED_NOTES = """\
"linear layers": the paper's count, 2 operations for each weight and position, without the products
of queries, keys and values; "all" has those too, over the full square of positions.
The paper's averages of schedules with several stages do not follow from its own definition. Those
of two_stage and four_stage_deeper come out exactly with stride 32 in the place of 8, those with
three stages with 0.33 in the place of a third; computed are the stages that it names."""


def kept_tokens(stage: Stage, visual: int) -> int:
    """Tokens of a run behind the compression; an incomplete group is kept.

    Example: stride 8 makes 72 of 576.
    """
    return num_kept(visual, stage.stride, True)


def visual_by_layer(stage: Stage, layers: int, visual: int) -> list[int]:
    """Visual tokens that each layer sees.

    Example: ``1/8`` in 3 layers with 16 tokens: ``[16, 2, 2]``.
    """
    return [
        visual if index < stage.layer else kept_tokens(stage, visual) for index in range(layers)
    ]


def token_layers(stage: Stage, layers: int, visual: int) -> int:
    """Visual tokens summed over the layers, the paper's "#Tokens".

    Example: ``2/8`` in 32 layers with 576 tokens: 3312 of 18432.
    """
    return sum(visual_by_layer(stage, layers, visual))


def decoder_flops(
    shape: LanguageShape, stage: Stage, prompt: Prompt, attention: float = 1.0
) -> float:
    """Operations of a forward pass of one row; one with the backward pass takes three times that.

    Counted are products of matrices, a multiply-add as two operations.

    Args:
        shape: of the language model.
        stage: where its visual tokens become fewer.
        prompt: of the row.
        attention: which part of the square of positions is counted for attention: 1 all of it,
            0.5 what a causal mask leaves, 0 none, as the paper counts.
    """
    weights = shape.body_weights / shape.layers
    inner = shape.heads * shape.head_width
    total = 2.0 * shape.vocabulary * shape.width * prompt.logits
    for visual in visual_by_layer(stage, shape.layers, prompt.visual):
        length = visual + prompt.text
        total += 2 * weights * length + 4 * attention * inner * length**2
    return total


def average(schedule: Schedule, of_stage: Callable[[Stage], float]) -> float:
    """A figure of each stage, averaged over a run."""
    pairs = zip(schedule.shares, schedule.stages, strict=True)
    return float(sum(share * of_stage(stage) for share, stage in pairs))


def scheme_of(text: str, layers: int) -> Schedule:
    """A schedule with shares: a registered name, scaled to the depth, or a text as it stands.

    Stages that do nothing in so many layers are `OFF`.

    Raises:
        UserError: neither, or stages whose share of a run is not known.
    """
    schedule = resolve_schedule(text, layers)
    if schedule.by_forwards:
        raise UserError(
            f"scheme '{text}' counts forward passes, which are no shares of a run: write shares, "
            'such as "2/8:0.5 off:0.5"'
        )
    idle = [stage.stride == 1 or stage.layer >= layers for stage in schedule.stages]
    stages = (OFF if off else stage for off, stage in zip(idle, schedule.stages, strict=True))
    return dataclasses.replace(schedule, stages=tuple(stages))


def published_rows() -> dict[str, list[dict[str, Any]]]:
    """The paper's tables by its definition, with what it prints: 7B, 32 layers, 576 tokens."""
    text_config = preset_model(f"llava15-{next(iter(LANGUAGE_MODELS))}").text_config
    shape, prompt = language_shape(text_config), Prompt(PUBLISHED_VISUAL, PUBLISHED_TEXT)
    assert shape.layers == PUBLISHED_LAYERS

    def row(name: str, printed: Printed | None) -> dict[str, Any]:
        schedule = parse_schedule(name)
        tokens = average(schedule, lambda s: token_layers(s, shape.layers, prompt.visual))
        last = schedule.stages[-1]
        return {
            "name": name,
            "stages": [stage.label for stage in schedule.stages],
            "tokens": tokens,
            "ratio": token_layers(OFF, shape.layers, prompt.visual) / tokens,
            "tera_linear": average(schedule, lambda s: decoder_flops(shape, s, prompt, 0)) / 1e12,
            "tera": average(schedule, lambda s: decoder_flops(shape, s, prompt)) / 1e12,
            "last_tera_linear": decoder_flops(shape, last, prompt, 0) / 1e12,
            "printed_tokens": printed and printed.tokens,
            "printed_percent": printed and printed.percent,
            "printed_last_tera": printed and printed.tera,
            "source": printed and printed.source,
        }

    return {
        "stages": [row(name, printed) for name, printed in PRINTED_STAGES.items()],
        "schedules": [row(name, PRINTED_SCHEDULES.get(name)) for name in _schedule_names()],
    }


def _schedule_names() -> list[str]:
    """Registered names in the order of the paper, others behind."""
    others = [name for name in SCHEDULES.names() if name not in PRINTED_SCHEDULES]
    return [*PRINTED_SCHEDULES, *others]


def print_published(console: Console, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Prints both tables."""
    base = rows["stages"][0]["tera"]
    heads = ("#Tokens", "CR", "printed", "TFLOPs, linear layers", "printed", "all", "of off")
    table = [
        (
            row["name"],
            f"{row['tokens']:.0f}",
            percent(row["ratio"]),
            printed_ratio(row),
            f"{row['last_tera_linear']:.2f}",
            shown(row["printed_last_tera"], ".2f"),
            f"{row['tera']:.2f}",
            f"{row['tera'] / base:.3f}",
        )
        for row in rows["stages"]
    ]
    title = (
        f"7B, {PUBLISHED_LAYERS} layers, {PUBLISHED_VISUAL} visual and {PUBLISHED_TEXT} text tokens"
    )
    print_table(console, title, ("K/s", *heads), table)
    heads = ("#Tokens", "CR", "printed", "TFLOPs, all", "of off", "last, linear", "printed")
    table = [
        (
            f"{row['name']}: {' '.join(row['stages'])}",
            f"{row['tokens']:.0f}",
            percent(row["ratio"]),
            printed_ratio(row),
            f"{row['tera']:.2f}",
            f"{row['tera'] / base:.3f}",
            f"{row['last_tera_linear']:.2f}",
            shown(row["printed_last_tera"], ".2f"),
        )
        for row in rows["schedules"]
    ]
    print_table(console, "averages over a training run", ("schedule", *heads), table)
    console.print(PUBLISHED_NOTES)


def percent(ratio: float) -> str:
    """``"557 %"`` for 5.565."""
    return f"{100 * ratio:.0f} %"


def printed_ratio(row: dict[str, Any]) -> str:
    """``"10062, 183 %"``: what the paper prints of tokens and ratio."""
    if row["printed_percent"] is None:
        return "-"
    tokens = row["printed_tokens"]
    return f"{'' if tokens is None else f'{tokens}, '}{row['printed_percent']} %"


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash."""
    return "-" if value is None else format(value, form)
