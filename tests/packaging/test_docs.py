"""The documents hold together: links, files, commands and recipes that they name are there."""

import itertools
import re
from pathlib import Path

import pytest

from polaformer_jax.cli import COMMANDS
from polaformer_jax.training import recipes
from tests.support import ROOT

PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in PAGES)]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")


def prose_of(path: Path) -> str:
    """The text of a document without blocks of code, and with the text of the documents that it includes."""
    text = path.read_text()
    included = re.findall(r"^```\{include\} (\S+)$", text, flags=re.MULTILINE)
    return "\n".join([FENCED.sub("", text), *(prose_of(path.parent / name) for name in included)])


def anchors_of(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and MyST make them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+?)\s*$", prose_of(path), flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # of a link, its text
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        number = found[slug] = found.get(slug, -1) + 1
        if number:
            found[f"{slug}-{number}"] = 0
    return set(found)


def test_anchors_are_those_of_github(tmp_path):
    (tmp_path / "other.md").write_text("# Included\n")
    text = (
        "# `a_b`: the C, [d](e.md)!\n```\n# comment\n```\n## Two  words\n## More\n## More\n```{include} other.md\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    assert anchors_of(tmp_path / "page.md") == {"a_b-the-c-d", "two--words", "more", "more-1", "included"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document):
    path = ROOT / document
    for target, anchor in LINK.findall(FENCED.sub("", path.read_text())):
        found = path.parent / target if target else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors_of(found), f"{target}#{anchor}: the headings are {sorted(anchors_of(found))}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_has_one_title_and_no_heading_skips_a_level(document):
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose_of(ROOT / document), flags=re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_exist(document):
    text = (ROOT / document).read_text()
    files = set(re.findall(r"`([\w/]+\.py)\b", text)) - {"main.py"}  # the official code's
    scripts = re.findall(r"python ([\w/]+\.py)", text)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m (polaformer_jax[\w.]+|tests[\w.]+)", text)]
    places = (ROOT, ROOT / "polaformer_jax", (ROOT / document).parent)
    for path in {*files, *scripts}:
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
