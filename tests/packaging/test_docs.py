"""The documents hold together: the notebook is its script's, and what they point at is there."""

import json
import re

import pytest

from polaformer_jax.cli import COMMANDS
from polaformer_jax.training import recipes
from tests.support import ROOT


def test_the_notebook_is_that_of_its_script():
    """`make docs` builds it; a script that was changed since has other code."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    built = ["".join(cell["source"]) for cell in cells]
    parts = re.split(r"^# %%(?: \[markdown\])?\n", (ROOT / "docs/quickstart.py").read_text(), flags=re.MULTILINE)
    script = [re.sub(r"^# ?", "", part, flags=re.MULTILINE) if part.startswith("# ") else part for part in parts[1:]]
    assert [text.strip() for text in built] == [text.strip() for text in script]


def test_the_notebook_was_executed_without_an_error():
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]


DOCUMENTS = ["README.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    files = set(re.findall(r"`([\w/]+\.py)\b", text)) - {"main.py"}  # the official code's
    scripts = re.findall(r"python ([\w/]+\.py)", text)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m (polaformer_jax[\w.]+|tests[\w.]+)", text)]
    places = (ROOT, ROOT / "polaformer_jax", (ROOT / document).parent)
    for path in {*links, *files, *scripts}:
        assert any((place / path).exists() for place in places), path
    for path in set(modules):
        assert (ROOT / f"{path}.py").exists() or (ROOT / path / "__main__.py").exists(), path
    assert not re.findall(r"\b(TODO|FIXME|[A-Z]+_SECTION)\b", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_recipes_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    commands = re.findall(r"(?:^|[`/ ])polaformer ([a-z][\w-]*)(?= |$|`)", text, flags=re.MULTILINE)
    assert set(commands) <= set(COMMANDS), set(commands) - set(COMMANDS)
    placeholders = ("mine.py:t", "NAME")
    for words in set(re.findall(r"--config ([\w/.:,=]+)", text)) - set(placeholders):
        path, _ = recipes.find(words)
        assert path.parent == ROOT / "configs"
