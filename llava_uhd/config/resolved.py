"""What every kind of recipe can do: name its folder, become YAML and come back."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, TypeVar

import yaml

from llava_uhd.config.schema import Flat, assign, build, flatten, leaf_types

Kind = TypeVar("Kind", bound="Resolved")


class Resolved:
    """Base of the dataclasses that hold a whole run.

    They have the fields ``name``, ``trainer`` (with ``output_dir`` and open ``arguments``) and
    ``debug``.
    """

    name: str
    trainer: Any
    debug: bool

    @property
    def output_dir(self) -> str:
        """Output folder; runs of a debug size never share one with the real run."""
        if self.trainer.output_dir is not None:
            return str(self.trainer.output_dir)
        shrunk = self.debug and "debug" not in self.name.split("/")
        return f"checkpoints/{'debug/' if shrunk else ''}{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested form with every default filled in; `from_dict` reads it back."""
        values = _plain(dataclasses.asdict(self))  # type: ignore[call-overload]
        arguments = values["trainer"].pop("arguments")
        values["trainer"] = {**values["trainer"], **arguments}
        return values

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, itself a valid recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def keys(cls) -> dict[str, Any]:
        """Every dotted key that a recipe of this kind can hold, with its type."""
        return _keys(cls)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls: type[Kind], values: dict[str, Any]) -> Kind:
        """Builds a recipe from the nested form.

        Raises:
            UserError: unknown key, wrong type or impossible value.
        """
        leaves = cls.keys()
        flat: Flat = {}
        for key, value in flatten({"name": "unnamed", **values}, leaves).items():
            assign(flat, key, value, leaves)
        return cls.from_flat(flat)

    @classmethod
    def from_flat(cls: type[Kind], flat: Flat) -> Kind:
        """Builds a recipe from its dotted keys.

        Raises:
            UserError: an impossible value.
        """
        return build(cls, flat, cls.keys())


@cache
def _keys(kind: type) -> dict[str, Any]:
    return leaf_types(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [_plain(each) for each in value]
    return value
