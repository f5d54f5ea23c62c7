"""Measuring a variant in a process of its own: its time, and all memory that the system gives it.

`timing` counts tensors; this counts everything, scratch memory inside kernels included, and one
variant's memory cannot serve another.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_uhd.bench.timing import Comparison, Measurement, Variant, run_seconds

# Makes a variant of a task: (task, form).
Maker = Callable[[Any, str], Variant]

CPU = torch.device("cpu")


def memory_bytes(field: str) -> int:
    """A line of ``/proc/self/status`` in bytes: ``VmRSS`` now, ``VmHWM`` the largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def trim_heap() -> None:
    """Gives freed memory back to the system, where the C library knows how."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def peak_process_bytes(run: Callable[[], Any]) -> int:
    """Memory that the process takes while ``run`` runs, beyond what it had before.

    Zero where the system does not tell (not Linux).
    """
    trim_heap()
    try:
        before = memory_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the largest is now the present
    except OSError:
        run()
        return 0
    run()
    return max(memory_bytes("VmHWM") - before, 0)


@dataclass(frozen=True)
class Alone:
    """One comparison.

    Attributes:
        title: what is computed.
        task: what to measure.
        small: the same at a small size, to warm up.
        forms: the first is the reference.
    """

    title: str
    task: Any
    small: Any
    forms: tuple[str, ...]


def _measure(
    make: Maker, jobs: Mapping[int, Alone], form: str, repeats: int, threads: int, folder: str
) -> list[tuple[list[float], int]]:
    """In the process: seconds of each run and peak memory, results go to the folder."""
    torch.set_num_threads(threads)
    found: list[tuple[list[float], int]] = []
    for index, job in jobs.items():
        make(job.small, form).run()  # loads what the libraries load on first use
        variant = make(job.task, form)
        peak = peak_process_bytes(variant.run)
        times = [run_seconds(variant, CPU) for _ in range(repeats)]
        result = variant.common(variant.run()).detach().float().numpy()
        np.save(_file(folder, index, form), result, allow_pickle=False)
        found.append((times, peak))
    return found


def _file(folder: str, index: int, form: str) -> Path:
    return Path(folder) / f"{index} {form}.npy"


def compare_alone(
    make: Maker, jobs: Sequence[Alone], *, repeats: int, threads: int
) -> list[Comparison]:
    """Measures forms of computations on a CPU, one new process for each form.

    Args:
        make: a function of a module (processes import it).
        jobs: what to compare.
        repeats: timed runs of each.
        threads: CPU threads of each.

    Returns:
        CPU times of the processes, and their memory beyond that of the inputs.
    """
    forms = list(dict.fromkeys(form for job in jobs for form in job.forms))
    rows: list[list[Measurement]] = [[] for _ in jobs]
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            mine = {index: job for index, job in enumerate(jobs) if form in job.forms}
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(_measure, make, mine, form, repeats, threads, folder).result()
            for index, (times, peak) in zip(mine, found, strict=True):
                errors = _errors(folder, index, jobs[index].forms[0], form)
                best, median = min(times), statistics.median(times)
                rows[index].append(Measurement(form, best, median, peak, *errors))
    return [Comparison(job.title, tuple(each)) for job, each in zip(jobs, rows, strict=True)]


def _errors(folder: str, index: int, first: str, form: str) -> tuple[float, float]:
    """Largest difference to the first form's result, absolute and relative to its largest value."""
    reference = np.load(_file(folder, index, first), allow_pickle=False)
    result = np.load(_file(folder, index, form), allow_pickle=False)
    error = float(np.abs(result - reference).max())
    return error, error / (float(np.abs(reference).max()) or 1.0)
