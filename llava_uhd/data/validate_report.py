"""What the validator found, as files: report.json, report.html and the pictures in it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from llava_uhd.data.validate import WORST, Report
from llava_uhd.data.validate_walk import KINDS
from llava_uhd.errors import UserError, make_folder

JSON_FILE = "report.json"
HTML_FILE = "report.html"
PICTURE_FILE = "lengths.png"
# The page shows so many problems of a kind; report.json has all of them.
SHOWN = 50
BINS = 48

TEXT, VISUAL, LIMIT = "#1f4e8c", "#c46a1b", "#b3261e"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem; color: #1b1b1f; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #dcdce2; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; } img { max-width: 100%; }
.good { color: #1a6b35; } .bad { color: #b3261e; }
@media (prefers-color-scheme: dark) {
  body { color: #e4e4ea; background: #17171b; } th, td { border-color: #3a3a42; }
  img { background: #fff; } .good { color: #7fd19b; } .bad { color: #f2a19a; }
}
"""


def write_report(report: Report, folder: Path, title: str) -> None:
    """Writes all files.

    Args:
        report: what was found.
        folder: made where it does not exist.
        title: what was looked at.

    Raises:
        UserError: the folder cannot be written.
    """
    make_folder(folder, "report folder")
    try:
        values = {"data": title, **report.to_dict()}
        text = json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8", "replace")
        (folder / JSON_FILE).write_bytes(text + b"\n")
        drawn = draw(report, folder / PICTURE_FILE)
        page = _page(report, title, folder / PICTURE_FILE if drawn else None)
        (folder / HTML_FILE).write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"report folder {folder} cannot be written: {error}") from error


def draw(report: Report, target: Path) -> bool:
    """Draws how long the samples and how large the images are.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [bool(len(report.lengths)), bool(len(report.sizes))]
    if not any(panels):
        return False
    figure = Figure(figsize=(6.2 * sum(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    number = 0
    if panels[0]:
        number += 1
        _draw_lengths(figure.add_subplot(1, sum(panels), number), report)
    if panels[1]:
        number += 1
        _draw_sizes(figure.add_subplot(1, sum(panels), number), report.sizes)
    figure.savefig(target, dpi=110)
    return True


def _draw_lengths(axes: Any, report: Report) -> None:
    """Samples by their length, on a logarithmic scale; the cut is a line."""
    tokens, visual = report.lengths[:, 0], report.lengths[:, 1]
    unit = report.tokens.get("unit", "tokens")
    low, high = max(int(tokens.min()), 1), max(int(tokens.max()), 2)
    if report.max_length is not None:
        low, high = min(low, report.max_length), max(high, report.max_length)
    edges = np.geomspace(low * 0.9, high * 1.1, BINS + 1)
    axes.hist(tokens, edges, color=TEXT, alpha=0.85, label=f"all {unit}")
    if visual.any():
        shown = visual[visual > 0]
        axes.hist(
            np.clip(shown, edges[0], None), edges, histtype="step", color=VISUAL, linewidth=1.8,
            label="visual tokens",
        )  # fmt: skip
    if report.max_length is not None:
        over = len(report.overlong)
        label = f"data.max_length {report.max_length:,} ({over:,} above)"
        axes.axvline(report.max_length, color=LIMIT, linestyle="--", linewidth=1.4, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set(title=f"{len(tokens):,} samples", xlabel=f"{unit} of a sample", ylabel="samples")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _draw_sizes(axes: Any, sizes: np.ndarray) -> None:
    """Images as points, by width and height."""
    axes.scatter(sizes[:, 0], sizes[:, 1], s=9, alpha=0.35, color=TEXT, linewidths=0)
    low, high = max(int(sizes.min()), 1), int(sizes.max())
    axes.plot([low, high], [low, high], color="#9a9aa4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_minor_formatter(lambda value, _: "")
    axes.set(title=f"{len(sizes):,} images", xlabel="width in pixels", ylabel="height in pixels")
    axes.grid(alpha=0.3, which="both")


def _page(report: Report, title: str, picture: Path | None) -> str:
    verdict = (
        '<p class="bad">Training on these data would stop.</p>'
        if report.stops
        else '<p class="good">Nothing here would stop training.</p>'
    )
    counts = {k: v for k, v in report.counts.items() if k != "problems"}
    parts = [f"<h1>Data of {escape(title)}</h1>", verdict]
    parts.append(_table(("", "number"), [(k.replace("_", " "), v) for k, v in counts.items()]))
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        alt = "Histogram of the lengths of the samples, and widths and heights of the images"
        parts.append(f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p>')
    parts += _problems(report)
    parts += _overlong(report)
    if report.sources:
        parts.append("<h2>Sources</h2>")
        heads = tuple(name.replace("_", " ") for name in report.sources[0])
        parts.append(_table(heads, [tuple(each.values()) for each in report.sources]))
    for heading, values in (("Images", report.images), ("Lengths", report.tokens)):
        spreads = {k: v for k, v in values.items() if isinstance(v, dict)}
        if spreads:
            parts.append(f"<h2>{heading}</h2>")
            heads = ("", *next(iter(spreads.values())))
            rows = [(k.replace("_", " "), *v.values()) for k, v in spreads.items()]
            parts.append(_table(heads, rows))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Data of {escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _problems(report: Report) -> Iterable[str]:
    if not report.problems:
        return
    yield "<h2>Problems</h2>"
    for kind, (title, advice) in KINDS.items():
        own = [problem for problem in report.problems if problem.kind == kind]
        if not own:
            continue
        yield f"<h3>{escape(title)}: {len(own):,}</h3><p>{escape(advice)}</p>"
        rows = [(each.file, each.record, each.id, each.what, each.outcome) for each in own[:SHOWN]]
        yield _table(("file", "record", "id", "what", "training"), rows)
        if len(own) > SHOWN:
            yield f"<p>... and {len(own) - SHOWN:,} more, see {JSON_FILE}</p>"


def _overlong(report: Report) -> Iterable[str]:
    if not report.overlong:
        return
    yield f"<h2>Longer than data.max_length: {len(report.overlong):,}</h2>"
    rows = [tuple(entry.values()) for entry in report.overlong[:WORST]]
    yield _table(("file", "record", "id", "tokens", "visual", "training"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [
        all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(heads))
    ]
    classes = [' class="number"' if each else "" for each in numeric]
    head = "".join(f"<th{c}>{escape(h)}</th>" for h, c in zip(heads, classes, strict=True))
    lines = []
    for row in rows:
        cells = (f"<td{c}>{_cell(v)}</td>" for v, c in zip(row, classes, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
