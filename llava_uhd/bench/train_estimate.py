"""Expected hours of training by arithmetic alone: from operations, a device's peak, assumed MFU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_uhd.bench.output import print_table
from llava_uhd.bench.train_data import CAPTIONS, INSTRUCTIONS, Mix, draw, facts_of_sample
from llava_uhd.checkpoint.shapes import describe_recipe
from llava_uhd.config.compression import Stage, resolve_schedule
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.train.compression import RunLength, spans
from llava_uhd.train.flops import PEAKS, PartFlops, TrainingFlops

# Samples of the published data, by the file that recipes name. (OneVision's: as its paper rounds.)
KNOWN_SAMPLES = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "llava-uhd-v2-sft-data.json": 858_000,
    "mid_stage.yaml": 4_000_000,
}
# Devices of the table.
DEVICES = ("A100", "H100", "H200")
DRAWN = 2000

DEFAULT_RECIPES = (
    *("llava_1_5/pretrain_vicuna7b", "llava_1_5/finetune_vicuna7b"),
    *("uhd_v1/pretrain_vicuna7b", "uhd_v1/finetune_vicuna7b"),
    *("uhd_v2/pretrain_vicuna7b", "uhd_v2/finetune_vicuna7b"),
)

NOTES = """\
Estimates, not measurements. FLOPs are those of the drawn samples (see "lengths"), with a part that
learns at three forward passes, a frozen one that passes gradients on at two, one at rest at one,
causal attention, logits at learned positions, no padding and nothing computed twice. Hours are
these FLOPs over (devices x dense bf16 peak x MFU): what gradient checkpointing, padding, waiting
and communication cost is in the MFU. Published LLaVA-1.5 runs come to an MFU of 20 to 37 %. H100
and H200 have the same peak."""


@dataclass(frozen=True)
class Estimate:
    """A recipe by arithmetic.

    Attributes:
        recipe: its name.
        samples: of the stage, or None where their number is not known.
        tokens: mean of a sample.
        visual: mean visual tokens of a sample.
        flops: mean operations of a sample, by parts.
    """

    recipe: str
    samples: int | None
    tokens: float
    visual: float
    flops: PartFlops

    def hours(self, devices: int, peak: float, mfu: float) -> float | None:
        """Expected hours.

        Example: 1e6 samples of 1e13 operations on 8 devices of 312e12 at 40 %: 2.78 h.

        Args:
            devices: that share the work.
            peak: of each, in operations per second.
            mfu: part of it that is reached.
        """
        if self.samples is None:
            return None
        return self.samples * self.flops.total / (devices * peak * mfu) / 3600


def mix_of(recipe: Recipe) -> Mix:
    """Captions for a first stage, instructions for the others."""
    return CAPTIONS if recipe.model.template == "plain" else INSTRUCTIONS


def samples_of(recipe: Recipe, given: int | None) -> int | None:
    """Number of samples of a stage, all epochs; None where it is not known."""
    epochs = float(recipe.trainer.arguments.get("num_train_epochs") or 1)
    if given is not None:
        return round(given * epochs)
    counts = [KNOWN_SAMPLES.get(Path(path).name) for path in recipe.data.paths]
    if not counts or None in counts:
        return None
    return round(sum(count for count in counts if count is not None) * epochs)


def estimate(recipe: Recipe, given: int | None = None, seed: int = 0) -> Estimate:
    """Counts the operations of drawn samples.

    Args:
        recipe: of the stage.
        given: samples of its data; None: as published, where that is known.
        seed: of the draws.

    Raises:
        UserError: a part whose shape or cost is not known.
    """
    config, mix = describe_recipe(recipe), mix_of(recipe)
    count = TrainingFlops(config, recipe.stage.learn, recipe.lora.enabled)
    samples = samples_of(recipe, given)
    weights = stage_weights(recipe, config, samples)
    total, tokens, visual = PartFlops(), 0, 0
    for sample in draw(mix, DRAWN, seed):
        facts = facts_of_sample(
            config, sample, mix, recipe.data.overview_only, recipe.data.max_length
        )
        tokens, visual = tokens + facts.tokens, visual + facts.visual
        for stage, weight in weights:
            found = count(facts, recipe.compression.of_stage(stage))
            total += PartFlops(*(weight * value for value in dataclasses.astuple(found)))
    mean = PartFlops(*(value / DRAWN for value in dataclasses.astuple(total)))
    return Estimate(recipe.name, samples, tokens / DRAWN, visual / DRAWN, mean)


def stage_weights(
    recipe: Recipe, config: LlavaUHDConfig, samples: int | None
) -> list[tuple[Stage, float]]:
    """Stages of compression with the share of the run that each has."""
    compression = recipe.compression
    if compression.schedule is None:
        return [(Stage(compression.layer, compression.stride), 1.0)]
    schedule = resolve_schedule(compression.schedule, config.text_config.num_hidden_layers)
    batch = recipe.trainer.global_batch_size or 128
    steps = max((samples or 100 * batch) // batch, 1)
    passes = int(recipe.trainer.arguments.get("gradient_accumulation_steps") or 1)
    length = RunLength(steps, steps * passes, passes)
    found = spans(schedule, length)
    whole = sum(max(span.stop - span.first, 0) for span in found)
    return [(span.stage, max(span.stop - span.first, 0) / whole) for span in found]


def print_estimates(
    console: Console,
    recipes: Sequence[Recipe],
    devices: int,
    mfus: Sequence[float],
    given: int | None,
) -> list[dict[str, Any]]:
    """Prints the table of expected hours and returns its figures.

    Raises:
        UserError: see `estimate`.
    """
    columns = ["recipe", "samples", "tokens", "visual", "TFLOP", "tower", "projector"]
    columns += [f"{devices}x{name} {mfu:.0%}" for name in DEVICES for mfu in mfus]
    mixes: dict[str, None] = {}
    rows, figures = [], []
    for recipe in recipes:
        found, mix = estimate(recipe, given), mix_of(recipe)
        mixes[mix.described] = None
        hours = {
            f"{name} {mfu:g}": found.hours(devices, PEAKS[name], mfu)
            for name in DEVICES
            for mfu in mfus
        }
        flops = found.flops
        rows.append(
            [
                found.recipe,
                "?" if found.samples is None else f"{found.samples:,}",
                f"{found.tokens:.0f}",
                f"{found.visual:.0f}",
                f"{flops.total / 1e12:.1f}",
                f"{flops.tower / flops.total:.1%}",
                f"{flops.projector / flops.total:.1%}",
                *("?" if value is None else f"{value:.1f} h" for value in hours.values()),
            ]
        )
        figures.append({**dataclasses.asdict(found), "mix": mix.described, "hours": hours})
    title = "expected hours of a stage (estimates); tokens, visual tokens and TFLOP of a sample"
    print_table(console, title, columns, rows)
    for described in mixes:
        console.print(f"lengths (an assumption): {described}")
    console.print(NOTES)
    return figures


def parse_mfus(text: str) -> list[float]:
    """``"0.25,0.4"`` to numbers.

    Raises:
        UserError: one that is no share.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [0.0]
    if any(not 0 < value <= 1 for value in found):
        raise UserError(f"--mfu must be shares of the peak above 0 and at most 1, got {text}")
    return found
