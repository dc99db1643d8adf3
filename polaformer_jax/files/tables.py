"""Tables of measurements: text in aligned columns, and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from polaformer_jax.files import atomic


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Rows under a head, the first `left` columns aligned to the left and the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if index < left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None, form: str) -> str:
    """The value in this format; a dash for None."""
    return "-" if value is None else format(value, form)


def check_csv(path: epath.PathLike | None, argument: str = "csv") -> None:
    """Raises a UserError, before any work, if a table, named by `argument`, cannot be written; None: none will be."""
    if path is not None:
        atomic.check_target(path, "table", argument=argument)


def write_csv(path: epath.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes rows that have the same keys, completely or not at all; None is an empty cell.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic.reported("table", path):
        atomic.write(path, text.getvalue())
