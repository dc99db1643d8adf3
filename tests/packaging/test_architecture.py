"""The structure of the package, as docs/architecture.md draws it: what may import what, and nothing in a circle."""

import ast
import graphlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    "export": {"inference", "analysis", "data", "weights", "models", "files", "config", "errors"},
    "benchmark": {"export", "training", "data", "weights", "models", "files", "hardware", "config", "errors"},
    "aot": {"training", "data", "models", "files", "hardware", "config", "errors"},
}
ALLOWED["cli"] = set(ALLOWED) | {"cli"}
# Processes of their own, which import as their users do.
OF_USERS = {"benchmark/start_worker.py", "benchmark/official_worker.py", "benchmark/onnx_worker.py"}


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


def test_nothing_private_is_imported_from_another_file():
    private = re.compile(r"(^|\.)_[a-z]", re.IGNORECASE)
    found = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        for name in names_of(node)
        if private.search(name)
    }
    assert found == set()


def names_of(node: ast.AST) -> list[str]:
    """What an import statement names, in full; nothing for any other node."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {canonicalize_name(Requirement(text).name) for texts in lists for text in texts}


def undeclared(trees: dict[str, ast.AST], known: set[str]) -> set[str]:
    """Imports of distributions that are not in the list, or of none."""
    providers, found = importlib.metadata.packages_distributions(), set()
    for module, tree in trees.items():
        for name in (name for node in ast.walk(tree) for name in names_of(node)):
            top = name.split(".")[0]
            if top == "polaformer_jax" or top in sys.stdlib_module_names:
                continue
            if not {canonicalize_name(name) for name in providers.get(top, [top])} & known:  # [top]: not installed here
                found.add(f"{module} imports {name}")
    return found


def test_every_dependency_is_declared():
    trees = {
        module: ast.parse(path.read_text())
        for module, path in MODULES.items()
        if module != "polaformer_jax.benchmark.official_worker"  # runs the official code, with its own dependencies
    }
    wrong = undeclared(trees, declared("train", "test", "tpu", "onnx"))
    assert wrong == {"polaformer_jax.benchmark.input imports torch"}  # if it is there, beside the official code


def test_prediction_and_conversion_need_only_declared_base_dependencies():
    """What they import at once: imports inside functions are those of other uses, such as TensorFlow's by data."""
    pending, trees = ["polaformer_jax.cli.predict", "polaformer_jax.cli.convert", "polaformer_jax.inference"], {}
    pending += [module for module in MODULES if re.match(r"polaformer_jax\.(models|weights|inference)\.", module)]
    while pending:
        module = pending.pop()
        if module in trees:
            continue
        tree = ast.parse(MODULES[module].read_text())
        if ".cli.predict" not in module and ".cli.convert" not in module:
            tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
        trees[module] = tree
        for name in (name for node in ast.walk(tree) for name in names_of(node)):
            pending += [found for found in (name, name.rpartition(".")[0]) if found in MODULES]
    assert "polaformer_jax.training.progress" in trees and len(trees) > 30
    assert undeclared(trees, declared()) == set()


def test_files_are_neither_long_nor_hidden_in_the_configs():
    long = [str(path) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 350]
    assert long == []
    for path in (ROOT / "configs").iterdir():
        if path.name != "__pycache__":
            assert "def get_config(" in path.read_text(), f"{path} is not a recipe"


@pytest.mark.parametrize("part", sorted(set(ALLOWED) - {"errors", "config"}))
def test_the_page_of_the_architecture_names_every_part(part):
    assert f"`{part}/" in (ROOT / "docs/architecture.md").read_text()
