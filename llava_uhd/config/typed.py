"""Values of recipes: YAML without surprises, and conversion to the type a field declares."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from llava_uhd.errors import UserError


class Word(str):
    """A value typed on a command line: the field that takes it decides what it means.

    So ``--model.checkpoint 2024`` is a folder, and ``--trainer.seed 2024`` a number.
    """


NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^[-+]?[0-9]+$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"
)


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``1e-3`` is a number, ``no`` and ``1:30`` are texts; no repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Reads ``017`` as 17, where YAML 1.1 would read an octal number."""
        return int(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in the parent, but a key that stands twice is an error, not the last one."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"key '{key}' stands twice (again in line {line}): keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern in (("null", NULL), ("bool", BOOL), ("int", INT), ("float", FLOAT)):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_yaml_int)


def parse_scalar(text: str) -> Any:
    """Reads one value of a command line as YAML would; what YAML cannot read is a text.

    Example: ``parse_scalar("1e-3")`` is 0.001, ``parse_scalar("no")`` is ``"no"``,
    ``parse_scalar("{projector: null}")`` is a mapping, ``parse_scalar("a: b # c")`` is a text.
    """
    structured = text[:1] in ("[", "{", "'", '"')
    if structured or any(rule.match(text) for rule in (NULL, BOOL, INT, FLOAT)):
        try:
            return yaml.load(text, Loader=RecipeLoader)
        except yaml.YAMLError:
            return str(text)
    return str(text)


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        UserError: not readable, not YAML, or no mapping; the message has the path.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections (model, data, ...), not a {_kind(values)}")
    return values


def members(hint: Any) -> tuple[Any, ...]:
    """Alternatives of a type: the members of a union, else the type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return get_args(hint)
    return (hint,)


def allows_none(hint: Any) -> bool:
    """Whether ``None`` is a value of the type."""
    return any(item in (type(None), Any) for item in members(hint))


def convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a value against a type and returns it in plain form.

    Whole floats become ints where an int is wanted; enumerations stay texts, so that the result
    can be written as YAML; a `Word` takes the reading that fits.

    Args:
        value: from YAML or a command line.
        hint: a type of the kinds that dataclass fields of recipes and of transformers'
            ``TrainingArguments`` use. Classes of other libraries are not checked.
        where: dotted key, for the message.

    Raises:
        UserError: field, value and expected type.
    """
    if isinstance(value, Word):
        return _convert_word(value, hint, where)
    if isinstance(value, list) and Any in members(hint):
        return [parse_scalar(item) if isinstance(item, Word) else item for item in value]
    for kind in _strict(members(hint)):
        fits, result = _fit(value, kind, where)
        if fits:
            return result
    raise UserError(f"{where} must be {describe(hint)}, got {value!r}")


def _convert_word(word: Word, hint: Any, where: str) -> Any:
    parsed = parse_scalar(word)
    try:
        return convert(parsed, hint, where)
    except UserError:
        if not isinstance(parsed, str) and str in _strict(members(hint)):
            return str(word)
        raise


def _strict(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drops ``str`` beside an enumeration: only the enumerated texts are meant."""
    if any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds):
        return tuple(kind for kind in kinds if kind is not str)
    return kinds


def _fit(value: Any, kind: Any, where: str) -> tuple[bool, Any]:
    """Whether the value is of one plain kind, and its converted form."""
    if kind is Any:
        return True, value
    if kind is type(None):
        return value is None, None
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(value == item and type(value) is type(item) for item in get_args(kind)), value
    if kind is bool or kind is str:
        return isinstance(value, kind), value
    if kind is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (True, int(value)) if whole and not isinstance(value, bool) else (False, None)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if origin in (list, tuple):
        return _fit_items(value, kind, origin, where)
    if origin is dict:
        return _fit_mapping(value, kind, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return any(value == item.value for item in kind), value
    return True, value


def _fit_items(value: Any, kind: Any, origin: type, where: str) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    item = (get_args(kind) or (Any,))[0]
    return True, origin(convert(each, item, f"{where}[{i}]") for i, each in enumerate(value))


def _fit_mapping(value: Any, kind: Any, where: str) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, None
    item = (get_args(kind) or (Any, Any))[1]
    return True, {str(key): convert(each, item, f"{where}.{key}") for key, each in value.items()}


def _kind(value: Any) -> str:
    words: dict[Any, str] = {dict: "mapping", list: "list", str: "text"}
    return words.get(type(value), type(value).__name__)


def describe(hint: Any) -> str:
    """Words for a type in messages, for instance "a number or null"."""
    return " or ".join(dict.fromkeys(_describe(kind) for kind in _strict(members(hint))))


def _describe(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return " or ".join(str(item) for item in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(item.value) for item in kind)
    if origin in (list, tuple) and get_args(kind):
        return f"a list (each {describe(get_args(kind)[0])})"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
        type(None): "null",
    }
    return words.get(origin, getattr(kind, "__name__", str(kind)))


def field_types(kind: type) -> dict[str, Any]:
    """Field name -> type of a dataclass whose annotations may be texts."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}
