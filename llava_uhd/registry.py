"""Named parts: exact names, no duplicates, and an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llava_uhd.errors import UserError

T = TypeVar("T")


def nearest_hint(name: str, known: list[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest known name, or an empty string.

    Example: ``nearest_hint("slcies", ["slices", "pad"])`` is ``"; did you mean 'slices'?"``.
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


class Registry(Generic[T]):
    """A table from exact name to part.

    Args:
        kind: what the table holds, used in messages ("projector", "template", ...).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Adds ``item`` under ``name``; a second item of that name is a programming error."""
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered already")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""

        def wrap(item: T) -> T:
            return self.add(name, item)

        return wrap

    def get(self, name: str) -> T:
        """Returns the part called ``name``.

        Raises:
            UserError: unknown name; the message lists the known ones and the nearest.
        """
        if name not in self._items:
            known = ", ".join(self.names())
            hint = nearest_hint(str(name), self.names())
            raise UserError(f"unknown {self.kind} '{name}'{hint} (known: {known})")
        return self._items[name]

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
