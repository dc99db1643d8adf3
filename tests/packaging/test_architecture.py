"""The structure of the package, as docs/architecture.md draws it: what may import what, and nothing in a circle."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "polaformer_jax"
# What each part may import, besides itself. The top of the package, `polaformer_jax`, is the public API.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "hardware": set(),
    "models": {"config", "errors"},
    "weights": {"models", "files", "errors"},
    "data": {"files", "config", "errors"},
    "training": {"data", "weights", "models", "files", "hardware", "config", "errors"},
    "analysis": {"training", "data", "weights", "models", "files", "config", "errors"},
    "inference": {"analysis", "data", "weights", "models", "files", "errors"},
    "benchmark": {"training", "data", "weights", "models", "files", "hardware", "config", "errors"},
    "aot": {"training", "data", "models", "files", "hardware", "config", "errors"},
}
ALLOWED["cli"] = set(ALLOWED) | {"cli"}
# Processes of their own, which import as their users do.
OF_USERS = {"benchmark/start_worker.py", "benchmark/official_worker.py"}


def modules() -> dict[str, Path]:
    """The files of the package by module name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; of this package down to the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def part_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("part", ALLOWED)
def test_no_import_runs_up(part):
    wrong = []
    for module, path in MODULES.items():
        if module == "polaformer_jax" or part_of(module) != part or str(path.relative_to(PACKAGE)) in OF_USERS:
            continue
        for name in imported(path):
            if name == "polaformer_jax":
                # `import polaformer_jax` for its location alone, and the public API for the command line
                if part not in ("cli", "training"):
                    wrong.append(f"{module} imports the public API")
            elif name.startswith("polaformer_jax.") and part_of(name) not in ALLOWED[part] | {part}:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_imports_go_in_a_circle():
    graph = {
        module: {name for name in imported(path) if name in MODULES and name not in (module, "polaformer_jax")}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_part_is_in_the_table_and_nothing_else_is_at_the_top():
    at_the_top = {path.name for path in PACKAGE.iterdir() if path.is_file() or any(path.rglob("*.py"))}
    folders = set(ALLOWED) - {"errors", "config"}
    assert at_the_top == {"__init__.py", "config.py", "errors.py", "py.typed", *folders}


def test_no_private_module_of_another_package_is_imported():
    private = re.compile(r"(^|\.)_[a-z]")
    found = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imported(path)
        if private.search(name)
    }
    assert found == set()


def test_files_are_neither_long_nor_hidden_in_the_configs():
    long = [str(path) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 350]
    assert long == []
    for path in (ROOT / "configs").iterdir():
        if path.name != "__pycache__":
            assert "def get_config(" in path.read_text(), f"{path} is not a recipe"


@pytest.mark.parametrize("part", sorted(set(ALLOWED) - {"errors", "config"}))
def test_the_page_of_the_architecture_names_every_part(part):
    assert f"`{part}/" in (ROOT / "docs/architecture.md").read_text()
