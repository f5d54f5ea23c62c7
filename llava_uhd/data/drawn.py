"""What was drawn from the files of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_uhd.data.mixture import Source
from llava_uhd.data.readers import file_digest


@dataclass(frozen=True)
class Drawn:
    """What was drawn from a source.

    Attributes:
        source: it.
        total: records in the file.
        drawn: records drawn.
        left_out: of them, those that are left out because a file is missing or they are wrong.
        ids_digest: SHA-256 of the lines ``INDEX ID`` of the drawn ones, each with its newline.
        samples: of an epoch, with repetitions; None: each of the others once.
    """

    source: Source
    total: int
    drawn: int
    left_out: int
    ids_digest: str
    samples: int | None = None

    @property
    def kept(self) -> int:
        """Records that are trained on."""
        return self.drawn - self.left_out

    @property
    def per_epoch(self) -> int:
        """Samples of an epoch."""
        return self.kept if self.samples is None else self.samples

    def to_dict(self) -> dict[str, Any]:
        """Plain form for the manifest; hashes the file."""
        values = {
            "path": str(self.source.path),
            "sampling_strategy": self.source.strategy,
            "seed": self.source.seed if self.source.strategy.startswith("random") else None,
            "total": self.total,
            "drawn": self.drawn,
            "left_out": self.left_out,
            "file_sha256": file_digest(self.source.path),
            "ids_sha256": self.ids_digest,
        }
        if self.samples is not None:
            values["samples"] = self.samples
        return values


def data_manifest(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """What a run is trained on, in plain form: each source, and one digest over all of them."""
    sources = [each.to_dict() for each in drawn]
    names = ("total", "drawn", "left_out", "file_sha256", "ids_sha256", "samples")
    content = json.dumps([[each[name] for name in names if name in each] for each in sources])
    return {
        "format": 1,
        "samples": sum(each.per_epoch for each in drawn),
        "left_out": sum(each.left_out for each in drawn),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "sources": sources,
    }
