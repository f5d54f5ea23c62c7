"""The measured time of compression schemes over their counted operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.bench.compress_passes import WHOLE
from llava_uhd.errors import UserError

# Points nearer than this share a label.
NEAR = 0.03


def label_groups(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[list[str], tuple[float, float]]]:
    """Names of schemes whose points lie together, with the place of the first of them."""
    groups: list[tuple[list[str], tuple[float, float]]] = []
    for row in rows:
        x, y = float(row["flop_ratio"]), float(row[WHOLE]["time_ratio_best"])
        for names, (left, low) in groups:
            if abs(x - left) < NEAR and abs(y - low) < NEAR:
                names.append(row["scheme"])
                break
        else:
            groups.append(([row["scheme"]], (x, y)))
    return groups


def draw_times(rows: Sequence[Mapping[str, Any]], bound: float, target: Path) -> None:
    """Draws time against FLOPs, both of the uncompressed pass.

    Args:
        rows: of ``compress.results``.
        bound: part of the saved operations that time is wanted to realise.
        target: PNG file to write.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 1, 1)
    least = min(min(row["flop_ratio"], row[WHOLE]["time_ratio_best"]) for row in rows)
    corner = max(math.floor(10 * least - 0.5) / 10, 0)
    ends = (corner, 1.0)
    wanted = [1 - bound * (1 - x) for x in ends]
    axes.fill_between(ends, wanted, color="#1f4e8c", alpha=0.06, linewidth=0)
    axes.plot(ends, wanted, color="#c23b22", linewidth=1.2, label=f"{bound:.0%} realised")
    axes.plot(ends, ends, color="#777777", linewidth=1, linestyle="--", label="all realised")
    flops = [row["flop_ratio"] for row in rows]
    for kind, style in (
        ("median", {"facecolors": "none", "edgecolors": "#1f4e8c", "linewidths": 0.9}),
        ("best", {"color": "#1f4e8c"}),
    ):
        times = [row[WHOLE][f"time_ratio_{kind}"] for row in rows]
        axes.scatter(flops, times, s=26, zorder=3, label=f"{kind} of the turns", **style)
    for names, place in label_groups(rows):
        axes.annotate(
            ", ".join(names),
            place,
            xytext=(8, -5),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )
    axes.scatter([1], [1], s=26, marker="s", color="#333333", zorder=3)
    axes.annotate("off", (1, 1), xytext=(-8, 4), textcoords="offset points", ha="right", fontsize=9)
    axes.set(
        title="forward and backward",
        xlabel="FLOPs, of the uncompressed pass",
        ylabel="time, of the uncompressed pass",
        xlim=(corner, 1.05),
        ylim=(corner, 1.05),
        aspect="equal",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {target}: {error.strerror}") from error
