"""Rows of a CSV file that are instances of a dataclass, and what a row says of a finished training."""

import csv
import dataclasses
import io
import json
import statistics
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

import ml_collections
from etils import epath

from polaformer_jax.config import NOT_IDENTITY, ON_FAULTS
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, paths
from polaformer_jax.training import recipes
from polaformer_jax.training.workdir import changed_fields

Row = TypeVar("Row")
# Fields that change no result. What a run does about faults may change one, though it may change when a run resumes.
_WITHOUT_EFFECT = tuple(field for field in NOT_IDENTITY if field not in ON_FAULTS)
_BOOLEANS = {"True": True, "False": False}


def columns(kind: type[Row]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def read(path: epath.PathLike, kind: type[Row]) -> list[Row]:
    """The rows of a CSV file; a UserError names the line that is not a valid row."""
    lines = csv.reader(paths.given(path).read_text().splitlines())
    header, expected = tuple(next(lines, ())), columns(kind)
    if header != expected:
        raise UserError(f"{path} begins with {','.join(header)}, expected {','.join(expected)}")
    parsers = {name: _parser(annotation) for name, annotation in get_type_hints(kind).items()}
    rows = []
    for number, cells in enumerate(lines, 2):
        try:
            cell = dict(zip(expected, cells, strict=True))
            rows.append(kind(**{name: parsers[name](text) for name, text in cell.items()}))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return rows


def _parser(annotation: Any) -> Callable[[str], Any]:
    """From the text of a cell to its value; an empty cell is None where the type allows it."""
    if isinstance(annotation, types.UnionType):
        (inner,) = (part for part in annotation.__args__ if part is not type(None))
        parse = _parser(inner)
        return lambda text: parse(text) if text else None
    return _boolean if annotation is bool else annotation


def _boolean(text: str) -> bool:
    if text not in _BOOLEANS:
        raise ValueError(f"{text!r}: expected True or False")
    return _BOOLEANS[text]


def append(path: epath.PathLike, row: Any) -> bool:
    """Appends a row to the file, which is created if necessary; returns False if the file already has this row."""
    path = paths.given(path)
    rows = read(path, type(row)) if path.exists() else []
    if row in rows:
        return False
    write(path, [*rows, row])
    return True


def write(path: epath.PathLike, rows: Iterable[Any]) -> None:
    """Writes at least one row, with a head, completely or not at all."""
    rows = list(rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns(type(rows[0])), *map(dataclasses.astuple, rows)])
    with atomic.reported("table", path):
        atomic.write(path, text.getvalue())


def cells(row: Any) -> list[str]:
    """The values of a row as text, as a table shows them."""
    return [
        "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        for value in dataclasses.astuple(row)
    ]


def finished(workdir: epath.Path, config: ml_collections.ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """`training.json` and `eval.json` of a finished training, which name its steps, seconds, hardware and result.

    Raises:
        UserError: it is not finished, or the last evaluation was not that of its own weights on the split that its
            result is reported on.
    """
    training = _json(workdir / "training.json", ("steps", "seconds", "hardware", "commit"))
    result = _json(workdir / "eval.json", ("accuracy", "loss", "step"))
    wanted = config.data.test_split or config.data.eval_split
    if result.get("split") != wanted or result.get("kind") != config.eval.weights or "origin" not in result:
        raise UserError(
            f"{workdir}/eval.json is of {result.get('kind')} weights on the split {result.get('split')!r}"
            f" from {result.get('origin')}, expected {config.eval.weights} on {wanted!r}, and where its data came"
            " from: run `polaformer eval` on this work directory"
        )
    if training["seconds"] is None:
        raise UserError(
            f"{workdir}/training.json has no seconds, for the run's event files were removed before its end"
        )
    return training, result


def _json(path: epath.Path, names: Sequence[str]) -> dict[str, Any]:
    """The content of a JSON file that has these entries."""
    if not path.exists():
        raise UserError(f"{path} does not exist: expected the work directory of a finished training")
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} has no {', '.join(missing)}: evaluate this work directory, or train in it, again")
    return found


def changes(config: ml_collections.ConfigDict, recipe: str) -> str:
    """The fields in which a run differs from a recipe, as the command line takes them."""
    changed = changed_fields(recipes.load(recipe), config, but=_WITHOUT_EFFECT)
    return " ".join(f"{field}={value}" for field, (_, value) in changed.items())


def accuracy(rows: Sequence[Any]) -> str:
    """The mean of the rows' accuracies, with their standard deviation if there are at least two."""
    values = [row.accuracy for row in rows]
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
