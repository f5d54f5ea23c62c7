"""Results folders as a run leaves them, made without a model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixtures_tiny import picture

from llava_uhd.eval.answers import SETTINGS_FILE, settings_hash, write_json
from llava_uhd.eval.metrics import mean_of_each, percent_of_each
from llava_uhd.eval.protocols import PROTOCOLS
from llava_uhd.eval.results import TaskResult, write_results, write_task
from llava_uhd.eval.statistics import intervals
from llava_uhd.eval.tasks import TASKS

HOSTILE = (
    "<script>alert('x')</script>\"'&amp;|`</textarea><img src=x onerror=alert(1)>\u2028</script>"
)
SETTINGS = {"protocol": "llava", "beams": 1, "max_new_tokens": 128, "task_version": 1}


def put_task(
    output: Path,
    name: str,
    rows: list[dict[str, Any]],
    *,
    of: int | None = None,
    percent: bool = True,
    **settings: Any,
) -> TaskResult:
    """Writes the folder of a task whose scores are means of its items."""
    task, known = TASKS.get(name), {**SETTINGS, "questions": "abc", **settings}
    mean = percent_of_each if percent else mean_of_each

    def aggregate(some: Any) -> dict[str, float]:
        return mean([row["metrics"] for row in some])

    values: dict[str, list[Any]] = {}
    for row in rows:
        for group in row.get("groups", {}).values():
            values.setdefault(group, []).append(row)
    metrics = [row["metrics"] for row in rows]
    result = TaskResult(
        task=name,
        title=task.title,
        metric=task.main_metric,
        scores=aggregate(rows),
        items=len(rows),
        of=of or len(rows),
        settings=known,
        breakdown={"category": {k: {**aggregate(v), "items": len(v)} for k, v in values.items()}},
        intervals=intervals(
            rows,
            metrics,
            [row.get("unit", row["id"]) for row in rows],
            aggregate(rows),
            task.main_metric,
            aggregate,
        ),
    )
    (output / name).mkdir(parents=True, exist_ok=True)
    write_task(output / name, result, rows)
    put_settings(output / name, known)
    return result


def put_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes what a run was made with."""
    write_json(folder / SETTINGS_FILE, {"hash": settings_hash(settings), "settings": settings})
    write_json(folder / "run.json", {"checkpoint": "tiny", "limit": None})


def put_problem(output: Path, name: str) -> None:
    """Writes a task that has no score."""
    task = TASKS.get(name)
    problem = f"1 of 2 items have no answer ({HOSTILE})"
    (output / name).mkdir(parents=True, exist_ok=True)
    write_task(
        output / name,
        TaskResult(name, task.title, task.main_metric, of=2, problem=problem, settings=SETTINGS),
    )
    put_settings(output / name, {**SETTINGS, "questions": "abc"})
    (output / name / "failures.jsonl").write_text('{"id": 7, "reason": "<b>cut off</b>"}\n')


def make_rows(name: str, count: int, share: float, seed: int, images: Path) -> list[dict]:
    """Items of which about that share is right; what is asked depends on the task alone."""
    source, metric = random.Random(seed), TASKS.get(name).main_metric
    images.mkdir(parents=True, exist_ok=True)
    for n in range(6):
        if not (images / f"{n}.jpg").is_file():
            picture(120 + 40 * n, 300 - 30 * n, seed=n).save(images / f"{n}.jpg")
    rows = []
    for n in range(count):
        right = float(source.random() < share)
        answer = "a red cup" if right else "two dogs"
        rows.append(
            {
                "id": n,
                "unit": n,
                "images": [str(images / f"{n % 6}.jpg")],
                "question": f"What stands on table {n}?",
                "prompt": f"USER: <image>\nWhat stands on table {n}? ASSISTANT:",
                "answer": answer,
                "parsed": answer,
                "reference": ["a red cup", "cup"],
                "metrics": {metric: right},
                "groups": {"category": ["kitchen", "street", "text", "count"][n % 4]},
                "prompt_tokens": 600 + n,
                "new_tokens": 4,
            }
        )
    return rows


def make_results(output: Path, shares: Mapping[str, float], count: int = 60, seed: int = 0) -> Path:
    """A whole results folder: task -> share of right answers."""
    for number, (name, share) in enumerate(shares.items()):
        rows = make_rows(name, count, share, seed + number, output.parent / "images")
        put_task(
            output, name, rows, max_new_tokens=PROTOCOLS.get("llava").measure(name).max_new_tokens
        )
    write_results(output, "tiny")
    return output
