"""The table of published flags and the kinds of entries it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.registry import Registry


@dataclass(frozen=True)
class Inert:
    """A flag that is accepted and does nothing; ``reason`` is told to the user once."""

    reason: str


@dataclass(frozen=True)
class Context:
    """What a translation may look at.

    Attributes:
        recipe: dotted key -> value of the recipe so far.
        flags: the other published flags of the command, by name.
    """

    recipe: Mapping[str, Any]
    flags: Mapping[str, Any]


Translation = Callable[[Any, Context], dict[str, Any] | Inert]


@dataclass(frozen=True)
class Alias:
    """One published flag: exactly one of the first three is set.

    Attributes:
        key: dotted recipe key that takes the value unchanged.
        translate: (value, context) -> dotted keys with values, or `Inert`.
        inert: why the flag has no effect here.
        first: it chooses the kind of model, so it is read before all other words, wherever it
            stands: they then change what it chose.
    """

    key: str | None = None
    translate: Translation | None = None
    inert: str | None = None
    first: bool = False


ALIASES: Registry[Alias] = Registry("published flag")


def apply_alias(name: str, value: Any, context: Context) -> dict[str, Any] | Inert:
    """Translates one published flag.

    Args:
        name: without the dashes.
        value: as read from the command line.
        context: the rest of the command and the recipe.

    Raises:
        UserError: unknown flag, or a value that asks for something that does not exist here.
    """
    alias = ALIASES.get(name)
    if alias.key is not None:
        return {alias.key: value}
    if alias.translate is not None:
        return alias.translate(value, context)
    return Inert(alias.inert or "")


def read_first(name: str) -> bool:
    """Whether a word of the command line is a flag that is read before the others."""
    return name in ALIASES and ALIASES.get(name).first


def takes_keys(table: Mapping[str, str]) -> None:
    """Registers flags that are recipe keys under another name."""
    for name, key in table.items():
        ALIASES.add(name, Alias(key=key))


def inert(table: Mapping[str, str]) -> None:
    """Registers flags without effect, each with the reason."""
    for name, reason in table.items():
        ALIASES.add(name, Alias(inert=reason))


def translates(*names: str, first: bool = False) -> Callable[[Translation], Translation]:
    """Registers a function for flags whose values mean something else here."""

    def wrap(function: Translation) -> Translation:
        for name in names:
            ALIASES.add(name, Alias(translate=function, first=first))
        return function

    return wrap


def only(name: str, allowed: tuple[Any, ...], reason: str, refusal: str) -> None:
    """Registers an option of which only one choice exists here: others are refused."""

    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        if value in allowed:
            return Inert(reason)
        raise UserError(f"--{name} {value}: {refusal}")

    ALIASES.add(name, Alias(translate=translate))


def true_or_false(name: str, value: Any) -> bool:
    """The value of a switch.

    Raises:
        UserError: neither true nor false.
    """
    if not isinstance(value, bool):
        raise UserError(f"--{name} must be True or False, got {value!r}")
    return value
