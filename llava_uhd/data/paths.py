"""What a written path stands for: braces, wildcards and folders of shards or tables."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from llava_uhd.data.parquet import PARQUET
from llava_uhd.data.shard_files import SHARD

BRACES = re.compile(r"(.*?)\{([^{}]*)\}(.*)", re.DOTALL)
RANGE = re.compile(r"(\d+)\.\.(\d+)")
WILDCARDS = re.compile(r"[*?\[]")
# The most files that a range of numbers may stand for.
MAX_RANGE = 1_000_000


def expand_braces(path: str) -> list[str]:
    """The files that ``prefix{a,b}suffix`` names, in order; other paths stand for themselves.

    Example: ``expand_braces("d/{a,b}.json")`` is ``["d/a.json", "d/b.json"]``,
    ``expand_braces("s-{08..10}.tar")`` is ``["s-08.tar", "s-09.tar", "s-10.tar"]``.
    """
    match = BRACES.fullmatch(path)
    if match is None or Path(path).exists():
        return [path]
    head, names, tail = match.groups()
    return [each for name in _words(names) for each in expand_braces(f"{head}{name.strip()}{tail}")]


def _words(names: str) -> list[str]:
    numbers = RANGE.fullmatch(names.strip())
    if numbers is None:
        return names.split(",")
    first, last = numbers.groups()
    if not 0 <= int(last) - int(first) < MAX_RANGE:
        return [names]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def expand_path(path: str) -> list[str]:
    """All files that a path stands for, in order; one that stands for none is left as it is.

    Braces as in `expand_braces`; ``*``, ``?`` and ``[...]`` match files; a folder stands for the
    shards and tables in it.
    """
    found = []
    for each in expand_braces(path):
        matched = [each]
        if WILDCARDS.search(each) and not Path(each).exists():
            matched = sorted(glob.glob(each)) or [each]
        for one in matched:
            found += _in_folder(Path(one)) or [one]
    return found


def _in_folder(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    kinds = (SHARD, PARQUET)
    return sorted(str(each) for each in folder.iterdir() if each.suffix.lower() in kinds)
