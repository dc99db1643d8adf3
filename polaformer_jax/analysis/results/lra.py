"""The results on the Long Range Arena: a row for each run, and the table of them."""

import dataclasses
import statistics
from collections.abc import Sequence

import ml_collections
from etils import epath

from polaformer_jax.analysis.results import rows as results
from polaformer_jax.config import ATTENTIONS
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.models.pola_sequence import PolaSequenceConfig
from polaformer_jax.training.workdir import read_config

TITLES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "pathfinder": "Pathfinder",
    "image_lra": "Image",
    "listops_short": "ListOps of up to 255 symbols",
}
# From the paper, in %; softmax attention as measured with the same code as the others (see configs/lra.py).
_ARENA = ("listops", "text", "retrieval", "pathfinder", "image_lra")
PUBLISHED = {
    ("polarity", 3.0): dict(zip(_ARENA, (37.35, 73.06, 80.50, 70.53, 42.15), strict=True)),
    ("polarity", 5.0): dict(zip(_ARENA, (38.76, 72.33, 80.37, 68.98, 41.91), strict=True)),
    ("polarity", 7.0): dict(zip(_ARENA, (37.60, 71.93, 81.47, 69.09, 42.77), strict=True)),
    ("softmax", None): dict(zip(_ARENA, (38.37, 61.95, 80.69, 65.26, 40.57), strict=True)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: the test accuracy of the checkpoint that dev accuracy chose.

    Attributes:
        tokenisation: empty where a task has only one.
        alpha: None where the attention has none.
        accuracy: in %.
        time: of the training steps, in seconds.
        commit: of the code that trained, followed by a plus if files had been changed since.
        data: where the data came from.
        changes: the fields of the config that differ from those of `configs/lra.py`, as the command line takes them.
    """

    task: str
    tokenisation: str
    attention: str
    alpha: float | None
    seed: int
    steps: int
    accuracy: float
    time: float
    hardware: str
    commit: str
    data: str
    changes: str

    def __post_init__(self):
        if self.task not in TITLES:
            raise ValueError(f"task {self.task!r}, expected one of {', '.join(TITLES)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention {self.attention!r}, expected one of {', '.join(ATTENTIONS)}")


def row_of(workdir: epath.PathLike) -> Row:
    """The result of a finished training in its work directory.

    Raises:
        UserError: it is not a training of a Long Range Arena task; or see `rows.finished`.
    """
    workdir = paths.given(workdir, "workdir")
    config = read_config(workdir)
    task = config.task
    if task.name not in TITLES:
        raise UserError(
            f"{workdir} is a training of the task {task.name}, expected one of {', '.join(TITLES)}, or of the recipe"
            " fashion_mnist"
        )
    training, result = results.finished(workdir, config)
    return Row(
        task=task.name,
        tokenisation=task.tokenisation or "",
        attention=config.model.attention,
        alpha=_alpha(config),
        seed=config.seed,
        steps=training["steps"],
        accuracy=round(100 * result["accuracy"], 2),
        time=training["seconds"],
        hardware=training["hardware"],
        commit=training["commit"],
        data=result["origin"],
        changes=_changes(config),
    )


def _alpha(config: ml_collections.ConfigDict) -> float | None:
    if config.model.attention != "polarity":
        return None
    return PolaSequenceConfig.alpha if config.model.alpha is None else float(config.model.alpha)


def _changes(config: ml_collections.ConfigDict) -> str:
    """The changes to the task's recipe, other than the options that have a column of their own."""
    names = ("attention", "tokenisation", "alpha")
    given = {"seed": config.seed, "steps": config.train.steps}
    given |= dict(zip(names, (config.model.attention, config.task.tokenisation, _alpha(config)), strict=True))
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    return results.changes(config, "lra:" + ",".join([config.task.name, *options]))


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown: a line for each published figure (dashes where nothing was run) and each other setting.

    Runs that differ only in the seed are one line: their mean, with the standard deviation if there are at least two.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        settings = "; ".join(filter(None, (row.data, row.changes)))
        key = (row.task, row.tokenisation, row.attention, row.alpha, row.steps, row.hardware, settings)
        groups.setdefault(key, []).append(row)
    lines = [
        "| task | attention | published | ours | steps | seeds | training | hardware | data; what was changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TITLES:
        measured = {key[1:]: found for key, found in groups.items() if key[0] == task}
        published = {kind: figures[task] for kind, figures in PUBLISHED.items() if task in figures}
        kinds = {(_published_tokenisation(task), *kind) for kind in published} | {key[:3] for key in measured}
        for tokenisation, attention, alpha in sorted(kinds, key=_order):
            wanted = (tokenisation, attention, alpha)
            of_kind = [(key[3:], found) for key, found in measured.items() if key[:3] == wanted]
            same = tokenisation == _published_tokenisation(task)
            theirs = published.get((attention, alpha)) if same else None
            theirs = "–" if theirs is None else f"{theirs:.2f}"
            name = f"{TITLES[task]}, {tokenisation.replace('_', ' ')}" if tokenisation else TITLES[task]
            kind = f"{attention}, α = {alpha:g}" if alpha is not None else attention
            for (steps, hardware, settings), found in sorted(of_kind, key=lambda item: item[0]):
                seconds = statistics.mean(row.time for row in found)
                cells = (theirs, results.accuracy(found), f"{steps:,}", len(found), _time(seconds), hardware, settings)
                lines.append(f"| {name} | {kind} | {' | '.join(map(str, cells))} |")
            if not of_kind:
                lines.append(f"| {name} | {kind} | {theirs} | – | – | – | – | – | – |")
    return "\n".join(lines)


def _published_tokenisation(task: str) -> str:
    return "no_brackets" if task == "listops" else ""


def _order(kind: tuple[str, str, float | None]) -> tuple:
    tokenisation, attention, alpha = kind
    return tokenisation == "brackets", ATTENTIONS.index(attention), alpha or 0


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
