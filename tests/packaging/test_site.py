"""The documentation site: it builds without a warning, and every link inside it leads somewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page of HTML refers to, and what in it can be referred to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []  # of people and of the browser
        self.loaded: list[str] = []  # of the browser alone: scripts, styles, pictures
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        target = values.get("src", values.get("href"))
        if target is not None:
            self.links.append(target)
            if tag != "a":
                self.loaded.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(folder / "html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    """All but the theme's own templates."""
    paths = [path for path in site.rglob("*.html") if path.relative_to(site).parts[0] != "_static"]
    return {path: Page(path) for path in paths}


def test_it_can_be_searched(site):
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    assert all(word in index for word in ("polaformer_jax.create_model", "checkpoint", "layer_decay"))


def test_every_page_is_reached_from_the_index(site, pages):
    reached, pending = set(), [site / "index.html"]
    while pending:
        page = pending.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / unquote(urlsplit(link).path)).resolve() for link in pages[page].links]
        pending += [target for target in targets if target in pages]
    sources = [path for pattern in ("*.md", "*.ipynb", "api/*.md") for path in (ROOT / "docs").glob(pattern)]
    expected = {site / path.relative_to(ROOT / "docs").with_suffix(".html") for path in sources}
    assert len(expected) > 20
    assert expected - reached == set()


def test_every_link_inside_it_leads_to_a_file_and_an_anchor(pages):
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            known = pages[target].anchors if target in pages else set()
            if not target.exists() or (anchor and target in pages and anchor not in known):
                wrong.append(f"{path.name}: {link}")
    assert wrong == []


def test_it_loads_nothing_from_elsewhere(pages):
    found = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert found == set()
