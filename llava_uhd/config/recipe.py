"""Recipes: YAML files, their bases, the command line on top, and one typed result.

A recipe file names its ``base`` (or several) and holds only what differs. Layers are put on each
other key by key: bases first, then the file, then the shrinking overlay of ``--debug``, then the
command line. In a layer, null takes a key back to its default.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from llava_uhd.config.aliases import ALIASES, Context, Inert, apply_alias, read_first
from llava_uhd.config.schema import Flat, assign, clear, flatten, unknown_key
from llava_uhd.config.training import Recipe, make_recipe, recipe_keys, training_argument_types
from llava_uhd.config.typed import Word, load_yaml, parse_scalar
from llava_uhd.errors import UserError
from llava_uhd.registry import nearest_hint

logger = logging.getLogger(__name__)

RECIPES_VARIABLE = "LLAVA_UHD_RECIPES"

Result = TypeVar("Result")

# A layer that sets the key on the left, and not those on the right, takes the latter back: the
# later choice wins over what an earlier layer chose in its place. With "key=value" only that value
# does so.
RIVALS: dict[str, tuple[str, ...]] = {
    # A checkpoint also brings its image settings and the shape of its projector.
    "model.checkpoint": (
        "model.language_model",
        "model.vision_tower",
        "model.projector_file",
        "model.upsampler_file",
        "model.select_layer",
        "model.image",
        "model.video",
        "model.projector.type",
        "model.projector.num_queries",
        "model.projector.num_heads",
        "model.projector.layer_norm_eps",
        "model.projector.scales",
    ),
    "model.language_model": ("model.checkpoint",),
    # Each shares the state of training out in its own way.
    "deepspeed": ("fsdp",),
    "fsdp": ("deepspeed",),
    "data.path": ("data.embedded",),
    "data.embedded": ("data.path", "data.image_folder", "data.video_folder"),
    "trainer.global_batch_size": ("trainer.gradient_accumulation_steps",),
    "trainer.gradient_accumulation_steps": ("trainer.global_batch_size",),
    "trainer.num_train_epochs": ("trainer.max_steps",),
    "compression.schedule": ("compression.layer", "compression.stride"),
    "compression.layer": ("compression.schedule",),
    "compression.stride": ("compression.schedule",),
    "compression.method=none": (
        "compression.schedule",
        "compression.layer",
        "compression.stride",
    ),
}


@dataclass(frozen=True)
class RecipeKind(Generic[Result]):
    """A family of recipes: what they become and where they stand.

    Attributes:
        make: dotted keys -> the recipe.
        keys: returns every dotted key that a recipe can hold, with its type.
        prefix: start of the names of its recipes; the empty one takes what no other kind has.
        debug_overlay: recipe that ``--debug`` lays over them, before their own ``debug_base``.
        command: that runs them, for messages.
        rivals: see `RIVALS`.
        published_flags: whether `llava_uhd.config.aliases` applies.
    """

    make: Callable[[Flat], Result]
    keys: Callable[[], dict[str, Any]]
    prefix: str
    debug_overlay: str
    command: str
    rivals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    published_flags: bool = False


STAGES: RecipeKind[Recipe] = RecipeKind(
    make=make_recipe,
    keys=recipe_keys,
    prefix="",
    debug_overlay="_base/debug",
    command="bash pretrain.sh, bash finetune.sh",
    rivals=RIVALS,
    published_flags=True,
)
# Names that begin with one of these belong to a kind of their own.
PREFIXES = {"vdim/": "bash vdim-pretrain.sh"}


def recipes_root() -> Path:
    """Folder of the recipes: ``scripts/recipes`` beside the package, or ``LLAVA_UHD_RECIPES``.

    Raises:
        UserError: there is no such folder.
    """
    given = os.environ.get(RECIPES_VARIABLE)
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "scripts" / "recipes"
    if not root.is_dir():
        raise UserError(
            f"recipes folder {root} does not exist: run from a clone of the repository "
            f"(pip install -e .), or set {RECIPES_VARIABLE}"
        )
    return root


def list_recipes(prefix: str = "") -> list[str]:
    """Names of all recipes of a kind, for instance ``uhd_v1/finetune_vicuna7b``.

    Bases are not listed.

    Args:
        prefix: of a `RecipeKind`.
    """
    root = recipes_root()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    named = sorted(name for name in names if not name.startswith("_"))
    return [name for name in named if _prefix(name) == prefix]


def _prefix(name: str) -> str:
    """Prefix of the kind that a recipe name belongs to."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def load_recipe(
    name_or_path: str | os.PathLike[str], overrides: Sequence[str] = (), *, debug: bool = False
) -> Recipe:
    """Loads a recipe with its bases and puts the command line on top.

    Args:
        name_or_path: name from `list_recipes`, or a YAML file.
        overrides: command line words: ``--section.key value``, ``--section.key=value``, published
            flags (see `llava_uhd.config.aliases`), ``TrainingArguments`` fields with or without
            ``trainer.``, and ``--debug``. A flag without a value means true.
        debug: shrink the recipe, as ``--debug`` does.

    Raises:
        UserError: unknown recipe, key or flag (with the nearest known one), wrong type, circular
            bases, impossible combination.
    """
    return load_kind(STAGES, name_or_path, overrides, debug=debug)


def load_kind(
    kind: RecipeKind[Result],
    name_or_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    debug: bool = False,
) -> Result:
    """Loads a recipe of any kind; see `load_recipe`."""
    path = find_recipe(name_or_path, prefix=kind.prefix)
    words = list(parse_words(overrides))
    debug = debug or any(name == "debug" and parse_scalar(value) is True for name, value in words)
    flat: Flat = {}
    _apply_file(flat, path, (), kind)
    for name, value in words:
        if name == "debug_base":  # its place is before the command line
            assign(flat, name, value, kind.keys())
    if debug:
        for overlay in (kind.debug_overlay, *_listed(flat.get("debug_base"))):
            _apply_file(flat, find_recipe(overlay), (), kind)
    flat.setdefault("name", recipe_name(path))
    used = ("debug", "debug_base")
    _apply_words(flat, [(name, value) for name, value in words if name not in used], kind)
    try:
        return kind.make(flat)
    except UserError as error:
        raise UserError(f"recipe {flat['name']}: {error}") from error


def recipe_name(path: Path) -> str:
    """Name of a recipe file: relative to the recipes folder, or its stem elsewhere."""
    root = recipes_root().resolve()
    path = path.resolve()
    if path.is_relative_to(root):
        return path.relative_to(root).with_suffix("").as_posix()
    return path.stem


def find_recipe(
    name_or_path: str | os.PathLike[str], beside: Path | None = None, prefix: str | None = None
) -> Path:
    """File of a recipe.

    Args:
        name_or_path: a name, or the path of a file.
        beside: folder that relative paths start from; the working folder by default.
        prefix: of the `RecipeKind` that a name must belong to; None takes any.

    Raises:
        UserError: no such recipe; the message names the nearest ones.
    """
    text = os.fspath(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = (beside or Path()) / text
        if path.is_file():
            return path
        text = text.rpartition(".")[0]
    path = recipes_root() / f"{text}.yaml"
    own = _prefix(text)
    if path.is_file() and prefix is not None and own != prefix and not text.startswith("_"):
        command = PREFIXES.get(own, STAGES.command)
        raise UserError(f"recipe '{text}' is not for this command: run it with {command}")
    if path.is_file() and path.resolve().is_relative_to(recipes_root().resolve()):
        return path
    names = list_recipes(prefix or "")
    raise UserError(
        f"unknown recipe '{name_or_path}'{nearest_hint(text, names)} (known: {', '.join(names)}; "
        "or the path of a .yaml file)"
    )


def _apply_file(flat: Flat, path: Path, above: tuple[Path, ...], kind: RecipeKind[Any]) -> None:
    """Puts the bases of a file and then the file itself onto the recipe."""
    resolved = path.resolve()
    if resolved in above:
        circle = " -> ".join(recipe_name(each) for each in (*above, resolved))
        raise UserError(f"recipe bases run in a circle: {circle}")
    values = load_yaml(path)
    bases = _listed(values.pop("base", None))
    if not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base must be a recipe name, a file or a list of them")
    if above:
        values.pop("name", None)  # a base lends its settings, not its name
    for base in bases:
        _apply_file(flat, find_recipe(base, beside=path.parent), (*above, resolved), kind)
    try:
        apply_layer(flat, flatten(_short_forms(values), kind.keys()), kind)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _listed(names: Any) -> list[Any]:
    """One name, several or none as a list."""
    return names if isinstance(names, list) else [names] if names else []


def _short_forms(values: dict[str, Any]) -> dict[str, Any]:
    """``model.compression`` is the long name of the section ``compression``."""
    model = values.get("model")
    if isinstance(model, dict) and "compression" in model:
        if "compression" in values:
            raise UserError("compression stands twice: at the top and under model")
        rest = {name: value for name, value in model.items() if name != "compression"}
        return {**values, "model": rest, "compression": model["compression"]}
    return values


def apply_layer(flat: Flat, layer: Flat, kind: RecipeKind[Any]) -> None:
    """Puts dotted keys onto a recipe; later choices displace their rivals.

    A checkpoint in another one's place keeps what was set beside that one.
    """
    for key, rivals in kind.rivals.items():
        name, _, wanted = key.partition("=")
        chosen = layer.get(name) is not None and wanted in ("", layer[name])
        replaced = name == "model.checkpoint" and flat.get(name) is not None
        if chosen and not replaced:
            for rival in rivals:
                if rival not in layer:
                    clear(flat, rival)
    for key, value in layer.items():
        assign(flat, key, value, kind.keys())


def parse_words(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Splits a command line into (name, value) pairs.

    Values are `Word` texts, whose type the field decides; several words in a row are a list; no
    word at all means true. Negative numbers are values.

    Raises:
        UserError: a word that belongs to no flag.
    """
    rest = list(words)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag[2:].partition("=")
        if not flag.startswith("--") or not name:
            raise UserError(f"'{flag}' belongs to no option: options look like --section.key value")
        if equals:
            yield name, Word(value)
            continue
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(Word(rest.pop(0)))
            if name == "debug" and parse_scalar(values[0]) not in (True, False):
                raise UserError(f"--debug takes no value, got '{values[0]}'")
        yield name, values if len(values) > 1 else values[0] if values else Word("true")


def _apply_words(flat: Flat, words: list[tuple[str, Any]], kind: RecipeKind[Any]) -> None:
    """Puts the whole command line onto the recipe as one layer, in its order.

    Flags that choose the kind of model count as if they stood first.
    """
    flags = {name: _plain(value) for name, value in words if name in ALIASES}
    if kind.published_flags:
        words = sorted(words, key=lambda word: not read_first(word[0]))
    layer: Flat = {}
    for name, value in words:
        for key, each in _meaning(name, value, Context(flat | layer, flags), kind).items():
            layer.pop(key, None)  # a repeated flag counts where it stands last
            layer[key] = each
    try:
        apply_layer(flat, layer, kind)
    except UserError as error:
        raise UserError(f"command line: {error}") from error


def _meaning(name: str, value: Any, context: Context, kind: RecipeKind[Any]) -> dict[str, Any]:
    """Dotted keys that one option of the command line sets."""
    if name.startswith("model.compression"):
        name = name.removeprefix("model.")
    if name == "compression.schedule" and isinstance(value, list):
        value = Word(" ".join(value))  # a text of several words without its quotation marks
    if "." in name:
        return {name: value}
    if kind.published_flags and name in ALIASES:
        # A plain alias leaves the reading of the value to the field it goes to.
        plain = value if ALIASES.get(name).key is not None else _plain(value)
        meaning = apply_alias(name, plain, context)
        if isinstance(meaning, Inert):
            logger.warning("--%s %s has no effect here: %s", name, plain, meaning.reason)
            return {}
        return meaning
    if name in training_argument_types() or name == "output_dir":
        return {f"trainer.{name}": value}
    flags = list(ALIASES) if kind.published_flags else []
    hint = nearest_hint(name, [*flags, *training_argument_types(), *kind.keys()])
    if not hint:
        raise unknown_key(name, kind.keys())
    raise UserError(f"unknown option '--{name}'{hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return parse_scalar(value) if isinstance(value, str) else value
