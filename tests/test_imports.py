"""The rules of the house (design, section 2), read from the source itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weft

ROOT = Path(weft.__file__).parent
FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))

# What each part may import of weft, from the most special to the most general path.
BELOW = ("core", "errors")
PARTS = {
    "core": BELOW,
    "errors": (),
    "tasks": (*BELOW, "tasks"),
    "patches": (*BELOW, "patches"),
    "adapters": (*BELOW, "adapters"),
    "penalties": BELOW,
    "methods": (*BELOW, "patches", "adapters", "penalties", "methods"),
    "citations": (),
    "registry": (*BELOW, "methods", "citations"),
}
# These see tensors by task and never a method by name.
NO_METHODS = ("training", "bank", "serving", "reports", "data")


def part(path: str) -> str:
    """The folder or file at the top of the package that a file belongs to."""
    return path.split("/")[0].removesuffix(".py")


def module_name(path: str) -> str:
    """The dotted name of a source file."""
    name = path.removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip(".")
    return f"weft.{name}".rstrip(".")


def imports(path: str) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, by absolute name."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    package = module_name(path)
    if not path.endswith("__init__.py"):
        package = package.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from weft import tasks` imports a module of the package.
            yield from (
                f"{name}.{alias.name}" if name == "weft" and part_exists(alias.name) else name
                for alias in node.names
            )


def part_exists(name: str) -> bool:
    """Whether a name is a module at the top of the package."""
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


def parts_imported(path: str) -> set[str]:
    """The parts of weft that a file imports; "" is the package itself."""
    names = {name for name in imports(path) if name.split(".")[0] == "weft"}
    return {name.partition(".")[2].partition(".")[0] for name in names}


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in PARTS])
def test_imports_run_downward(path: str) -> None:
    assert parts_imported(path) <= set(PARTS[part(path)])


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in NO_METHODS])
def test_no_part_knows_a_method_by_name(path: str) -> None:
    # The package's root imports the methods, so it counts as one.
    assert not parts_imported(path) & {"methods", "registry", "cli", ""}


@pytest.mark.parametrize("path", [p for p in FILES if p != "__main__.py"])
def test_nobody_imports_the_command_line(path: str) -> None:
    assert part(path) == "cli" or "cli" not in parts_imported(path)


@pytest.mark.parametrize("path", [p for p in FILES if part(p) == "core"])
def test_the_core_needs_torch_only(path: str) -> None:
    outside = {name.split(".")[0] for name in imports(path)}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "weft"}


def calls(path: str, function: str) -> Iterator[ast.Call]:
    """All calls of a function by its bare name."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == function
        ):
            yield node


def layer_types(path: str) -> Iterator[str]:
    """Types of torch layers that a file asks for with isinstance or issubclass."""
    for function in ("isinstance", "issubclass"):
        for call in calls(path, function):
            for node in ast.walk(call.args[1]):
                if isinstance(node, ast.Attribute):
                    name = ast.unparse(node)
                    if name.startswith(("nn.", "torch.nn.")) and node.attr not in ALLOWED:
                        yield name


ALLOWED = {"Module", "Parameter"}


@pytest.mark.parametrize("path", [p for p in FILES if p != "core/sites.py"])
def test_layer_types_are_asked_for_in_one_file(path: str) -> None:
    assert not list(layer_types(path))


def test_the_one_file_is_seen_by_this_test() -> None:
    assert "nn.Embedding" in set(layer_types("core/sites.py"))


@pytest.mark.parametrize("path", FILES)
def test_nothing_is_decided_by_hasattr(path: str) -> None:
    assert not list(calls(path, "hasattr"))


@pytest.mark.parametrize("path", FILES)
def test_no_class_is_built_at_run_time(path: str) -> None:
    assert not [call for call in calls(path, "type") if len(call.args) > 1]


def test_public_names_exist_and_are_few() -> None:
    assert len(set(weft.__all__)) == len(weft.__all__)
    assert all(getattr(weft, name, None) is not None for name in weft.__all__)
    methods = set(weft.METHODS)
    assert len(set(weft.__all__) - methods) <= 40
