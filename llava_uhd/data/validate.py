"""Looks at the data of a run before it starts, and tells everything that is wrong at once.

All records are read and all files looked for; a sample of images and videos is decoded in several
processes, and tokens are counted. ``python -m llava_uhd.data validate`` writes what is found.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llava_uhd.config.training import DataConfig
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.records import Records
from llava_uhd.data.validate_look import Looked, Looker, look_at
from llava_uhd.data.validate_walk import KINDS, Problem, Walked, walk
from llava_uhd.text.processor import LlavaUHDProcessor

WORST = 20  # over-long samples and other extremes that are named
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (1, 3), (3, 1), (1, 6), (6, 1))
SIDE = 4096  # pixels; larger images have no more tokens


class Sampling(NamedTuple):
    """How much is looked at.

    Attributes:
        images: records whose images and videos are decoded; None: all.
        workers: processes; 0: this one.
        seed: of the choice.
    """

    images: int | None = 2000
    workers: int = 0
    seed: int = 0


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: everything that is wrong.
        notes: what one should know but need not mend.
        sources: counts by source.
        counts: of everything.
        images: about the decoded images.
        tokens: about the counted samples.
        overlong: samples longer than ``data.max_length``, the longest first.
        lengths: (N, 3) int64 tokens, visual tokens and kept tokens of a sample of the records.
        sizes: (M, 2) int64 width and height of the decoded images.
        max_length: the same of the data section.
    """

    problems: list[Problem]
    notes: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    overlong: list[dict[str, Any]] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    max_length: int | None = None

    @property
    def stops(self) -> bool:
        """Whether training would stop."""
        return any(problem.outcome == "stops" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain form."""
        return {
            "format": 1,
            "would_stop_training": self.stops,
            "counts": self.counts,
            "problems": [problem._asdict() for problem in self.problems],
            "notes": self.notes,
            "sources": self.sources,
            "images": self.images,
            "tokens": self.tokens,
            "overlong": self.overlong,
        }


Progress = Callable[[str, int, int], None]


def validate(
    config: DataConfig,
    processor: LlavaUHDProcessor | None = None,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Report:
    """Looks at the data of a run.

    Args:
        config: of the run.
        processor: of its model; None: words are counted in the place of tokens.
        sampling: how much is decoded; None: the defaults.
        progress: called with what is being done, how much of it is done, and how much there is.
    """

    def told(path: str) -> None:
        if progress is not None:
            progress(f"reading {path}", 0, 0)

    sampling = Sampling() if sampling is None else sampling
    walked = walk(config, told)
    records = walked.records
    dataset = None if processor is None else ConversationDataset(records, processor, config)
    sampled = _sampled(len(records), sampling)
    wanted = sorted({*sampled, *_maybe_overlong(records, dataset)})
    decoded = None if sampling.images is None else frozenset(sampled)
    looker = Looker(records, dataset, decoded)
    found: list[Looked] = []
    for looked in look_at(looker, wanted, sampling.workers):
        found.append(looked)
        if progress is not None:
            progress("opening images, counting tokens", len(found), len(wanted))
    found.sort(key=lambda looked: looked.index)
    for looked in found:
        _note_problems(walked, looked, config)
    return _report(walked, found, frozenset(sampled), config, dataset)


def _sampled(total: int, sampling: Sampling) -> list[int]:
    if sampling.images is None or sampling.images >= total:
        return list(range(total))
    return random.Random(f"{sampling.seed} validate").sample(range(total), sampling.images)


def _maybe_overlong(records: Records, dataset: ConversationDataset | None) -> list[int]:
    """Records that may be longer than ``data.max_length``: a token has at least one byte."""
    if dataset is None or dataset.config.max_length is None:
        return []
    image, video = _most_tokens(dataset)
    found = []
    for index in range(len(records)):
        size = records.size(index)
        if size + image <= dataset.config.max_length:
            continue
        record = records[index]
        most = size + image * len(record.images) + video * len(record.videos)
        if most > dataset.config.max_length:
            found.append(index)
    return found


def _most_tokens(dataset: ConversationDataset) -> tuple[int, int]:
    """The most tokens that an image, and that a video may have."""
    processor, overview = dataset.processor, dataset.config.overview_only
    sizes = [(SIDE // height * width, SIDE // width * height) for width, height in SHAPES]
    image = max(processor.num_image_tokens(*size, overview) for size in sizes)
    frames = processor.video_config.max_frames or 10_000
    return image, max(processor.num_video_tokens(frames, *size) for size in sizes)


def _note_problems(walked: Walked, looked: Looked, config: DataConfig) -> None:
    """What was found in a record, and what training does about it."""
    if not looked.broken and not looked.wrong:
        return
    source, place = walked.records.origin(looked.index)
    named = {"record": place, "id": walked.records[looked.index].id}
    outcome = "left out" if config.on_broken_image == "skip" else "stops"
    for what in looked.broken:
        walked.note("broken", walked.records.sources[source], what, outcome=outcome, **named)
    for kind, what in looked.wrong:
        walked.note(kind, walked.records.sources[source], what, **named)


def _report(
    walked: Walked,
    found: list[Looked],
    sampled: frozenset[int],
    config: DataConfig,
    dataset: ConversationDataset | None,
) -> Report:
    records = walked.records
    report = Report(walked.problems, sources=walked.sources, max_length=config.max_length)
    counted = [looked for looked in found if looked.tokens is not None]
    chosen = [looked for looked in counted if looked.index in sampled]
    rows = [(looked.tokens or 0, looked.visual, looked.kept) for looked in chosen]
    report.lengths = np.array(rows, np.int64).reshape(-1, 3)
    sizes = [size for looked in found for size in looked.sizes]
    report.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    if dataset is None:
        report.notes.append("tokens are words here: give a recipe to count those of its tokenizer")
        report.max_length = None
    else:
        report.overlong = _overlong(records, counted, config)
    report.counts = _counts(walked, found, report)
    report.images = _about_images(report.sizes, found)
    report.tokens = _about_tokens(report.lengths, chosen, dataset is None)
    _note_shares(report, config)
    repeated = _repeated_ids(records)
    if repeated:
        report.counts["repeated_ids"] = sum(number - 1 for number in repeated.values())
        names = ", ".join(f"{name!r} ({number} times)" for name, number in [*repeated.items()][:3])
        report.notes.append(f"{len(repeated)} ids stand at several records, such as {names}")
    return report


def _overlong(records: Records, counted: list[Looked], config: DataConfig) -> list[dict[str, Any]]:
    """Samples that are longer than the limit, and what becomes of them."""
    if config.max_length is None:
        return []
    over = [looked for looked in counted if (looked.tokens or 0) > config.max_length]
    over.sort(key=lambda looked: -(looked.tokens or 0))
    entries = []
    for looked in over:
        source, place = records.origin(looked.index)
        stops = any(kind == "overlong" for kind, _ in looked.wrong)
        entries.append(
            {
                "file": str(records.sources[source].path),
                "record": place,
                "id": records[looked.index].id,
                "tokens": looked.tokens,
                "visual": looked.visual,
                "outcome": "stops" if stops else f"cut to {looked.kept}",
            }
        )
    return entries


def _counts(walked: Walked, found: list[Looked], report: Report) -> dict[str, Any]:
    kinds = Counter(problem.kind for problem in report.problems)
    return {
        "sources": len(walked.sources),
        "records": sum(source["drawn"] or 0 for source in walked.sources),
        "usable": len(walked.records),
        "looked_at": len(found),
        "files_decoded": sum(looked.opened for looked in found),
        "overlong": len(report.overlong),
        "problems": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
    }


def _about_images(sizes: np.ndarray, found: list[Looked]) -> dict[str, Any]:
    """Statistics of the decoded images."""
    if not len(sizes):
        return {"images": 0}
    width, height = sizes[:, 0], sizes[:, 1]
    shape = np.maximum(width, height) / np.minimum(width, height)
    return {
        "images": len(sizes),
        "videos": sum(len(looked.frames) for looked in found),
        "width": _spread(width),
        "height": _spread(height),
        "megapixels": _spread(width * height / 1e6),
        "long_side_over_short_side": _spread(shape),
    }


def _about_tokens(lengths: np.ndarray, chosen: list[Looked], words: bool) -> dict[str, Any]:
    if not len(lengths):
        return {"samples": 0}
    tokens, visual, kept = lengths.T
    return {
        "samples": len(lengths),
        "unit": "words" if words else "tokens",
        "total": _spread(tokens),
        "visual": _spread(visual),
        "text": _spread(tokens - visual),
        "after_the_cut": _spread(kept),
        "mean_learned": None if words else float(np.mean([each.learned for each in chosen])),
        "without_learned": None if words else sum(each.learned == 0 for each in chosen),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Where values lie, rounded to what can be told apart."""
    low, half, high = np.percentile(values, [5, 50, 95]).tolist()
    told = {"min": values.min(), "5%": low, "median": half, "mean": values.mean()}
    told |= {"95%": high, "max": values.max()}
    return {name: round(float(value), 3) for name, value in told.items()}


def _note_shares(report: Report, config: DataConfig) -> None:
    """Files that may be left out must not be too many."""
    total = report.counts["records"]
    left_out = {
        (problem.file, problem.record) for problem in report.problems if problem.outcome != "stops"
    }
    if not left_out:
        return
    share = len(left_out) / max(total, 1)
    told = f"{len(left_out)} of {total} records would be left out ({share:.2%})"
    if share > config.max_broken:
        what = f"{told}, more than data.max_broken ({config.max_broken}) allows"
        advice = "mend the data, or raise data.max_broken"
        report.problems.append(Problem("source", ", ".join(config.paths), None, "", what, advice))
    else:
        report.notes.append(f"{told}, as data.on_broken_image and on_wrong_record ask")


def _repeated_ids(records: Records) -> dict[str, int]:
    """Ids that stand at several records of the same file, with their numbers."""
    hashes = np.fromiter(
        (hash((records.origin(i)[0], records.id_of(i))) for i in range(len(records))),
        np.int64,
        len(records),
    )
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = np.zeros(len(ordered), bool)
    same[1:] = ordered[1:] == ordered[:-1]
    suspects = set(order[same].tolist()) | set(order[np.flatnonzero(same) - 1].tolist())
    found = Counter((records.origin(i)[0], records.id_of(i)) for i in sorted(suspects))
    return {name: number for (_, name), number in found.items() if number > 1 and name}
