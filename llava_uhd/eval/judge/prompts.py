"""Prompts of judges that published evaluators hold: read out of the user's copy, never executed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from llava_uhd.errors import UserError

OWN = "own"


@dataclass(frozen=True)
class Prompt:
    """Messages of a chat with places for the texts of an item.

    Attributes:
        messages: (role, text); ``$name`` and ``${name}`` are places, ``$$`` is a dollar sign.
        source: "own", or the file it was read from with a digest.
    """

    messages: tuple[tuple[str, str], ...]
    source: str = OWN

    def fill(self, **texts: str) -> list[dict[str, str]]:
        """The chat of one item."""
        return [
            {"role": role, "content": Template(text).substitute(texts)}
            for role, text in self.messages
        ]


def find_prompt_file(given: Path | None, root: Path, names: tuple[str, ...]) -> Path | None:
    """The file that the user names, else the first of ``names`` that lies with the data.

    Raises:
        UserError: the named file is not there.
    """
    if given is not None:
        if not given.is_file():
            raise UserError(f"--prompt-file {given} does not exist")
        return given
    return next((root / name for name in names if (root / name).is_file()), None)


def published_text(file: Path, variable: str = "prompt") -> str:
    """The text that a Python file or a notebook gives to a variable; any other file as a whole.

    Raises:
        UserError: there is none.
    """
    if file.suffix not in (".py", ".ipynb"):
        return _read(file)
    for tree in _trees(file):
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Assign)
                and any(isinstance(to, ast.Name) and to.id == variable for to in node.targets)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                return node.value.value
    raise UserError(f"{file} gives no text to '{variable}': it is no evaluator that is known")


def published_messages(file: Path, places: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The ``messages=[...]`` of the first call in a Python file, with places for the variables.

    Args:
        file: a published evaluator.
        places: variables that stand in the text, for instance ``question``.

    Raises:
        UserError: there is no such call, or other variables stand in it.
    """
    for tree in _trees(file):
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "messages":
                try:
                    found = tuple(_messages(node.value, places))
                except ValueError:
                    continue
                if found:
                    return found
    raise UserError(
        f"{file} holds no call with messages=[...] about {', '.join(places)}: it is no evaluator "
        "that is known"
    )


def source_of(file: Path) -> str:
    """How a prompt read from a file is called beside the scores."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"


def _messages(node: ast.expr, places: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(node, ast.List):
        raise ValueError
    for each in node.elts:
        if not isinstance(each, ast.Dict) or any(key is None for key in each.keys):
            raise ValueError
        names = [key.value for key in each.keys if isinstance(key, ast.Constant)]
        entry = dict(zip(names, each.values))
        role, content = entry.get("role"), entry.get("content")
        if not isinstance(role, ast.Constant) or content is None:
            raise ValueError
        yield str(role.value), _template(content, places)


def _template(node: ast.expr, places: tuple[str, ...]) -> str:
    """Text with places of a constant or an f-string of plain variables."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("$", "$$")
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, places) for part in node.values)
    if (
        isinstance(node, ast.FormattedValue)
        and isinstance(node.value, ast.Name)
        and node.value.id in places
        and node.conversion == -1
        and node.format_spec is None
    ):
        return "${" + node.value.id + "}"
    raise ValueError


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error


def _trees(file: Path) -> Iterator[ast.Module]:
    """Syntax trees of a Python file, or of the cells of a notebook that are Python."""
    parts = [_read(file)]
    if file.suffix == ".ipynb":
        try:
            cells = json.loads(parts[0])["cells"]
            parts = ["".join(cell["source"]) for cell in cells]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no notebook ({error})") from error
    for part in parts:
        try:
            yield ast.parse(part)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
