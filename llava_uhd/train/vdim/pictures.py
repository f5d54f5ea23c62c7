"""Curves of a VDIM pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curves(entries: Sequence[Mapping[str, Any]], target: Path) -> bool:
    """Draws the reconstruction loss of every scale over the steps.

    Args:
        entries: of the log.
        target: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llava_uhd.train.log import smooth

    names = sorted({name for entry in entries for name in entry if name.startswith("loss/rec_")})
    if not names:
        return False
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 1, 1)
    for name in names:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        scale = name.removeprefix("loss/rec_")
        label = "plain features (control)" if scale == "1x" else f"{scale} maps"
        axes.plot([p[0] for p in points], smooth([p[1] for p in points]), label=label)
    axes.set(xlabel="optimizer step", ylabel="reconstruction loss (smoothed)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=110)
    return True
