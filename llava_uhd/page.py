"""What HTML reports share: pages from templates, in which all is escaped, and parts of charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

COLOURS = (
    *("#1f4e8c", "#c46a1b", "#2f7d4f", "#8a3d8f", "#b23a48", "#3b8ea5"),
    *("#7a6a2c", "#5b6675", "#d18fb0"),
)


def render(template: str, **values: Any) -> str:
    """A page; texts are escaped, except what a template calls safe.

    Args:
        template: file under ``llava_uhd/assets``.
        **values: that it names.
    """
    environment = Environment(
        loader=PackageLoader("llava_uhd", "assets"), autoescape=select_autoescape()
    )
    return environment.get_template(template).render(**values)


def short(value: float) -> str:
    """A number of few characters.

    Example: 0.00002 is ``"2e-05"``, 12000 is ``"12k"``, 0.25 is ``"0.25"``.
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values between two bounds.

    Example: ``ticks(0, 10)`` is ``[0, 2, 4, 6, 8, 10]``.
    """
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Coloured words below a chart."""
    words = (
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in names
        if name
    )
    return f'<div class="legend">{"".join(words)}</div>'
