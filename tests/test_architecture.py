"""Imports between the folders of the package run one way; no module imports itself in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a folder may import from those on the lines above it
FLOORS = (
    ("lazy", "cli", "kernels"),
    ("backends",),
    ("objective",),
    ("loss",),
    ("linear",),
    ("integrations", "verify", "inspect", "trainer"),
    ("runs",),
    ("__init__", "train", "reinforce", "compare", "recipes", "plot", "show"),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
# they belong to type checkers, or to the lazily imported public names
EXEMPT = {"grpo_core", "grpo_core.trainer"}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    for file in (ROOT / "kernels").glob("*.py") if package == "grpo_core" else ():
        found[f"grpo_core.kernels.{file.stem}"] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that one imports, at its head or in a function; not those for type checkers alone."""
    tree = ast.parse(file.read_text("utf-8"))
    typed = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typed:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield inner if inner in known else base


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_folders_import_downward() -> None:
    known = modules("grpo_core")
    assert {folder(module) for module in known} == FLOOR.keys()
    upward = [
        f"{module} imports {other}"
        for module, file in known.items()
        for other in imports(module, file, known)
        if other not in EXEMPT
        and folder(other) != folder(module)
        and FLOOR[folder(other)] >= FLOOR[folder(module)]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("package", ["grpo_core", "bench"])
def test_no_circle(package: str) -> None:
    known = modules(package)
    graph = {
        module: {other for other in imports(module, file, known) if other not in EXEMPT}
        for module, file in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_folder_says_what_it_is_for() -> None:
    for name in ("grpo_core", *(f"grpo_core.{one}" for one in FLOOR)):
        file = modules("grpo_core").get(name)
        if file is not None and file.name == "__init__.py":
            said = ast.get_docstring(ast.parse(file.read_text("utf-8")))
            assert said and len(said.splitlines()) <= 12, name
