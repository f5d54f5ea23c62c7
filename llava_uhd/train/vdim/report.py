"""The table of a finished VDIM pre-training, for the terminal and as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from llava_uhd.config.vdim import VdimRecipe

REPORT_FILE = "measure.md"

COLUMNS = {
    "loss": "reconstruction loss",
    "error": "reconstruction error",
    "shifted_error": "shifted: error",
    "shifted_cosine": "shifted: cosine",
    "enlarged_error": "enlarged: error",
    "enlarged_cosine": "enlarged: cosine",
}
# The terminal's table is narrow, and the Markdown file explains the rest.
SHORT = {
    "loss": "loss",
    "error": "error",
    "shifted_error": "shifted",
    "enlarged_error": "enlarged",
}

EXPLANATION = """\
- *reconstruction loss*: the training's own loss per view (evaluation mode, held-out pictures, views
  and projections; the same for every row). {control}
- *reconstruction error*: squared error of all channels of the same guess over the variance of its
  target; 1 is what a constant guess would get.
- *shifted*: the largest map against the tower's features of {count} pictures shifted by parts of a
  patch, error as above and cosine after the mean is taken off. No downsampler is involved.
- *enlarged*: the map at twice the tower's resolution against its features of the four quarters of
  the picture, each enlarged to the full size.

Lower errors and losses and higher cosines are better.
"""


def measure_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What `measure` found, as a table for the terminal."""
    table = Table(title=f"held-out pictures (explained in {REPORT_FILE})", title_justify="left")
    for heading in ("pictures", "maps", *SHORT.values()):
        left = heading in ("pictures", "maps")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    last = None
    for row in rows:
        group = f"{row['pictures']} {row['group']}"
        cells = [f"{row[name]:.3f}" for name in SHORT]
        table.add_row("" if group == last else group, row["candidate"], *cells)
        last = group
    return table


def write_report(
    recipe: VdimRecipe, rows: Sequence[dict[str, Any]], step: int, folder: Path
) -> None:
    """Writes the table with its explanation as Markdown."""
    head = ["pictures", "maps", *COLUMNS.values()]
    lines = [f"# {recipe.name}: {recipe.vdim.scale}x upsampler after {step} steps", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['pictures']} {row['group']}", row["candidate"]]
        cells += [f"{row[name]:.4f}" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    largest = f"{recipe.vdim.scale}x"
    control = (
        "Bilinear and bicubic enlargement of the plain features has a downsampler\n"
        "  and an uncertainty net of its own, which learned from bilinear maps in the same steps\n"
        f"  from the same views; the last row gives it those of the learned {largest} map."
        if recipe.vdim.control
        else f"Plain enlargement borrows the downsampler and uncertainty net of the {largest} map."
    )
    text = EXPLANATION.format(control=control, count=recipe.vdim.scale**2)
    (folder / REPORT_FILE).write_text("\n".join([*lines, "", text]), encoding="utf-8")
