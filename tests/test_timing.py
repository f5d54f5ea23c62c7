"""Time by parts: nothing twice, nothing lost, the right names in the right order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_tiny import picture, tiny_parts
from torch import nn

from llava_uhd.train.timing import (
    BACKWARD,
    DATA,
    FORWARD,
    MEANINGS,
    OPTIMIZER,
    OTHER,
    PARTS,
    PassHooks,
    Timeline,
    WallClock,
    clock_of,
    peak_memory,
)


class Ticks:
    """A clock that a test moves; moments are past once the test has let them."""

    def __init__(self) -> None:
        self.time = 0.0
        self.past = float("inf")
        self.waited: list[float] = []

    def now(self) -> float:
        return self.time

    def is_past(self, moment: float) -> bool:
        return moment <= self.past

    def seconds(self, start: float, end: float) -> float:
        if not self.is_past(end):
            self.waited.append(end)
        return end - start


def test_every_moment_belongs_to_one_part() -> None:
    clock = Ticks()
    timeline = Timeline(clock)
    for part, seconds in (("data", 2.0), ("language_model", 5.0), ("data", 1.0)):
        timeline.enter(part)
        clock.time += seconds
    timeline.enter(OTHER)
    clock.time += 4.0
    found = timeline.take()
    assert {part: value for part, value in found.items() if value} == {
        "data": 3.0,
        "language_model": 5.0,
        "other": 4.0,
    }
    assert sum(found.values()) == clock.time
    clock.time += 7.0
    assert timeline.take()[OTHER] == 7.0, "the open part goes on after it was read"


def test_only_reading_waits_for_the_device() -> None:
    """As on CUDA: ends of segments are events that may not have happened yet."""
    clock = Ticks()
    timeline = Timeline(clock)
    timeline.enter(DATA)
    clock.time, clock.past = 3.0, 1.0
    timeline.enter(OPTIMIZER)
    clock.time = 5.0
    timeline.settle()
    assert not clock.waited
    assert timeline.take()[DATA] == 3.0
    assert clock.waited


class FakeEvent:
    """What `EventClock` uses of an event of CUDA: milliseconds, known some time later."""

    clock = 0.0
    done = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return self.at is not None and self.at <= FakeEvent.done

    def synchronize(self) -> None:
        FakeEvent.done = max(FakeEvent.done, float(self.at or 0))

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.query() and other.query(), "both must have happened"
        return 1e3 * (float(other.at or 0) - float(self.at or 0))


def test_events_are_read_when_they_have_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timeline = Timeline(clock_of(torch.device("cuda")))
    timeline.enter(DATA)
    FakeEvent.clock = 2.0
    timeline.enter(OPTIMIZER)
    FakeEvent.clock, FakeEvent.done = 2.5, 1.0
    timeline.settle()
    assert FakeEvent.done == 1.0, "nothing waited"
    found = timeline.take()
    assert (found[DATA], found[OPTIMIZER]) == (2.0, 0.5) and FakeEvent.done == 2.5


def test_names() -> None:
    assert set(MEANINGS) == set(PARTS)
    assert set(FORWARD) | set(BACKWARD) | {DATA, OPTIMIZER, OTHER} == set(PARTS)
    assert isinstance(clock_of(torch.device("cpu")), WallClock)
    assert peak_memory(torch.device("cpu")) > 10 * 2**20


class Written(Timeline):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(Ticks())
        self.entered: list[str] = []

    def enter(self, part: str) -> None:
        self.entered.append(part)


def one_pass(model: nn.Module, inputs: dict[str, Any], **how: bool) -> list[str]:
    timeline = Written()
    hooks = PassHooks(timeline, model)
    hooks.active = how.get("active", True)
    loss = model(**inputs).loss
    loss.backward()
    hooks.remove()
    before = len(timeline.entered)
    model(**inputs)
    assert len(timeline.entered) == before, "hooks are gone"
    return timeline.entered


def batch() -> tuple[Any, dict[str, Any]]:
    model, processor = tiny_parts()
    inputs = dict(processor(text="USER: <image>\nWhat? ASSISTANT: red", images=[picture(64, 32)]))
    labels = inputs["input_ids"].clone()
    labels[labels == model.config.image.image_token_id] = -100
    return model, {**inputs, "labels": labels}


FORWARDS = [
    *("language_model", "vision_tower", "language_model", "projector", "language_model"),
    "backward_language_model",
]


@pytest.mark.parametrize(
    ("learning", "backward"),
    [
        (("vision_tower", "projector", "language_model"), ["projector", "vision_tower"]),
        (("projector",), ["projector"]),
        (("language_model",), []),
    ],
)
def test_parts_of_a_pass(learning: tuple[str, ...], backward: list[str]) -> None:
    model, inputs = batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in learning)
    assert one_pass(model, inputs) == [*FORWARDS, *(f"backward_{part}" for part in backward)]


def test_layers_that_are_computed_again_belong_to_the_backward_pass() -> None:
    model, inputs = batch()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = one_pass(model, inputs)
    assert found == [*FORWARDS, "backward_projector", "backward_vision_tower"]


def test_evaluation_is_not_told() -> None:
    assert one_pass(*batch(), active=False) == []
