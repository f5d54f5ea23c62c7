"""Scores that the five systems published, as data: where each is from, and how it was measured.

Numbers are as printed; a column says which of our scores it is, and what that is multiplied by
(OCRBench is printed as a tenth, MME's perception in one paper as a twentieth). Left out are numbers
that could not be read in their source: LLaVolta printed its scores as pictures, and of the table
of LLaVA-UHD only the score on TextVQA could be confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_uhd.eval.protocols import PROTOCOLS
from llava_uhd.eval.task import TASKS

HARNESS = "lmms-eval"


class Column(NamedTuple):
    """A printed column: task, metric, what our score is multiplied by, and a remark."""

    task: str
    metric: str = "accuracy"
    factor: float = 1.0
    remark: str = ""


@dataclass(frozen=True)
class System:
    """A row of a published table.

    Attributes:
        name: of the model.
        source: of the numbers.
        protocol: registered name of how it was measured, or another harness.
        numbers: (task, metric) -> the column and the printed number.
    """

    name: str
    source: str
    protocol: str
    numbers: Mapping[tuple[str, str], tuple[Column, float]]


@dataclass(frozen=True)
class Beside:
    """A published number beside one of ours.

    Attributes:
        system: name of the model.
        source: of the number.
        published: the number, in the unit of our score.
        difference: ours minus it.
        remark: why they may not be comparable, or an empty text.
    """

    system: str
    source: str
    published: float
    difference: float
    remark: str


_ZOO = "LLaVA model zoo, docs/MODEL_ZOO.md"
_V1 = "LLaVA-UHD, arXiv 2403.11703, as its README repeats it"
_V2 = "LLaVA-UHD v2, arXiv 2412.13871, table 1"
_V2_ABLATION = "LLaVA-UHD v2, arXiv 2412.13871, table 2 (825k samples)"
_ONEVISION = "LLaVA-OneVision, arXiv 2408.03326, tables 3 to 5"
_UNTOLD = "the paper does not say whether the prompt held OCR tokens"
_ANLS = "the published program scores ANLS here, the paper does not say what it prints"

_ZOO_COLUMNS = (
    Column("vqav2"),
    Column("gqa"),
    Column("vizwiz"),
    Column("scienceqa", "img_accuracy"),
    Column("textvqa"),
    Column("pope", "f1"),
    Column("mme", "perception"),
    Column("mmbench"),
    Column("mmbench_cn"),
    Column("seed_bench", "total_accuracy"),
    Column("llava_bench", "relative"),
    Column("mmvet", "total"),
)
_ZOO_ROWS = {
    "LLaVA-1.5 7B": "78.5 62.0 50.0 66.8 58.2 85.9 1510.7 64.3 58.3 58.6 65.4 31.1",
    "LLaVA-1.5 13B": "80.0 63.3 53.6 71.6 61.3 85.9 1531.3 67.7 63.6 61.6 72.5 36.1",
    "LLaVA-1.5 7B LoRA": "79.1 63.0 47.8 68.4 58.2 86.4 1476.9 66.1 58.9 60.1 67.9 30.2",
    "LLaVA-1.5 13B LoRA": "80.0 63.3 58.9 71.2 60.2 86.7 1541.7 68.5 61.5 61.3 69.5 38.3",
}
_V2_COLUMNS = (
    Column("docvqa", "anls"),
    Column("ocrbench", "final_score", 0.1),
    Column("chartqa", "relaxed_accuracy", 1.0, _ANLS),
    # Its row of LLaVA-1.5 is without OCR tokens.
    Column("textvqa_no_ocr", "accuracy", 1.0, _UNTOLD),
    Column("ai2d"),
    Column("scienceqa", "img_accuracy"),
    Column("mmmu"),
    Column("gqa"),
    Column("seed_bench_img", "image_accuracy"),
    Column("mmbench"),
    Column("mme", "perception", 0.05),
    Column("realworldqa"),
    Column("hrbench4k"),
)
_V2_ROWS = {
    "LLaVA-UHD v2 Vicuna-7B": "68.1 53.9 64.5 67.6 70.5 71.3 38.2 65.4 70.0 68.2 74.7 58.2 51.5",
    "LLaVA-UHD v2 Vicuna-13B": "68.2 55.6 67.4 70.0 72.4 73.3 37.7 66.0 71.1 70.3 73.1 59.6 55.3",
    "LLaVA-UHD v2 Qwen2-7B": "72.9 57.7 70.4 70.6 75.5 76.9 43.3 65.1 73.6 77.1 78.8 64.6 59.9",
    "LLaVA-1.5 7B (by UHD v2)": "21.8 31.8 17.8 45.5 55.5 66.8 37.0 62.0 65.8 66.5 75.3 54.8 36.1",
}
_ABLATION_COLUMNS = (*_V2_COLUMNS, Column("rec"))
_ABLATION_ROWS = {
    "LLaVA-UHD 7B (by UHD v2)": (
        "56.7 40.9 56.3 62.2 55.4 70.7 37.0 63.8 65.6 64.8 70.0 54.4 45.6 68.3"
    ),
    "LLaVA-UHD v2 7B, 825k": (
        "66.0 50.1 62.8 66.8 59.4 69.8 37.6 64.0 67.4 66.1 73.6 56.9 49.0 74.0"
    ),
}
_ONEVISION_COLUMNS = (
    Column("ai2d"),
    Column("chartqa", "relaxed_accuracy"),
    Column("docvqa", "anls"),
    Column("docvqa_test", "anls"),
    Column("infographicvqa", "anls"),
    Column("mmbench"),
    Column("mme", "cognition"),
    Column("mme", "perception"),
    Column("mmmu"),
    Column("mmvet", "total"),
    Column("seed_bench_img", "image_accuracy"),
    Column("scienceqa", "img_accuracy"),
    Column("realworldqa"),
    Column("llava_bench", "relative"),
    Column("activitynet_qa", "judged_accuracy"),
)
_ONEVISION_ROWS = {
    "LLaVA-OneVision 0.5B SI": (
        "54.2 61.0 75.0 71.2 44.8 43.8 272 1217 31.2 26.9 63.4 67.8 53.7 71.2 -"
    ),
    "LLaVA-OneVision 0.5B": (
        "57.1 61.4 73.7 70.0 46.3 52.1 240 1238 31.4 29.1 65.5 67.2 55.6 74.2 50.5"
    ),
    "LLaVA-OneVision 7B SI": (
        "81.6 78.8 89.3 86.9 69.9 81.7 483 1626 47.3 58.8 74.8 96.6 65.5 86.9 -"
    ),
    "LLaVA-OneVision 7B": (
        "81.4 80.0 90.2 87.5 70.7 80.8 418 1580 48.8 57.5 75.4 96.0 66.3 90.7 56.6"
    ),
}


def _systems() -> dict[str, System]:
    tables: tuple[tuple[str, str, tuple[Column, ...], dict[str, str]], ...] = (
        (_ZOO, "llava", _ZOO_COLUMNS, _ZOO_ROWS),
        (_V1, "uhd_v1", (Column("textvqa"),), {"LLaVA-UHD 13B": "67.7"}),
        (_V2, "uhd_v2", _V2_COLUMNS, _V2_ROWS),
        (_V2_ABLATION, "uhd_v2", _ABLATION_COLUMNS, _ABLATION_ROWS),
        (_ONEVISION, HARNESS, _ONEVISION_COLUMNS, _ONEVISION_ROWS),
    )
    found = {}
    for source, protocol, columns, rows in tables:
        for name, line in rows.items():
            numbers = {
                (column.task, column.metric): (column, float(word))
                for column, word in zip(columns, line.split(), strict=True)
                if word != "-"
            }
            found[name] = System(name, source, protocol, numbers)
    return found


SYSTEMS = _systems()


def beside(
    task: str, metric: str, value: float, settings: Mapping[str, Any], items: int
) -> list[Beside]:
    """The published numbers of a score.

    Args:
        task: registered name.
        metric: of the score.
        value: our score, of the whole task.
        settings: of our run.
        items: questions of our task.
    """
    size = TASKS.get(task).published_size if task in TASKS.names() else None
    other = "" if size in (None, items) else f"{items} questions instead of {size}"
    rows = []
    for system in SYSTEMS.values():
        if (task, metric) not in system.numbers:
            continue
        column, number = system.numbers[task, metric]
        published = round(number / column.factor, 6)
        remarks = [column.remark, _otherwise(system, task, settings), other]
        remark = "; ".join(filter(None, remarks))
        difference = round(value - published, 6)
        rows.append(Beside(system.name, system.source, published, difference, remark))
    return rows


def _otherwise(system: System, task: str, settings: Mapping[str, Any]) -> str:
    """How our run was measured in another way; empty if it was not."""
    ours = str(settings.get("protocol", "ours"))
    if system.protocol != ours:
        return f"measured as {ours}, published as {system.protocol}"
    measure = PROTOCOLS.get(ours).measure(task)
    pairs = (("beams", measure.beams), ("max_new_tokens", measure.max_new_tokens))
    changed = [
        f"{name} {settings[name]} instead of {wanted}"
        for name, wanted in pairs
        if wanted is not None and settings.get(name, wanted) != wanted
    ]
    return ", ".join(changed)
