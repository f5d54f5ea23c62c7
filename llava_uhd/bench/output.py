"""How the measurements are shown and stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llava_uhd.errors import UserError


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(width=110, highlight=False, markup=False)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def seconds(value: float) -> str:
    """Time with three digits: ``"12.3 ms"``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def mebibytes(value: int) -> str:
    """Memory: ``"12.3 MiB"``."""
    return f"{value / 2**20:.1f} MiB"


def write_json(path: str, values: Any) -> None:
    """Writes figures to a file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error
