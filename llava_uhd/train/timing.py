"""Where the time of a step goes: a line of segments, each of which belongs to one part.

On CUDA the ends of segments are events on the device's stream, so that a segment is the time that
the device spends, or waits, on it; nothing is synchronised until the log is written. Elsewhere they
are readings of the clock.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

DATA, OPTIMIZER, OTHER = "data", "optimizer", "other"
FORWARD = ("vision_tower", "projector", "language_model")
BACKWARD = tuple(f"backward_{part}" for part in FORWARD)
PARTS = (DATA, *FORWARD, *BACKWARD, OPTIMIZER, OTHER)

MEANINGS = {
    DATA: "waiting for batches",
    "vision_tower": "forward pass of the vision tower",
    "projector": "forward pass of the projector with its upsampler",
    "language_model": "the rest of the forward pass: embedding, decoder, head and loss",
    "backward_language_model": "backward pass until the projector's output has its gradient; all "
    "of it where nothing before the language model learns",
    "backward_projector": "from there until the tower's output has its gradient; the rest of the "
    "pass where the tower rests",
    "backward_vision_tower": "the rest of the backward pass",
    OPTIMIZER: "clipping, optimizer step, schedule, zeroed gradients",
    OTHER: "everything else: copies, logging, saving, evaluation",
}


class Clock(Protocol):
    """Takes the time without waiting for anything."""

    def now(self) -> Any:
        """A moment."""

    def is_past(self, moment: Any) -> bool:
        """Whether its time is known already."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two moments; waits for them if it must."""


class WallClock:
    """The clock of the machine."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def is_past(self, moment: float) -> bool:
        """It is."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Their difference."""
        return end - start


class EventClock:
    """Events on the current CUDA stream."""

    def now(self) -> torch.cuda.Event:
        """An event behind the work that was given to the device so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, moment: torch.cuda.Event) -> bool:
        """Whether the device has reached it."""
        return bool(moment.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Time of the device between them."""
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return EventClock() if device.type == "cuda" else WallClock()


class Timeline:
    """Time by parts: every moment belongs to exactly one.

    Args:
        clock: takes the time.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: deque[tuple[str, Any, Any]] = deque()
        self._part, self._since = OTHER, clock.now()

    def enter(self, part: str) -> None:
        """From now on the time belongs to a part of `PARTS`."""
        now = self.clock.now()
        self._open.append((self._part, self._since, now))
        self._part, self._since = part, now

    def settle(self, wait: bool = False) -> None:
        """Adds up the segments whose ends are past, or with ``wait`` all of them."""
        while self._open and (wait or self.clock.is_past(self._open[0][2])):
            part, start, end = self._open.popleft()
            self._seconds[part] += self.clock.seconds(start, end)

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        self.enter(self._part)
        self.settle(wait=True)
        taken = self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return taken


class PassHooks:
    """Tells a timeline which part of a model is at work, while it is `active`.

    The backward pass is divided where gradients of the outputs of projector and tower are complete.

    Args:
        timeline: to be told.
        model: with ``vision_tower`` and ``projector``.
    """

    def __init__(self, timeline: Timeline, model: nn.Module) -> None:
        self.timeline = timeline
        self.active = False
        # Layers that are computed again in the backward pass belong to it.
        self._forwarding = False
        self._handles: list[RemovableHandle] = []
        self._watch(model, self._begin_pass, self._end_pass)
        for name in ("vision_tower", "projector"):
            part = getattr(model, name, None)
            if part is not None:
                self._watch(part, *self._hooks_of(name))

    def _watch(self, module: nn.Module, before: Any, after: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _begin_pass(self, *_: Any) -> None:
        if self.active:
            self._forwarding = True
            self.timeline.enter("language_model")

    def _end_pass(self, *_: Any) -> None:
        if self.active:
            self._forwarding = False
            self.timeline.enter("backward_language_model")

    def _hooks_of(self, name: str) -> tuple[Any, Any]:
        def before(*_: Any) -> None:
            if self._forwarding:
                self.timeline.enter(name)

        def after(module: nn.Module, given: Any, output: Any) -> None:
            if not self._forwarding:
                return
            self.timeline.enter("language_model")
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(arrived)

        def arrived(gradient: torch.Tensor) -> None:
            if self.active:
                self.timeline.enter(f"backward_{name}")

        return before, after

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process had: the allocator's on CUDA, else of the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(ImportError):
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(most if sys.platform == "darwin" else most * 1024)
    return None
