"""Records from data files: drawn, checked up front, repeated as their mixture asks.

Every mistake is collected with its file and index, so that one run shows them all, before any
training time is spent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llava_uhd.config.training import DataConfig
from llava_uhd.data.drawn import Drawn
from llava_uhd.data.files import Bad, ImageRoot, ImageStatus
from llava_uhd.data.mixture import Source, draw_random, find_sources
from llava_uhd.data.readers import JSON_BLOCK, Contained, Place
from llava_uhd.data.records import Records, Roots
from llava_uhd.data.rows import Row, RowError, parse_row
from llava_uhd.errors import UserError

logger = logging.getLogger(__name__)

# So many problems, and so many files, are shown; all are counted.
MAX_SHOWN = 20
MAX_FILES_SHOWN = 3

MISSING = "missing"


class Finding(NamedTuple):
    """Something wrong with a record.

    Attributes:
        kind: "missing" (a file), "path" (one that is refused), or of `RowError`.
        source: number of its source.
        place: of the record in its file.
        id: of the record.
        what: in words.
    """

    kind: str
    source: int
    place: int
    id: str
    what: str


Tell = Callable[[Finding], None]


@dataclass(frozen=True)
class Rules:
    """How records are checked.

    Attributes:
        image_first: see `llava_uhd.data.rows.place_marker`.
        check_files: look for every image and video.
    """

    image_first: bool | str = False
    check_files: bool = True


class _Problems:
    """Collects messages; shows the first `MAX_SHOWN`."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(message)

    def text(self, what: str) -> str:
        rest = self.count - len(self.shown)
        lines = [what, *self.shown, *([f"... and {rest} more"] if rest else [])]
        return "\n  ".join(lines)


def read_records(
    path: str | os.PathLike[str] | Sequence[str],
    image_folder: str | os.PathLike[str] | None,
    video_folder: str | os.PathLike[str] | None = None,
    *,
    image_first: bool | str = False,
    check_files: bool = True,
    follow_links: bool = False,
    missing: Literal["error", "skip"] = "error",
    wrong: Literal["error", "skip"] = "error",
    max_missing: float = 0.01,
) -> Records:
    """Reads and checks data files, or what a YAML mixture draws from them.

    Args:
        path: one file or several.
        image_folder: image paths are relative to it.
        video_folder: video paths are relative to it; None: `image_folder`.
        image_first: see `llava_uhd.data.rows.place_marker`.
        check_files: look for every image and video.
        follow_links: allow links inside the folders that lead out of them.
        missing: whether a missing image or video is an error, or its record is left out and
            counted.
        wrong: the same for a record that is not as it should be.
        max_missing: with "skip", the largest share of records that may be left out.

    Raises:
        UserError: a missing file, or all problems found (the first 20 shown, all counted).
    """
    paths = [os.fspath(path)] if isinstance(path, str | os.PathLike) else list(path)
    sources = find_sources(paths)
    folders = (image_folder, video_folder)
    records = Records(sources, open_roots(sources, folders, follow_links))
    problems, absent, skipped = _Problems(), _Problems(), _Problems()

    def tell(found: Finding) -> None:
        file = f"{records.sources[found.source].path}, " if len(records.sources) > 1 else ""
        stops = absent if found.kind == MISSING else problems
        rule = missing if found.kind == MISSING else wrong
        (skipped if rule == "skip" else stops).add(f"{file}record {found.place}: {found.what}")

    for number in range(len(sources)):
        read_source(records, number, Rules(image_first, check_files), tell)
    _settle(records, problems, absent, skipped, max_missing)
    return arranged(records)


def open_roots(
    sources: Sequence[Source],
    folders: tuple[str | os.PathLike[str] | None, str | os.PathLike[str] | None],
    follow_links: bool,
) -> list[Roots]:
    """The folders of each source; sources that share one share what was looked up in it.

    Args:
        sources: of the run.
        folders: of images and videos, for sources without their own.
        follow_links: see `ImageRoot`.

    Raises:
        UserError: a folder does not exist.
    """
    opened: dict[tuple[str, str], ImageRoot] = {}

    def open_root(
        folder: str | os.PathLike[str] | None, kind: Literal["image", "video"]
    ) -> ImageRoot | None:
        if folder is None:
            return None
        key = (os.fspath(folder), kind)
        if key not in opened:
            opened[key] = ImageRoot(Path(folder), follow_links, kind)
        return opened[key]

    roots = []
    for source in sources:
        images = source.image_folder or folders[0]
        videos = source.video_folder or folders[1]
        roots.append(Roots(open_root(images, "image"), open_root(videos or images, "video")))
    return roots


def read_source(
    records: Records, number: int, rules: Rules, tell: Tell, bad: Bad | None = None
) -> None:
    """Appends what a source draws.

    Args:
        records: that it is appended to.
        number: of the source.
        rules: of the check.
        tell: takes what is wrong with single records, which are left out.
        bad: takes what cannot be read at all, see `iterate_rows`.

    Raises:
        UserError: the file cannot be read, is empty, or has too few records.
    """
    source, roots = records.sources[number], records.roots_of[number]
    # Only a strategy that draws has to know how many there are.
    total = None if source.strategy == "all" else source.count_rows()
    digest = hashlib.sha256()
    drawn, kept = 0, len(records)
    for index, value in source.rows(total, bad) if total != 0 else ():
        drawn += 1
        name = name_of(value)
        digest.update(f"{index} {name}\n".encode("utf-8", "surrogatepass"))
        checked, findings = check_value(value, roots, rules)
        for kind, what in findings:
            tell(Finding(kind, number, index, name, what))
        if checked is not None:
            block = value.block if isinstance(value, Contained) else index // JSON_BLOCK
            records.append(checked.row, number, index, checked.places, block)
    if drawn == 0 and bad is None:
        raise UserError(
            f"{source.place} holds no records: expected a list of samples or JSON lines"
        )
    total = drawn if total is None else total
    left_out = drawn - (len(records) - kept)
    records.drawn.append(Drawn(source, total, drawn, left_out, digest.hexdigest()))


class Checked(NamedTuple):
    """A record that is as it should be.

    Attributes:
        row: it.
        places: see `Records.append`.
    """

    row: Row
    places: list[Place | None]


def name_of(value: Any) -> str:
    """The id of what `iterate_rows` gives; empty if there is none."""
    row = value.row if isinstance(value, Contained) else value
    return str(row.get("id", "")) if isinstance(row, dict) else ""


def check_value(
    value: Any, roots: Roots, rules: Rules
) -> tuple[Checked | None, list[tuple[str, str]]]:
    """Checks what `iterate_rows` gives.

    Args:
        value: it.
        roots: folders of its images and videos.
        rules: of the check.

    Returns:
        The record, None if something is wrong with it; and (kind, what) of that, see `Finding`.
    """
    held = value if isinstance(value, Contained) else None
    try:
        row = parse_row(value if held is None else held.row, rules.image_first)
        places = [] if held is None else _places(row, held)
    except UserError as error:
        kind = error.kind if isinstance(error, RowError) else "form"
        return None, [(kind, str(error))]
    findings = list(_check_files(row, roots, places, rules.check_files))
    return None if findings else Checked(row, places), findings


def _places(row: Row, held: Contained) -> list[Place | None]:
    """Where the images, then the videos of a record lie in its file; empty if none does."""
    for kind, names, places in (
        ("image", row.images, held.images),
        ("video", row.videos, held.videos),
    ):
        if len(names) != len(places):
            raise RowError(
                f"names {len(names)} {kind}(s), but its file holds {len(places)} for it", "count"
            )
    found = [*held.images, *held.videos]
    return found if any(place is not None for place in found) else []


def _check_files(
    row: Row, roots: Roots, places: Sequence[Place | None], look: bool
) -> Iterator[tuple[str, str]]:
    """Yields (kind, what) for missing files and refused paths; one of a kind is enough."""
    held = [place is not None for place in places] or [False] * (len(row.images) + len(row.videos))
    names_of = {
        "image": _where_not(row.images, held[: len(row.images)]),
        "video": _where_not(row.videos, held[len(row.images) :]),
    }
    for kind, root in (("image", roots.images), ("video", roots.videos)):
        names = names_of[kind]
        if names and root is None:
            other = " or data.image_folder" if kind == "video" else ""
            yield "path", f"has {kind}s, but data.{kind}_folder{other} is not set"
            return
        for name in names:
            assert root is not None
            try:
                if root.check(name, look) is ImageStatus.MISSING:
                    yield MISSING, f"{name} is missing in {root.path}"
                    return
            except UserError as error:
                yield "path", str(error)
                return


def _where_not(names: Sequence[str], held: Sequence[bool]) -> list[str]:
    return [name for name, inside in zip(names, held, strict=True) if not inside]


def _settle(
    records: Records, problems: _Problems, absent: _Problems, skipped: _Problems, share: float
) -> None:
    """Raises what was collected, or reports what was left out.

    Args:
        records: that were read.
        problems: wrong records that stop the run.
        absent: missing files that stop it.
        skipped: records to leave out.
        share: of the records that may be left out.
    """
    files = list(dict.fromkeys(str(source.path) for source in records.sources))
    names = ", ".join(files[:MAX_FILES_SHOWN])
    if len(files) > MAX_FILES_SHOWN:
        names += f" and {len(files) - MAX_FILES_SHOWN} more files"
    total = sum(each.drawn for each in records.drawn)
    if problems.count:
        raise UserError(problems.text(f"{names}: {problems.count} of {total} records are wrong:"))
    if absent.count:
        raise UserError(
            absent.text(
                f"{names}: {absent.count} of {total} records name image or video files that are "
                "missing; set data.on_broken_image: skip to leave them out:"
            )
        )
    if skipped.count > share * total:
        raise UserError(
            skipped.text(
                f"{names}: {skipped.count} of {total} records would be left out, more than the "
                f"allowed share of {share} (data.max_broken):"
            )
        )
    if skipped.count:
        records.num_left_out = skipped.count
        logger.warning("%s", skipped.text(f"{names}: {skipped.count} records left out:"))


def arranged(records: Records) -> Records:
    """The samples of an epoch: records that are repeated, or partly drawn, as their sources ask.

    Raises:
        UserError: a weight leaves nothing of a source.
    """
    wanted = samples_per_source(records.drawn)
    if wanted is None:
        return records
    picks, start, drawn = [], 0, []
    for each, count in zip(records.drawn, wanted, strict=True):
        whole, rest = divmod(count, max(each.kept, 1))
        own = list(range(each.kept)) * whole
        own += draw_random(rest, each.kept, f"{each.source.seed} {each.source.path.name} epochs")
        picks.append(np.asarray(own, np.int64) + start)
        start += each.kept
        drawn.append(dataclasses.replace(each, samples=count))
    taken = records.take(np.concatenate(picks))
    taken.drawn = drawn
    return taken


def samples_per_source(drawn: Sequence[Drawn]) -> list[int] | None:
    """Samples of an epoch from each source; None: every record once.

    Rounded half up. Weights share out the number of records that their sources have together.

    Example: 300 and 100 records of weight 1: 200 each.
    """
    if all(each.source.weight is None and each.source.epochs == 1 for each in drawn):
        return None
    weighted = [each for each in drawn if each.source.weight is not None]
    records = sum(each.kept for each in weighted)
    sum_of_weights = sum(each.source.weight or 0 for each in weighted)
    counts = []
    for each in drawn:
        if each.source.weight is not None:
            exact = records * each.source.weight / sum_of_weights
        else:
            exact = each.kept * each.source.epochs
        counts.append(max(int(exact + 0.5), 1) if each.kept else 0)
    return counts


def open_records(config: DataConfig) -> Records:
    """Reads and checks the records of a recipe's data section.

    Raises:
        UserError: see `read_records`.
    """
    return read_records(
        config.paths,
        config.image_folder,
        config.video_folder,
        image_first=config.image_first,
        check_files=config.check_files,
        follow_links=config.follow_links,
        missing=config.on_broken_image,
        wrong=config.on_wrong_record,
        max_missing=config.max_broken,
    )
