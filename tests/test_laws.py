"""The laws of the house: what may import what, how large things may grow, what never appears."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llava_uhd"

# Each part imports only from parts of lower floors (and from itself).
FLOORS = {
    "errors": -1,
    "registry": 0,
    "page": 0,
    "config": 1,
    "images": 2,
    "vision": 2,
    "language": 2,
    "text": 3,
    "projectors": 3,
    "model": 4,
    "data": 4,
    "checkpoint": 5,
    "train": 6,
    "eval": 6,
    "serve": 6,
    "inspect": 6,
    "launch": 6,
    "convert": 6,
    "merge_lora": 6,
    "quickstart": 7,
    "bench": 7,
}
# The commands of a lower part, which nothing imports, stand where commands stand.
COMMANDS = {"data.__main__": 6}
NEVER = {("model", "text"), ("model", "data"), ("data", "model")}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Optional libraries: imported inside the function that needs them.
LAZY = ("bitsandbytes", "deepspeed", "fastapi", "flash_attn", "gradio", "peft", "sklearn")
LAZY += ("tensorboard", "triton", "uvicorn", "wandb", "av", "pyarrow")

Check = Callable[[ast.Module], Iterator[str]]


def sources() -> dict[str, ast.Module]:
    """Module name -> syntax tree of every file of the package."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


TREES = sources()


def imported(tree: ast.Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in known else str(node.module)


def part_of(module: str) -> str:
    """`llava_uhd.images.geometry` -> `images`; the package itself -> an empty text."""
    return [*module.split("."), ""][1]


def upward(module: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Imports that do not go down."""
    here = part_of(module)
    floor = COMMANDS.get(module.removeprefix("llava_uhd."), FLOORS[here])
    for line, name in imported(tree, known):
        if name.removeprefix("llava_uhd.") in COMMANDS:
            yield f"{module}:{line} imports the command {name}"
        if name.split(".")[0] != "llava_uhd" or part_of(name) in (here, ""):
            continue
        there = part_of(name)
        if FLOORS[there] >= floor or (here, there) in NEVER:
            yield f"{module}:{line} imports {name} (floor {floor} from {FLOORS[there]})"


def test_imports_go_down() -> None:
    modules = {name: tree for name, tree in TREES.items() if name != "llava_uhd"}
    unknown = {part_of(name) for name in modules} - set(FLOORS)
    assert not unknown, f"give these a floor: {unknown}"
    found = [item for name, tree in modules.items() for item in upward(name, tree, set(TREES))]
    assert not found, "\n".join(found)


def test_nothing_imports_the_front_door() -> None:
    found = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "llava_uhd":
                names = {alias.name for alias in node.names} - {"__version__"}
                found += [f"{name}:{node.lineno} {each}" for each in names if not is_module(each)]
    assert not found, f"import from the module that defines it: {found}"


def is_module(name: str) -> bool:
    """Whether ``llava_uhd.name`` is a module."""
    return f"llava_uhd.{name}" in TREES


def test_no_circles() -> None:
    edges = {
        name: {target for _, target in imported(tree, set(TREES)) if target in TREES} - {name}
        for name, tree in TREES.items()
        if name != "llava_uhd"
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(edges.get(module, ())):
                walk(target, (*path, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def test_sizes() -> None:
    found = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = int(node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length}")
    assert not found, "\n".join(found)


def check_annotations(tree: ast.Module) -> Iterator[str]:
    """Arguments and results without a type."""
    methods = {
        item
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in item.decorator_list)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            arguments = [*given.posonlyargs, *given.args][1 if node in methods else 0 :]
            arguments += [*given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            bare = [argument.arg for argument in arguments if argument.annotation is None]
            if bare or node.returns is None:
                yield f"{node.lineno} {node.name}: {bare or 'result'} has no type"


def check_print(tree: ast.Module) -> Iterator[str]:
    """Calls of print in a file that is no command."""
    command = any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not command:
            yield f"{node.lineno} print in a library module: use logging"


def check_unsafe(tree: ast.Module) -> Iterator[str]:
    """Whatever could run code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                yield f"{node.lineno} torch.load without weights_only=True"
            if given.get("trust_remote_code", "False") != "False":
                yield f"{node.lineno} trust_remote_code"
            if called in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"):
                yield f"{node.lineno} {called}"
            if called.split(".")[0] in ("pickle", "joblib", "dill", "cloudpickle"):
                yield f"{node.lineno} {called}"
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            yield f"{node.lineno} imports from pickle"


def check_torchvision(tree: ast.Module) -> Iterator[str]:
    """A torchvision that does not match the installed torch breaks every model class."""
    for line, name in imported(tree, set()):
        if name.split(".")[0] == "torchvision":
            yield f"{line} imports torchvision"


def check_lazy(tree: ast.Module) -> Iterator[str]:
    """Optional libraries imported with the module."""
    top = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top.body = [node for node in top.body if not isinstance(node, functions)]
    for line, name in imported(top, set()):
        if name.split(".")[0] in LAZY:
            yield f"{line} imports {name} with the module: import it where it is used"


def check_globals(tree: ast.Module) -> Iterator[str]:
    """State that a function changes behind everybody's back."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{node.lineno} global {', '.join(node.names)}"


CHECKS: list[tuple[Check, str]] = [
    (check_annotations, "def f(x): ..."),
    (check_annotations, "class A:\n    def f(self, *rest) -> None: ..."),
    (check_print, "print(1)"),
    (check_unsafe, "torch.load(path)"),
    (check_unsafe, "torch.load(path, weights_only=False)"),
    (check_unsafe, "pickle.load(file)"),
    (check_torchvision, "def f() -> None:\n    from torchvision.ops import roi_align"),
    (check_lazy, "import deepspeed"),
    (check_lazy, "try:\n    import triton\nexcept ImportError:\n    pass"),
    (check_globals, "def f() -> None:\n    global x"),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in CHECKS))
def test_package_obeys(check: Check) -> None:
    # Written in the optional library, and itself imported where it is used.
    in_triton = {"llava_uhd.vision.adaptive_conv_triton"}
    skip = {check_print: {"llava_uhd.errors"}, check_lazy: in_triton}.get(check, set())
    found = [
        f"{name}:{item}" for name, tree in TREES.items() if name not in skip for item in check(tree)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("check", "bad"), CHECKS)
def test_checks_can_fail(check: Check, bad: str) -> None:
    assert list(check(ast.parse(bad)))


def test_import_check_can_fail() -> None:
    tree = ast.parse("def f() -> None:\n    from llava_uhd.model import modeling")
    assert list(upward("llava_uhd.text.processor", tree, {"llava_uhd.model.modeling"}))
    assert list(upward("llava_uhd.data.dataset", tree, {"llava_uhd.model.modeling"}))


def test_words() -> None:
    """The repository speaks of the project only: no machine paths, no trackers, no registries."""
    forbidden = re.compile(
        r"(^|[^.\w])/(work|farm|root|home|opt)/|\bissue #?\d+\b|\.[l]ibrary/"
        r"|\b(pypi|pythonhosted|artifactory|nexus)\.\w",
        re.IGNORECASE | re.MULTILINE,
    )
    assert forbidden.search(f"see Issue {7}") and forbidden.search("/".join(["cd ", "home", "me"]))
    folders = [PACKAGE, *(ROOT / name for name in ("tests", "scripts", "docs", ".ci"))]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    files += [ROOT / "playground/README.md", ROOT / "pretrained_models/README.md"]
    found = []
    for path in files:
        if path.suffix in (".py", ".md", ".sh", ".yaml", ".json", ".toml", ".txt", ".html", ""):
            text = path.read_text(encoding="utf-8", errors="replace")
            for match in forbidden.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line} {match.group().strip()}")
    assert len(files) > 30
    assert not found, "\n".join(found)


def test_geometry_needs_neither_torch_nor_pillow() -> None:
    code = (
        "import sys, llava_uhd.images.geometry; print('torch' in sys.modules, 'PIL' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "False"]
