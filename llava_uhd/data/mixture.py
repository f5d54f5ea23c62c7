"""Which records of which files are read: YAML mixtures.

::

    seed: 0
    datasets:
      - json_path: captions.json
      - json_path: charts/{bar,pie}.jsonl
        sampling_strategy: random:10%
        image_folder: charts/images

``docs/data.md`` has the rules in words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_uhd.config.typed import load_yaml
from llava_uhd.data.files import DATA_SOURCES, Bad, check_data_file
from llava_uhd.data.paths import expand_braces, expand_path
from llava_uhd.data.readers import count_rows, iterate_rows
from llava_uhd.errors import UserError
from llava_uhd.registry import nearest_hint

YAML = (".yaml", ".yml")
TOP_KEYS = ("datasets", "seed")
SOURCE_KEYS = (
    *("json_path", "sampling_strategy", "seed", "image_folder", "video_folder"),
    *("epochs", "weight"),
)

KINDS = ("all", "first", "end", "random")
AMOUNT = re.compile(r"(\d+)(%?)")


class Strategy(NamedTuple):
    """A parsed ``sampling_strategy``.

    Attributes:
        kind: one of `KINDS`.
        amount: records, or per cent of them; 0 with "all".
        percent: whether it is per cent.
    """

    kind: str
    amount: int = 0
    percent: bool = False

    def count(self, total: int) -> int:
        """Records drawn from ``total``; per cent are rounded up, as published.

        Example: 10 % of 41 are 5.

        Raises:
            UserError: more than there are.
        """
        if self.kind == "all":
            return total
        number = -(-self.amount * total // 100) if self.percent else self.amount
        if number > total:
            raise UserError(f"asks for {number} records, but the file has {total}")
        return number


@dataclass(frozen=True)
class Source:
    """One file of a mixture, or a file that the recipe names itself.

    Attributes:
        path: JSON list, JSON lines, shard or parquet table.
        strategy: what is drawn, as written.
        seed: of "random".
        image_folder: instead of the recipe's.
        video_folder: instead of the recipe's.
        where: entry of the mixture, for messages; empty without one.
        epochs: how often each drawn record is seen in an epoch of the run; a fraction of a time is
            drawn.
        weight: share of the samples of an epoch, relative to those of the other sources of its
            mixture; None: as many as there are.
    """

    path: Path
    strategy: str = "all"
    seed: int = 0
    image_folder: str | None = None
    video_folder: str | None = None
    where: str = ""
    epochs: float = 1
    weight: float | None = None

    def count_rows(self) -> int:
        """Records of the file.

        Raises:
            UserError: not JSON.
        """
        return count_rows(self.path)

    def draw(self, total: int) -> Sequence[int]:
        """Indices of the drawn records among ``total``, ascending.

        Raises:
            UserError: the strategy asks for more than there are.
        """
        strategy = parse_strategy(self.strategy)
        try:
            number = strategy.count(total)
        except UserError as error:
            raise UserError(f"{self.place}: sampling_strategy '{self.strategy}' {error}") from error
        if strategy.kind == "random":
            return draw_random(number, total, f"{self.seed} {self.path.name}")
        return range(total - number, total) if strategy.kind == "end" else range(number)

    def rows(self, total: int | None, bad: Bad | None = None) -> Iterator[tuple[int, Any]]:
        """Yields (index, decoded value) of the drawn records, holding one at a time.

        Args:
            total: records of the file; None takes every one, whatever the strategy.
            bad: takes what cannot be read, see `iterate_rows`.

        Raises:
            UserError: it cannot be read, or the strategy asks for more than there are.
        """
        if total is None:
            yield from iterate_rows(self.path, bad)
            return
        wanted = iter(self.draw(total))
        following = next(wanted, None)
        for index, row in iterate_rows(self.path, bad):
            while following is not None and following < index:
                following = next(wanted, None)  # it could not be read
            if following is None:
                return
            if index == following:
                yield index, row
                following = next(wanted, None)

    @property
    def place(self) -> str:
        """Entry and file, for messages."""
        return f"{self.where} ({self.path})" if self.where else str(self.path)


def draw_random(number: int, total: int, seed: str) -> list[int]:
    """``number`` different indices below ``total``, ascending.

    Every record gets a random number and the smallest are taken: a larger draw from the same file
    holds the smaller one. Only the generator's own stream is used, which is the same in every
    Python version; a text as seed is hashed, alike everywhere.
    """
    generator = random.Random(seed)
    keys = np.fromiter((generator.random() for _ in range(total)), np.float64, total)
    return sorted(np.argsort(keys, kind="stable")[:number].tolist())


def parse_strategy(text: str) -> Strategy:
    """Reads ``all``, ``first:N``, ``end:N`` or ``random:N``; N is a number or ``P%``.

    Raises:
        UserError: anything else.
    """
    kind, colon, amount = text.partition(":")
    if kind not in KINDS:
        hint = nearest_hint(kind, list(KINDS))
        raise UserError(
            f"sampling_strategy '{text}' is unknown{hint} (known: all, first:N, end:N, random:N, "
            "with N a number of records or a percentage like 10%)"
        )
    if kind == "all":
        if colon:
            raise UserError(f"sampling_strategy '{text}': all takes no number")
        return Strategy("all")
    match = AMOUNT.fullmatch(amount)
    if match is None or int(match[1]) < 1:
        raise UserError(
            f"sampling_strategy '{text}' must be {kind}:N, with N a whole number of at least 1 or "
            "a whole percentage like 10%"
        )
    return Strategy(kind, int(match[1]), bool(match[2]))


def find_sources(paths: Sequence[str], mistakes: list[UserError] | None = None) -> list[Source]:
    """The files behind ``data.path``, in order: data files, paths of several, YAML mixtures.

    Args:
        paths: as written.
        mistakes: takes what is wrong, instead of the first error being raised.

    Raises:
        UserError: a file that is not there, or a mixture that is not right.
    """
    sources = []
    for written in paths:
        for path in expand_path(written):
            with _noting(mistakes):
                if Path(path).suffix.lower() in YAML:
                    sources += read_mixture(Path(path), mistakes)
                else:
                    check_data_file(Path(path))
                    sources.append(Source(Path(path)))
    return sources


@contextmanager
def _noting(mistakes: list[UserError] | None) -> Iterator[None]:
    """Puts an error into a list, if there is one."""
    try:
        yield
    except UserError as error:
        if mistakes is None:
            raise
        mistakes.append(error)


def read_mixture(file: Path, mistakes: list[UserError] | None = None) -> list[Source]:
    """Sources of a YAML mixture.

    Args:
        file: of the mixture.
        mistakes: takes what is wrong with single entries, instead of the first being raised.

    Raises:
        UserError: file, entry and key that are wrong, and what is expected.
    """
    if not file.is_file():
        raise UserError(f"mixture {file} does not exist: data.path must name it")
    values = load_yaml(file)
    _check_keys(values, TOP_KEYS, f"{file}: ")
    entries = values.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: 'datasets' must be a list with at least one json_path")
    seed = _whole(values.get("seed"), 0, f"{file}: seed")
    sources: list[Source] = []
    for number, entry in enumerate(entries):
        with _noting(mistakes):
            sources += _read_entry(entry, file, f"{file}: datasets[{number}]", seed)
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        first = sources[weighted.index(False)].where
        raise UserError(f"{first}.weight is missing: either every source has one, or none")
    return sources


def _read_entry(entry: Any, file: Path, where: str, seed: int) -> list[Source]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping with json_path, got {entry!r:.80}")
    _check_keys(entry, SOURCE_KEYS, f"{where}.")
    for key in ("json_path", "sampling_strategy", "image_folder", "video_folder"):
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and value):
            raise UserError(f"{where}.{key} must be a text, got {value!r:.80}")
    written, strategy = entry.get("json_path"), entry.get("sampling_strategy") or "all"
    if written is None:
        raise UserError(f"{where}.json_path is missing: name a .json or .jsonl file")
    try:
        parse_strategy(strategy)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    own_seed = _whole(entry.get("seed"), seed, f"{where}.seed")
    images, videos = (
        None if entry.get(key) is None else str(_beside(entry[key], file))
        for key in ("image_folder", "video_folder")
    )
    epochs, weight = (_positive(entry.get(key), f"{where}.{key}") for key in ("epochs", "weight"))
    if epochs is not None and weight is not None:
        raise UserError(f"{where}: epochs and weight exclude each other: set one of them")
    sources = []
    for path, found in _files_of(written, file):
        if found.suffix.lower() in YAML:
            raise UserError(f"{where}.json_path {path}: a mixture cannot hold another one")
        if not found.is_file():
            raise UserError(_missing_source(path, file, where))
        sources.append(
            Source(found, strategy, own_seed, images, videos, where, epochs or 1, weight)
        )
    return sources


def _files_of(written: str, file: Path) -> list[tuple[str, Path]]:
    """(name, path) of each file that an entry stands for."""
    found = []
    for name in [written] if _beside(written, file).exists() else expand_braces(written):
        places = [
            [Path(path) for path in expand_path(str(base))] for base in (file.parent / name, name)
        ]
        paths = next((each for each in places if any(map(Path.exists, each))), places[0])
        found += [(name if len(paths) == 1 else str(path), path) for path in paths]
    return found


def _positive(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise UserError(f"{where} must be a number above 0, got {value!r:.80}")
    return float(value)


def _missing_source(path: str, file: Path, where: str) -> str:
    what = "is a folder, not a data file" if _beside(path, file).is_dir() else "does not exist"
    places = "" if Path(path).is_absolute() else f", neither in {file.parent} nor in {Path.cwd()}"
    published = DATA_SOURCES.get(Path(path).name)
    advice = f"it is {published}" if published else "name a .json or .jsonl file of samples"
    return f"{where}.json_path {path} {what}{places}: {advice}"


def _beside(path: str, file: Path) -> Path:
    """A path as a mixture writes it: relative to the mixture's folder, else to the working one."""
    beside = file.parent / path
    return Path(path) if not beside.exists() and Path(path).exists() else beside


def _check_keys(values: dict[Any, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            hint = nearest_hint(str(key), list(known))
            raise UserError(f"unknown key '{where}{key}'{hint} (known: {', '.join(known)})")


def _whole(value: Any, default: int, where: str) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where} must be a whole number, got {value!r:.80}")
    return value
