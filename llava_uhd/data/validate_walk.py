"""Walks over every source of a run and collects what is wrong, instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llava_uhd.config.training import DataConfig
from llava_uhd.data.mixture import Source, find_sources
from llava_uhd.data.reading import MISSING, Finding, Rules, open_roots, read_source
from llava_uhd.data.records import Records, Roots
from llava_uhd.errors import UserError

# What a problem is called, and what to do about it.
KINDS: dict[str, tuple[str, str]] = {
    "source": ("source that cannot be used", "correct the path or the entry"),
    "unreadable": ("record that cannot be decoded", "write the line or the file again"),
    "form": ("record of the wrong form", "docs/data.md shows the form: mend it, or take it out"),
    "role": ("wrong role", "name the speakers human and gpt (or user and assistant)"),
    "order": ("turns that do not alternate", "join turns of the same speaker, or take them out"),
    "empty": ("empty conversation", "take the record out, or give it a question and an answer"),
    "count": ("images or videos without markers", "write one marker for each image or video"),
    "text": ("text that is not Unicode", "write it as UTF-8"),
    "path": ("path that is refused", "keep files below the folder that the paths are relative to"),
    MISSING: ("missing file", "copy or download it, or correct the path or data.image_folder"),
    "broken": ("image or video that cannot be read", "copy or download it again"),
    "overlong": ("sample that loses images at the cut", "raise data.max_length, shorten the text, "
                 "or set data.overlong to drop"),
    "sample": ("sample that cannot be encoded", "see the message"),
}  # fmt: skip


class Problem(NamedTuple):
    """Something wrong.

    Attributes:
        kind: one of `KINDS`.
        file: data file.
        record: its place in it; None where it is about the whole file.
        id: of the record.
        what: in words.
        advice: what to do.
        outcome: what training does about it: "stops", or "left out".
    """

    kind: str
    file: str
    record: int | None
    id: str
    what: str
    advice: str
    outcome: str = "stops"

    def line(self) -> str:
        """One line for people."""
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        name = f" (id {self.id!r})" if self.id else ""
        return f"{place}{name}: {self.what}"


@dataclass
class Walked:
    """What was found without opening an image.

    Attributes:
        records: those that are as they should be.
        problems: in the order of the files.
        sources: one line of counts for each source.
        wrong: records that are not among `records`.
    """

    records: Records
    problems: list[Problem] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    wrong: int = 0

    def note(self, kind: str, source: Source | None, what: str, **named: Any) -> None:
        """Adds a problem."""
        file = "" if source is None else str(source.path)
        fields = {"record": None, "id": "", **named}
        self.problems.append(Problem(kind, file, what=what, advice=KINDS[kind][1], **fields))


def walk(config: DataConfig, progress: Callable[[str], None] | None = None) -> Walked:
    """Reads all records of a data section.

    Args:
        config: of the run.
        progress: called with the path of each source before it is read.
    """
    mistakes: list[UserError] = []
    sources, roots = _with_roots(find_sources(config.paths, mistakes), config, mistakes)
    walked = Walked(Records(sources, roots))
    for mistake in mistakes:
        walked.note("source", None, str(mistake))
    for number in range(len(sources)):
        if progress is not None:
            progress(str(sources[number].path))
        _walk_source(walked, number, config)
    return walked


def _with_roots(
    sources: list[Source], config: DataConfig, mistakes: list[UserError]
) -> tuple[list[Source], list[Roots]]:
    """Sources whose folders are there."""
    folders = (config.image_folder, config.video_folder)
    kept: list[Source] = []
    roots: list[Roots] = []
    told: set[str] = set()
    for source in sources:
        try:
            roots += open_roots([*kept, source], folders, config.follow_links)[len(kept) :]
            kept.append(source)
        except UserError as error:
            if str(error) not in told:
                mistakes.append(error)
            told.add(str(error))
    return kept, roots


def _walk_source(walked: Walked, number: int, config: DataConfig) -> None:
    records, source = walked.records, walked.records.sources[number]
    before, found = len(records), len(walked.problems)
    wrong: set[int] = set()

    def tell(finding: Finding) -> None:
        rule = config.on_broken_image if finding.kind == MISSING else config.on_wrong_record
        walked.note(
            *(finding.kind, source, finding.what),
            record=finding.place,
            id=finding.id,
            outcome="left out" if rule == "skip" else "stops",
        )
        wrong.add(finding.place)

    def bad(index: int, error: UserError) -> None:
        walked.note("unreadable", source, str(error), record=index)
        wrong.add(index)

    try:
        read_source(records, number, Rules(config.image_first, config.check_files), tell, bad)
    except UserError as error:
        walked.note("source", source, str(error))
    walked.wrong += len(wrong)
    drawn = next((each for each in records.drawn if each.source is source), None)
    words = [abs(each) for each in records.modality_lengths[before:]]
    if not words and not wrong and len(walked.problems) == found:
        walked.note("source", source, f"{source.place} holds no records")
    walked.sources.append(
        {
            "file": str(source.path),
            "strategy": source.strategy,
            "records": None if drawn is None else drawn.total,
            "drawn": None if drawn is None else drawn.drawn,
            "usable": len(words),
            "wrong": len(wrong),
            "with_images_or_videos": sum(each > 0 for each in records.modality_lengths[before:]),
            "mean_words": sum(words) / len(words) if words else None,
        }
    )
