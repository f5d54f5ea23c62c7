"""Tables of questions with images inside, as VLMEvalKit reads them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from fixtures_tiny import picture


def encoded(seed: int) -> str:
    buffer = io.BytesIO()
    picture(12 + seed, 10, seed=seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a table as VLMEvalKit's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(names)]
    for row in rows:
        cells = [str(row.get(name, "")) for name in names]
        lines.append("\t".join(f'"{c}"' if "\n" in c else c for c in cells))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def small_choices(path: Path) -> Path:
    rows = [
        {"index": k, "question": "Which?", "A": "tea", "B": "cup", "answer": "AB"[k % 2],
         "category": "single", "cycle_category": str(k // 2), "image": encoded(k) if k < 2 else 1}
        for k in range(4)
    ]  # fmt: skip
    return table(path, rows)
