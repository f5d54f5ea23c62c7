"""Intervals and paired tests against slow, plain forms; published numbers as data."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from llava_uhd.eval import published_scores, statistics
from llava_uhd.eval.metrics import mean, standard_error
from llava_uhd.eval.protocols import PROTOCOLS
from llava_uhd.eval.tasks import TASKS


@pytest.mark.parametrize("gained,lost", [(0, 0), (0, 1), (1, 5), (7, 7), (3, 20), (120, 91)])
def test_mcnemar(gained: int, lost: int) -> None:
    total = gained + lost
    # Every way that as many coins can fall as lopsidedly as this, or more.
    tail = sum(
        math.comb(total, k) for k in range(total + 1) if abs(2 * k - total) >= abs(gained - lost)
    )
    expected = float(Fraction(tail, 2**total))
    assert statistics.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-10)
    assert statistics.mcnemar(lost, gained) == statistics.mcnemar(gained, lost)


def test_mcnemar_of_many() -> None:
    normal = math.erfc(499 / math.sqrt(2 * 100_500))  # with the correction for continuity
    assert statistics.mcnemar(50_000, 50_500) == pytest.approx(normal, rel=1e-4)
    assert statistics.mcnemar(60_000, 40_000) == 0  # less than the smallest float


def test_error_of_units() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    sums, counts = statistics.in_units(values, "abcde")
    assert statistics.unit_error(sums, counts) == pytest.approx(standard_error(values), rel=1e-12)
    # Copies of the same question tell nothing new: only the correction for few units is larger.
    doubled = statistics.in_units([*values, *values], "abcdeabcde")
    assert statistics.unit_error(*doubled) == pytest.approx(standard_error(values), rel=1e-12)
    assert statistics.unit_error(*statistics.in_units([1.0], "a")) == 0


def exact_bootstrap(values: list[float], units: list[str]) -> dict[float, float]:
    """Mean -> chance, from every possible resample of the units."""
    known = dict.fromkeys(units)
    rows = {unit: [v for v, u in zip(values, units) if u == unit] for unit in known}
    chances: dict[float, float] = {}
    for drawn in itertools.product(known, repeat=len(known)):
        value = round(mean([v for unit in drawn for v in rows[unit]]), 9)
        chances[value] = chances.get(value, 0) + len(known) ** -len(known)
    return chances


@pytest.mark.parametrize("units", ["abcde", "aabbc"])
def test_resampled_means_have_the_law_of_the_bootstrap(units: str) -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.6]
    expected = exact_bootstrap(values, list(units))
    count = 40_000
    drawn = statistics.resampled_means(*statistics.in_units(values, units), count, seed=1)
    found = {
        round(float(v), 9): c / count
        for v, c in zip(*np.unique(drawn.round(9), return_counts=True))
    }
    assert set(found) <= set(expected)
    for value, chance in expected.items():
        assert found.get(value, 0) == pytest.approx(chance, abs=5 * math.sqrt(chance / count))


def test_blocks_do_not_matter_much(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [random.Random(3).random() for _ in range(50)]
    monkeypatch.setattr(statistics, "_BLOCK", 120)  # two rows at a time
    found = statistics.mean_intervals(values, range(50))
    assert len(statistics.resampled_means(*statistics.in_units(values, range(50)), 7, 1)) == 7
    assert found["bootstrap"] == pytest.approx(found["clt"], abs=0.02)


def test_intervals_of_a_share() -> None:
    values = [1.0] * 640 + [0.0] * 360
    found = statistics.mean_intervals(values, range(1000))
    reach = 1.96 * math.sqrt(0.64 * 0.36 / 999)
    assert found["clt"] == pytest.approx((0.64 - reach, 0.64 + reach), abs=1e-6)
    assert found["bootstrap"] == pytest.approx(found["clt"], abs=0.004)
    assert statistics.mean_intervals(values, range(1000)) == found  # a fixed seed


def plain_paired(first: list[float], second: list[float], units: list[int]) -> float:
    """p-value of a paired bootstrap that draws units one by one."""
    source, known = random.Random(11), sorted(set(units))
    rows = {u: [(a, b) for a, b, each in zip(first, second, units) if each == u] for u in known}
    difference = mean(b - a for a, b in zip(first, second))
    far = 0
    for _ in range(4000):
        drawn = [pair for _ in known for pair in rows[source.choice(known)]]
        far += abs(mean(b - a for a, b in drawn) - difference) >= abs(difference) - 1e-12
    return far / 4000


@pytest.mark.parametrize("copies", [1, 2])
def test_paired_bootstrap(copies: int) -> None:
    source = random.Random(5)
    first = [source.random() for _ in range(60)]
    second = [min(1.0, a + source.gauss(0.06, 0.3)) for a in first]
    units = [n // copies for n in range(60)]
    found = statistics.paired(first, second, units)
    assert found.test == "bootstrap"
    assert found.p == pytest.approx(plain_paired(first, second, units), abs=0.035)
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.difference == pytest.approx(mean(second) - mean(first))
    assert statistics.paired(first, second, units) == found
    back = statistics.paired(second, first, units)
    assert (back.gained, back.lost) == (found.lost, found.gained)
    assert statistics.paired(first, first, units).p == 1


def test_paired_of_right_and_wrong() -> None:
    first, second = [1, 1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0, 0]
    found = statistics.paired(first, second, range(7))
    assert (found.test, found.gained, found.lost) == ("McNemar", 1, 3)
    assert found.p == pytest.approx(2 * (1 + 4) / 16)
    # Two questions about an image are no two independent trials.
    assert statistics.paired(first, second, [0, 0, 1, 1, 2, 2, 3]).test == "bootstrap"
    with pytest.raises(ValueError, match="no items"):
        statistics.paired([], [], [])


def f1(rows: list[tuple[int, int]]) -> dict[str, float]:
    hit = sum(a and b for a, b in rows)
    wrong = sum(a != b for a, b in rows)
    return {"f1": 2 * hit / (2 * hit + wrong)}


def test_intervals_of_scores_that_are_no_means() -> None:
    source = random.Random(2)
    rows = [(int(source.random() < 0.5), int(source.random() < 0.6)) for _ in range(400)]
    metrics = [{"accuracy": float(a == b)} for a, b in rows]
    scores = {**f1(rows), "accuracy": 100 * mean(each["accuracy"] for each in metrics)}
    found = statistics.intervals(rows, metrics, range(400), scores, "f1", f1)
    assert set(found) == {"f1", "accuracy"} and set(found["f1"]) == {"bootstrap"}
    low, high = found["accuracy"]["clt"]
    assert low < scores["accuracy"] < high and 8 < high - low < 11  # in percent, as the score
    # The other way to an interval agrees with it.
    other = statistics._jackknife([[row] for row in rows], f1, "f1")["jackknife"]
    assert other == pytest.approx(found["f1"]["bootstrap"], abs=0.02)
    paired = statistics.intervals(rows, metrics, [n // 2 for n in range(400)], scores, "f1", f1)
    assert set(paired["f1"]) == {"jackknife"}
    assert statistics.intervals(rows[:6], metrics[:6], range(6), {"f1": 0.3}, "f1", f1) == {}


def test_published_numbers_belong_to_scores_of_ours() -> None:
    others = {("mme", "cognition"), ("seed_bench_img", "image_accuracy")}
    for system in published_scores.SYSTEMS.values():
        assert system.protocol in (*PROTOCOLS.names(), published_scores.HARNESS)
        for (task, metric), (column, number) in system.numbers.items():
            assert metric == TASKS.get(task).main_metric or (task, metric) in others
            full = {"mme": 2000.0, "ocrbench": 1000.0}.get(task, 100.0)
            assert 0 < number / column.factor <= full
            if metric == TASKS.get(task).main_metric and task != "mme":
                assert column.factor == TASKS.get(task).scale


def test_beside() -> None:
    settings = {"protocol": "llava", "beams": 1, "max_new_tokens": 128}
    rows = {
        each.system: each
        for each in published_scores.beside("gqa", "accuracy", 62.5, settings, 12578)
    }
    assert rows["LLaVA-1.5 7B"].difference == 0.5 and rows["LLaVA-1.5 7B"].remark == ""
    assert rows["LLaVA-UHD v2 Qwen2-7B"].remark == "measured as llava, published as uhd_v2"
    beams = published_scores.beside("gqa", "accuracy", 62.5, {**settings, "beams": 3}, 12578)
    assert beams[0].remark == "beams 3 instead of 1"
    part = published_scores.beside("gqa", "accuracy", 62.5, settings, 60)
    assert part[0].remark == "60 questions instead of 12578"
    (tenth,) = [
        each
        for each in published_scores.beside(
            "ocrbench", "final_score", 540, {"protocol": "uhd_v2"}, 1000
        )
        if each.system == "LLaVA-UHD v2 Vicuna-7B"
    ]
    assert (tenth.published, tenth.difference) == (539, 1)
    assert published_scores.beside("synthetic", "sign_exact", 0.5, settings, 9) == []
