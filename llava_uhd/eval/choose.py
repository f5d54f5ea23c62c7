"""Which tasks a run asks: the named ones, or all whose data are here."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from llava_uhd.errors import UserError
from llava_uhd.eval.task import DATA_ROOT, Task
from llava_uhd.eval.tasks import TASKS, find_task

_FEW = 3  # so many messages are printed whole


def choose_tasks(names: str | None, data_root: Path | None, console: Console) -> list[Task]:
    """Tasks by name, or all whose data are present (the others are reported).

    Raises:
        UserError: unknown task, or its data are missing, or none has data.
    """
    if names is not None:
        return _named(names, data_root)
    messages = {
        name: TASKS.get(name).missing(TASKS.get(name).root(data_root)) for name in TASKS.names()
    }
    absent = {name: message for name, message in messages.items() if message}
    present, notes = [], []
    for name in [name for name, message in messages.items() if message is None]:
        whole = TASKS.get(name).part_of
        if whole is not None and messages[whole] is None:
            notes.append(f"left out: {name} asks what {whole} asks: --tasks can name it")
        else:
            present.append(TASKS.get(name))
    if not present:
        raise UserError(
            f"no task has its data under {data_root or DATA_ROOT}: {_where(data_root)}; to begin "
            f"with, the embedded one: {messages['synthetic']}"
        )
    if len(absent) <= _FEW:
        notes = [f"left out: {message}" for message in absent.values()] + notes
    else:
        notes.insert(
            0,
            f"{len(absent)} of {len(messages)} tasks are left out, their data are missing "
            f"({', '.join(absent)}): {_where(data_root)}",
        )
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return present


def _named(names: str, data_root: Path | None) -> list[Task]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UserError(f"--tasks '{names}' names no task (known: {', '.join(TASKS.names())})")
    tasks = list(dict.fromkeys(find_task(name) for name in chosen))
    for task in tasks:
        task.provide(task.root(data_root))
    missing = [task.missing(task.root(data_root)) for task in tasks]
    if any(missing):
        raise UserError("; ".join(filter(None, missing)))
    return tasks


def _where(data_root: Path | None) -> str:
    """The command that names every file, and where to get it."""
    given = "" if data_root is None else f" --data-root {data_root}"
    return f"see 'python -m llava_uhd.eval check-data{given}' for the files and their sources"
