"""Visual context compression of a model, and schedules of it over a training run: integers alone.

Source: LLaVolta (arXiv 2406.20092). A schedule is a short text of stages K/s: ``s`` visual tokens
become one after ``K`` decoder layers. Its published program counts forward passes; here stages are
shares of the optimizer steps, and the counts are a second unit of the same texts.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Literal

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry, nearest_hint

logger = logging.getLogger(__name__)

# Decoder layers of the model that the published layer numbers belong to.
PUBLISHED_LAYERS = 32
# What the published program takes when its list of counts has come to its end.
LAST_PIVOT = 10000
DEFAULT_METHOD = "avgpool1d"

EXAMPLE = '"2/8 2/2 16/2 off"'
WORD = re.compile(
    r"(?:(?P<layer>-?[0-9]+)/(?P<stride>-?[0-9]+)|off)"
    r"(?:@(?P<pivot>-?[0-9]+)|:(?P<share>-?(?:[0-9]+/[0-9]+|[0-9]+\.?[0-9]*|\.[0-9]+)))?"
)

# Name -> text with layers of 32; equal shares of the run. The published four stages are "wider,
# then deeper".
SCHEDULES: Registry[str] = Registry("schedule")
for _name, _text in {
    "heavy": "2/8",
    "light": "16/8",
    "two_stage": "2/8 off",
    "three_stage_deeper": "2/8 16/8 off",
    "three_stage_wider": "2/8 2/2 off",
    "four_stage": "2/8 2/2 16/2 off",
    "four_stage_deeper": "2/8 16/8 16/2 off",
    "last_stage": "2/16 16/16 16/4",
}.items():
    SCHEDULES.add(_name, _text)


# Schemes as the published scripts call them.
_SCHEMES = {
    "4stage": "four_stage",
    "heavy_compression": "heavy",
    "light_compression": "light",
    "reproduce": "off",
}


@dataclass(frozen=True)
class Stage:
    """How tokens become fewer for a while.

    Attributes:
        layer: after so many decoder layers; -1: before the language model.
        stride: visual tokens that become one; 1: nothing happens.
    """

    layer: int = -1
    stride: int = 1

    @property
    def label(self) -> str:
        """Short name, as in texts: ``2/8``, ``off``."""
        return "off" if self.stride == 1 else f"{self.layer}/{self.stride}"

    @property
    def described(self) -> str:
        """In words: ``after layer 2, stride 8``."""
        if self.stride == 1:
            return "off"
        places = {-1: "before the language model", 0: "before the first layer"}
        place = places.get(self.layer, f"after layer {self.layer}")
        return f"{place}, stride {self.stride}"

    def scaled(self, num_layers: int) -> Stage:
        """The same share of a decoder of another depth, rounded half up, at least 1 from 1 on.

        Example: layer 2 of 32 is layer 1 of 12, layer 3 of 40 and layer 1 of 2.
        """
        if self.layer < 1:
            return self
        layer = (2 * self.layer * num_layers + PUBLISHED_LAYERS) // (2 * PUBLISHED_LAYERS)
        return dataclasses.replace(self, layer=max(layer, 1))


@dataclass(frozen=True)
class Schedule:
    """Stages in a row, in one of two units.

    Attributes:
        stages: at least one.
        shares: of the optimizer steps, one for each stage, together 1; empty with `pivots`.
        pivots: published counts of forward passes, one for each stage; empty with `shares`.
    """

    stages: tuple[Stage, ...]
    shares: tuple[Fraction, ...] = ()
    pivots: tuple[int, ...] = ()

    @property
    def by_forwards(self) -> bool:
        """Whether stages count forward passes (micro-batches), not optimizer steps."""
        return bool(self.pivots)

    def scaled(self, num_layers: int) -> Schedule:
        """The same for a decoder of another depth than the published one."""
        return dataclasses.replace(self, stages=tuple(s.scaled(num_layers) for s in self.stages))

    def starts(self, total: int) -> tuple[int, ...]:
        """Steps or forward passes that are done when each stage begins.

        Shares: the cumulative share of the steps, rounded half up, but early enough that every
        later stage has a step; where several begin together, the last of them counts. So the last
        stage always has the last step. Counts: see `_counted`; they may end before the last stage.

        Args:
            total: optimizer steps of the run; without meaning for counts.

        Example: four equal shares of 5198 steps: ``(0, 1300, 2599, 3899)``; of 2 steps:
            ``(0, 0, 0, 1)``.
        """
        if self.by_forwards:
            return self._counted()[0]
        starts, done = [0], Fraction(0)
        for index, share in enumerate(self.shares[:-1], start=1):
            done += share
            rounded = (2 * done * total + 1) // 2
            starts.append(max(min(int(rounded), total - (len(self.stages) - index)), 0))
        return tuple(starts)

    def stage_at(self, done: int, total: int = 0) -> int:
        """Number of the stage, from 0, after so many steps or forward passes.

        Args:
            done: steps or forward passes before this one.
            total: see `starts`.
        """
        return bisect_right(self.starts(total), done) - 1

    def dies_after(self) -> int | None:
        """Forward passes that the stages last, or None: the last one never ends.

        There the published program ends with an error, still inside the last of these passes: its
        lists are empty, and a further count is reached while the stride is above 1.
        """
        return self._counted()[1] if self.by_forwards else None

    def _counted(self) -> tuple[tuple[int, ...], int | None]:
        """Stage starts and end of the published counter.

        It counts forward passes from 0; after each it asks whether the count is a multiple of the
        stage's pivot, not 0, and the stride above 1, and only then counts on. So the first stage
        has one pass more than its pivot, a pivot that lies behind the counter waits for its next
        multiple, and a stage of stride 1 never ends.
        """
        starts, count = [0], 0
        for stage, pivot in zip(self.stages, self.pivots, strict=True):
            if stage.stride == 1:
                return tuple(starts), None
            count = (count // pivot + 1) * pivot
            starts.append(count + 1)
        return tuple(starts[:-1]), count + 1


def parse_schedule(text: str) -> Schedule:
    """The stages of a text, or of a registered name as it is for 32 decoder layers.

    Example: ``"2/8 off"`` halves the run; ``"2/8:0.25 off:0.75"`` names the shares;
    ``"2/8@1300 2/2@2600 16/2@3900 0/1"`` counts forward passes as published.

    Raises:
        UserError: neither a name nor such a text.
    """
    text = str(SCHEDULES.get(text)) if text in SCHEDULES else text
    stages, pivots, shares = [], [], []
    for word in text.split():
        match = WORD.fullmatch(word)
        if match is None:
            hint = nearest_hint(word, [*SCHEDULES.names(), "off"])
            if (scheme := _SCHEMES.get(word.replace("-", "_"))) is not None:
                hint = f"; did you mean '{scheme}'?"
            raise _wrong(text, f"'{word}' is no stage{hint}")
        layer, stride, pivot, share = match.group("layer", "stride", "pivot", "share")
        stage = Stage() if layer is None else Stage(int(layer), int(stride))
        if stage.layer < -1:
            raise _wrong(text, f"the layer in '{word}' must be at least -1")
        if stage.stride < 1:
            raise _wrong(text, f"the stride in '{word}' must be at least 1")
        if pivot is not None and int(pivot) < 1:
            raise _wrong(text, f"the count in '{word}' must be at least 1")
        stages.append(stage)
        pivots.append(None if pivot is None else int(pivot))
        shares.append(None if share is None else _fraction(text, word, share))
    if not stages:
        raise _wrong(text, "it is empty")
    if any(pivots):
        if any(shares):
            raise _wrong(text, "counts (@) and shares (:) exclude each other")
        return Schedule(tuple(stages), pivots=_filled(text, pivots))
    return Schedule(tuple(stages), shares=_whole(text, shares))


def _wrong(text: str, reason: str) -> UserError:
    names = ", ".join(SCHEDULES.names())
    advice = " Write" if reason.endswith("?") else "; write"
    return UserError(
        f"compression.schedule '{text}': {reason}{advice} stages layer/stride such as {EXAMPLE}, "
        f"or a name ({names})"
    )


def _fraction(text: str, word: str, share: str) -> Fraction:
    try:
        value = Fraction(share)
    except ZeroDivisionError:
        value = Fraction(0)
    if not 0 < value <= 1:
        raise _wrong(text, f"the share in '{word}' must be above 0 and at most 1")
    return value


def _whole(text: str, shares: list[Fraction | None]) -> tuple[Fraction, ...]:
    """Shares of all stages; equal ones where none is named."""
    given = [share for share in shares if share is not None]
    if not given:
        return (Fraction(1, len(shares)),) * len(shares)
    if len(given) < len(shares):
        raise _wrong(text, "either all stages name their share or none does")
    if sum(given) != 1:
        total = float(sum(given))
        raise _wrong(text, f"the shares add to {total:g}, not to 1 (1/3 may stand as it is)")
    return tuple(given)


def _filled(text: str, pivots: list[int | None]) -> tuple[int, ...]:
    """Counts of all stages; the last ones may be left out."""
    given = [pivot for pivot in pivots if pivot is not None]
    if pivots[: len(given)] != given:
        raise _wrong(text, "only the last stages may leave their count out")
    return (*given, *(LAST_PIVOT for _ in pivots[len(given) :]))


def resolve_schedule(value: str, num_layers: int) -> Schedule:
    """The stages of a run: names are scaled to the decoder's depth, texts are taken literally."""
    schedule = parse_schedule(value)
    return schedule.scaled(num_layers) if value in SCHEDULES else schedule


@dataclass
class CompressionConfig:
    """Visual context compression inside the language model (`method` "none": off).

    Attributes:
        method: registered compressor (`llava_uhd.language.compressors`). With a schedule or a
            stride above 1 "none" becomes "avgpool1d".
        layer: compress after this many decoder layers; -1 means before the language model. With as
            many as the decoder has, or more, nothing happens.
        stride: visual tokens merged into one.
        remainder: what happens to the last, incomplete group: "keep" or "drop" (published).
        positions: "integer", or "half" for the published half-precision positions.
        schedule: (layer, stride) over a training run, instead of the two: a name from `SCHEDULES`
            or a text for `parse_schedule`. A model that has been trained holds None and the state
            that its run ended with.
    """

    method: str = "none"
    layer: int = -1
    stride: int = 1
    remainder: Literal["keep", "drop"] = "keep"
    positions: Literal["integer", "half"] = "integer"
    schedule: str | None = None

    def check(self) -> None:
        """Finds values that are none; asked in each pass too, since fields can be set later.

        Raises:
            UserError: names the field and its value.
        """
        for name, least in (("layer", -1), ("stride", 1)):
            value = getattr(self, name)
            if type(value) is bool or not isinstance(value, Integral):
                raise UserError(
                    f"compression.{name} must be a whole number, got {value!r}: write for example "
                    f"{name}=8"
                )
            if value < least:
                raise UserError(f"compression.{name} must be at least {least}, got {value}")
            setattr(self, name, int(value))
        if not isinstance(self.method, str):
            raise UserError(
                f"compression.method must be a name, got {self.method!r}: write '{DEFAULT_METHOD}' "
                "or 'none'"
            )
        hints = {"remainder": ("keep", "drop"), "positions": ("integer", "half")}
        for name, known in hints.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"compression.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}"
                )

    def __post_init__(self) -> None:
        self.check()
        if self.schedule is None:
            if self.stride > 1 and self.method == "none":
                self.method = DEFAULT_METHOD
            return
        if not isinstance(self.schedule, str):
            raise UserError(
                f"compression.schedule must be a text such as {EXAMPLE}, got {self.schedule!r}"
            )
        parse_schedule(self.schedule)
        if (self.layer, self.stride) != (-1, 1):
            raise UserError(
                f"compression.schedule '{self.schedule}' says layer and stride: leave "
                f"compression.layer {self.layer} and compression.stride {self.stride} out"
            )
        if self.method == "none":
            self.method = DEFAULT_METHOD

    def of_stage(self, stage: Stage) -> CompressionConfig:
        """What a model does in a stage of the schedule."""
        if stage.stride == 1:
            return dataclasses.replace(self, method="none", layer=-1, stride=1, schedule=None)
        return dataclasses.replace(self, layer=stage.layer, stride=stage.stride, schedule=None)


def after_training(
    asked: CompressionConfig, before: CompressionConfig, num_layers: int
) -> CompressionConfig:
    """What a model does once a recipe has trained it: the last stage of the recipe's schedule.

    Says so where a model compressed before and the recipe does not ask for it.

    Args:
        asked: section of the recipe.
        before: of the checkpoint that the recipe goes on from, or the default.
        num_layers: of the decoder.
    """
    if asked.schedule is not None:
        return asked.of_stage(resolve_schedule(asked.schedule, num_layers).stages[-1])
    if asked.method == "none" and before.method != "none":
        logger.warning(
            "the checkpoint compresses (%s, %s), but the recipe trains without: to keep it, set "
            "--compression.method %s --compression.layer %s --compression.stride %s "
            "--compression.remainder %s --compression.positions %s",
            before.method,
            Stage(before.layer, before.stride).described,
            *(before.method, before.layer, before.stride, before.remainder, before.positions),
        )
    return asked
