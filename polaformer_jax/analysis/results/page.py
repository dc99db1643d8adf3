"""The parts of the documentation that are made from the files of results: tables in pages, and pictures."""

from collections.abc import Callable
from typing import NamedTuple

from etils import epath
from matplotlib.figure import Figure

from polaformer_jax.analysis.results import entropy, images, lra, rows
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, figures, paths
from polaformer_jax.training.workdir import read_config

LRA, IMAGES, STEPS = "lra.csv", "attention_images.csv", "attention_steps.csv"
ENTROPY_LISTOPS, ENTROPY_IMAGES = "entropy_listops_short.csv", "entropy_images.csv"


def begin(name: str) -> str:
    return f"<!-- begin of the table {name}, which `polaformer results page` writes -->"


def end(name: str) -> str:
    return f"<!-- end of the table {name} -->"


class Table(NamedTuple):
    """A table of a page, and how it is made from the folder of results."""

    name: str
    page: str
    make: Callable[[epath.Path], str]


def _read(folder: epath.Path, name: str, kind: type) -> list:
    path = folder / name
    return rows.read(path, kind) if path.exists() else []


TABLES = (
    Table("lra", "long_range_arena.md", lambda folder: lra.table(_read(folder, LRA, lra.Row))),
    Table(
        "attention_images",
        "comparison.md",
        lambda folder: images.table(_read(folder, IMAGES, images.Row), _read(folder, STEPS, images.Step)),
    ),
)


def _entropies(folder: epath.Path, model: str) -> list[entropy.Row]:
    """Of one run of polarity with alpha 4, relu and softmax, with all parts; those of the first seed."""
    wanted = [str(images.Variant(attention, alpha, True, True)) for attention, alpha in images.ATTENTIONS_COMPARED]
    found = [row for row in _read(folder, ENTROPY_IMAGES, entropy.Row) if row.model == model and row.variant in wanted]
    first = min((row.seed for row in found), default=0)
    return sorted((row for row in found if row.seed == first), key=lambda row: wanted.index(row.variant))


# Pictures of the documentation, and how they are made from the folder of results.
PICTURES: dict[str, Callable[[epath.Path], Figure]] = {
    "pictures/comparison.svg": lambda folder: images.draw(_read(folder, IMAGES, images.Row)),
    "pictures/entropy.png": lambda folder: entropy.draw(_read(folder, ENTROPY_LISTOPS, entropy.Row)),
    "pictures/entropy_pvt.svg": lambda folder: entropy.draw(_entropies(folder, "pola_pvt_nano")),
    "pictures/entropy_swin.svg": lambda folder: entropy.draw(_entropies(folder, "pola_swin_nano")),
    "pictures/sharpness.svg": lambda folder: entropy.draw_sharpness(
        _read(folder, ENTROPY_IMAGES, entropy.Row), images.MODELS
    ),
}


def add(workdir: epath.PathLike, folder: epath.PathLike) -> tuple[epath.Path, object, bool]:
    """Adds the result of a finished training: the file, the row, and whether it is new there.

    Raises:
        UserError: it is no finished training of a task whose results are collected, or the file is damaged.
    """
    folder = paths.given(folder, "dir")
    kind, name = (images, IMAGES) if images.is_compared(read_config(workdir)) else (lra, LRA)
    row = kind.row_of(workdir)
    return folder / name, row, rows.append(folder / name, row)


def tables(folder: epath.PathLike) -> dict[str, str]:
    """The tables in Markdown, by name; a UserError if the folder does not exist."""
    folder = paths.given(folder, "dir")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: expected the folder of the results", argument="dir")
    return {table.name: table.make(folder) for table in TABLES}


def write(docs: epath.PathLike, folder: epath.PathLike) -> list[epath.Path]:
    """Writes all tables and pictures of the documentation again; returns the files.

    Raises:
        UserError: the folder or a page is missing, or a page has no place for its table.
    """
    docs, folder = paths.given(docs, "docs"), paths.given(folder, "dir")
    made = tables(folder)
    contents: dict[epath.Path, str] = {}
    for table in TABLES:
        path = docs / table.page
        if path not in contents and not path.exists():
            raise UserError(f"{path} does not exist: expected the documentation's page of the table {table.name}")
        contents[path] = with_table(contents.get(path) or path.read_text(), table.name, made[table.name])
    for path, content in contents.items():
        atomic.write(path, content)
    for name, draw in PICTURES.items():
        atomic.make_folder((docs / name).parent)
        figures.save(draw(folder), docs / name)
    return [*contents, *(docs / name for name in PICTURES)]


def with_table(page: str, name: str, table: str) -> str:
    """The text of a page with one of its tables replaced; a UserError if it has no place for it."""
    before, found, rest = page.partition(begin(name))
    _, closed, after = rest.partition(end(name))
    if not found or not closed:
        raise UserError(f"no place for the table: expected the two lines that enclose it\n{begin(name)}\n{end(name)}")
    return f"{before}{begin(name)}\n\n{table}\n\n{end(name)}{after}"
