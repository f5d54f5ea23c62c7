"""Published flags of LLaVolta: visual context compression and its stages over a run.

Five of them together say one thing, so each of them reads them all.
"""

from __future__ import annotations

import re
from typing import Any

from llava_uhd.config.flags import Context, Inert, inert, translates, true_or_false
from llava_uhd.errors import UserError

# What the published program takes without the flag.
PUBLISHED_PIVOT = 2600
NUMBERS = re.compile(r"-?[0-9]+(?:,-?[0-9]+)*")

_SETTINGS = {"layers", "strides", "pivots", "progressive"}
_ABSTRACTOR = "it belongs to projectors that the published code never builds"

inert(
    {
        "pretrain_abstractor": _ABSTRACTOR,
        "tune_abstractor": "the published code only renames a file with it; what learns stands in "
        "stage.learn",
        "abstractor_kernel_size": _ABSTRACTOR,
        "abstractor_rel_pos_spatial": _ABSTRACTOR,
        "num_pre_layers": _ABSTRACTOR,
        "num_post_layers": _ABSTRACTOR,
        "halfpool": "the published code never reads it",
        "unified_vpe": "the published code never reads it",
        "citer": "the published code never reads it",
    }
)


@translates("grouping")
def _grouping(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value not in (None, "none"):
        return _compression(context)
    return {"compression": None} if _compresses(context) else Inert("nothing is compressed")


@translates(*sorted(_SETTINGS))
def _setting(value: Any, context: Context) -> dict[str, Any] | Inert:
    if context.flags.get("grouping") in (None, "none"):
        return Inert("it only matters with --grouping avgpool1d")
    return _compression(context)


def _compression(context: Context) -> dict[str, Any]:
    """The section ``compression`` of a published command.

    Lists of different lengths end with the shorter one, as in the published program.

    Raises:
        UserError: another compressor, no layers and strides, or a value that is no list of numbers.
    """
    grouping = context.flags["grouping"]
    if grouping != "avgpool1d":
        raise UserError(
            f"--grouping {grouping}: of the published ones there are none and avgpool1d; others "
            "stand under compression.method"
        )
    keys: dict[str, Any] = {
        "compression.method": "avgpool1d",
        "compression.remainder": "drop",
        "compression.positions": "half",
    }
    if not _SETTINGS & set(context.flags) and _compresses(context):
        return keys
    if not {"layers", "strides"} <= set(context.flags):
        raise UserError(
            "--grouping avgpool1d needs --layers and --strides, for instance --layers 2 "
            "--strides 8: without them the published program compresses nothing"
        )
    layers, strides = _numbers("layers", context), _numbers("strides", context)
    if not true_or_false("progressive", context.flags.get("progressive", False)):
        return keys | {"compression.layer": layers[0], "compression.stride": strides[0]}
    words = [f"{layer}/{stride}" for layer, stride in zip(layers, strides, strict=False)]
    for index, pivot in enumerate(_numbers("pivots", context)[: len(words)]):
        words[index] += f"@{pivot}"
    return keys | {"compression.schedule": " ".join(words)}


def _compresses(context: Context) -> bool:
    """Whether the recipe compresses."""
    recipe = context.recipe
    method, schedule = recipe.get("compression.method"), recipe.get("compression.schedule")
    return method not in (None, "none") or schedule is not None


def _numbers(name: str, context: Context) -> list[int]:
    """Whole numbers with commas between them; a single one may come as a number.

    Raises:
        UserError: anything else.
    """
    value = context.flags.get(name, PUBLISHED_PIVOT)
    text = "".join(str(value).split())
    if not NUMBERS.fullmatch(text):
        raise UserError(
            f"--{name} must be whole numbers with commas between them (2,2,16,0), got {value!r}"
        )
    return [int(number) for number in text.split(",")]
