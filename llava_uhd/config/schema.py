"""Dotted keys over nested dataclasses: which exist, what they take, and how values become objects.

A recipe is a flat table ``"section.key" -> value`` while it is put together. Two kinds of keys are
open: a field of type ``dict[str, T]`` takes any entry ``field.name`` of type ``T``, and a dict
field with ``open_keys`` in its metadata lends its entries to the section it stands in.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from llava_uhd.config.typed import Word, allows_none, convert, field_types, members, parse_scalar
from llava_uhd.errors import UserError
from llava_uhd.registry import nearest_hint

Flat = dict[str, Any]
Part = TypeVar("Part")


def settable(kind: type) -> list[dataclasses.Field[Any]]:
    """Fields that a recipe can set; those without ``init`` are filled in by the code."""
    return [item for item in dataclasses.fields(kind) if item.init]


def leaf_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass that takes a value, with its type."""
    leaves: dict[str, Any] = {}
    types = field_types(kind)
    for item in settable(kind):
        hint = types[item.name]
        if "open_keys" in item.metadata:
            extra = item.metadata["open_keys"]()
            leaves.update({prefix + name: each for name, each in extra.items()})
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            leaves.update(leaf_types(hint, f"{prefix}{item.name}."))
        else:
            leaves[prefix + item.name] = hint
    return leaves


def _dict_types(hint: Any) -> list[Any]:
    return [kind for kind in members(hint) if (get_origin(kind) or kind) is dict]


def _entry_type(hint: Any) -> Any:
    """Type of an entry of a dict field; true and false are welcome, see `assign`."""
    item = (get_args(_dict_types(hint)[0]) or (Any, Any))[1]
    return item if item is Any else item | bool


def _parent(key: str, leaves: Mapping[str, Any]) -> str | None:
    """The dict field that an open key such as ``stage.learn.projector`` is an entry of."""
    head = key
    while "." in head:
        head = head.rpartition(".")[0]
        if head in leaves and _dict_types(leaves[head]):
            return head
    return None


def is_section(key: str, leaves: Mapping[str, Any]) -> bool:
    """Whether the key has keys below it."""
    return any(name.startswith(key + ".") for name in leaves)


def unknown_key(key: str, leaves: Mapping[str, Any]) -> UserError:
    """The error for a key that does not exist, with the nearest one that does."""
    known = list(leaves)
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    if elsewhere:
        return UserError(f"unknown key '{key}'; did you mean '{elsewhere[0]}'?")
    # A misspelt section would otherwise be matched to a key of any other one.
    section, _, _ = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    close = difflib.get_close_matches(key, siblings, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else nearest_hint(key, known)
    return UserError(f"unknown key '{key}'{hint}")


def flatten(values: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = "") -> Flat:
    """Turns nested sections into dotted keys; a whole section may be null (all its defaults).

    Entries of dict fields of one plain type become keys of their own, so that a later layer can
    change one of them; dict fields that are an alternative to other types stay whole.

    Raises:
        UserError: a key that does not exist, a section that is no mapping.
    """
    flat: Flat = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        single = key in leaves and len(members(leaves[key])) == 1 and _dict_types(leaves[key])
        if isinstance(value, Mapping) and (is_section(key, leaves) or single):
            if single:
                flat.update({f"{key}.{entry}": each for entry, each in value.items()})
            else:
                flat.update(flatten(value, leaves, key + "."))
        elif key in leaves or _parent(key, leaves) or (value is None and is_section(key, leaves)):
            flat[key] = value
        elif is_section(key, leaves):
            raise UserError(f"{key} must be a section with keys below it, got {value!r}")
        else:
            raise unknown_key(key, leaves)
    return flat


def clear(flat: Flat, key: str) -> None:
    """Removes a key and everything below it."""
    for name in [name for name in flat if name == key or name.startswith(key + ".")]:
        del flat[name]


def assign(flat: Flat, key: str, value: Any, leaves: Mapping[str, Any]) -> None:
    """Sets one dotted key, replacing what was there.

    Null takes a section or a field back to its default (or to null, where that is a value). In a
    dict field ``name: false`` removes the entry and ``name: true`` means null.

    Raises:
        UserError: unknown key or wrong type.
    """
    if key in leaves:
        clear(flat, key)
        hint = leaves[key]
        null = value is None or (isinstance(value, Word) and parse_scalar(value) is None)
        if null and not allows_none(hint):
            return
        value = convert(value, hint, key)
        if len(members(hint)) == 1 and _dict_types(hint):
            for entry, each in value.items():
                assign(flat, f"{key}.{entry}", each, leaves)
        else:
            flat[key] = value
        return
    parent = _parent(key, leaves)
    if parent is not None:
        _assign_entry(flat, key, parent, value, leaves)
    elif is_section(key, leaves):
        if isinstance(value, Mapping):
            for name, each in flatten(value, leaves, key + ".").items():
                assign(flat, name, each, leaves)
        elif convert(value, Any, key) in (None, "null"):
            clear(flat, key)
        else:
            raise UserError(f"{key} is a section: set one of its keys, for instance {key}.KEY")
    else:
        raise unknown_key(key, leaves)


def _assign_entry(flat: Flat, key: str, parent: str, value: Any, leaves: Mapping[str, Any]) -> None:
    hint = leaves[parent]
    value = convert(value, _entry_type(hint), key)
    if len(members(hint)) > 1:
        # Entry of a mapping that is kept whole, at any depth.
        table = dict(flat[parent]) if isinstance(flat.get(parent), dict) else {}
        flat[parent] = table
        *path, last = key[len(parent) + 1 :].split(".")
        for step in path:
            inner = table.get(step)
            table[step] = dict(inner) if isinstance(inner, dict) else {}
            table = table[step]
        table[last] = value
    elif value is False:
        flat.pop(key, None)
    else:
        flat[key] = None if value is True else value


def build(kind: type[Part], flat: Flat, leaves: Mapping[str, Any], prefix: str = "") -> Part:
    """Makes the dataclass from its dotted keys; fields without a key keep their defaults."""
    types = field_types(kind)
    fields = settable(kind)
    own = {item.name for item in fields}
    values: dict[str, Any] = {}
    for item in fields:
        key, hint = prefix + item.name, types[item.name]
        if "open_keys" in item.metadata:
            rest = {
                name[len(prefix) :]: each for name, each in flat.items() if _below(name, prefix)
            }
            values[item.name] = {name: each for name, each in rest.items() if name not in own}
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            values[item.name] = build(hint, flat, leaves, key + ".")
        elif key in flat:
            values[item.name] = flat[key]
        else:
            entries = {name: each for name, each in flat.items() if _below(name, key + ".")}
            if entries:
                values[item.name] = {name[len(key) + 1 :]: each for name, each in entries.items()}
    return kind(**values)


def _below(name: str, prefix: str) -> bool:
    """Whether the key stands directly below the prefix."""
    return name.startswith(prefix) and "." not in name[len(prefix) :]
