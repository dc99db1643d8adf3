"""The comparison of attentions on images: a row for each run, a table with time and memory of a step, and a picture."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from etils import epath
from matplotlib.figure import Figure

from polaformer_jax.analysis.results import rows as results
from polaformer_jax.config import ATTENTIONS
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, paths
from polaformer_jax.models import registry
from polaformer_jax.models.batch_norm import parameter_count
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.training import recipes
from polaformer_jax.training.tasks.images import architecture
from polaformer_jax.training.workdir import read_config

RECIPES = {"fashion_mnist": "Fashion-MNIST"}  # data sets whose recipe, of the same name, compares attentions
MODELS = {"pola_pvt_nano": "Pola-PVT", "pola_swin_nano": "Pola-Swin"}


class Variant(NamedTuple):
    """What linear blocks compute, see `models.token_attention`; alpha is None where the attention has none."""

    attention: str
    alpha: float | None
    convolution: bool
    gate: bool

    def __str__(self) -> str:
        name = self.attention if self.alpha is None else f"{self.attention}, α = {self.alpha:g}"
        missing = [part for part in ("convolution", "gate") if not getattr(self, part)]
        return f"{name}, no {' or '.join(missing)}" if missing else name


# The lines of the table and of the picture, in this order.
ATTENTIONS_COMPARED = (("polarity", 4.0), ("relu", None), ("softmax", None))  # with their alphas
VARIANTS = (
    *(Variant("polarity", alpha, True, True) for alpha in (4.0, 1.0, 0.0)),
    *(Variant(attention, None, True, True) for attention in ("relu", "softmax")),
    *(Variant(*attention, False, True) for attention in ATTENTIONS_COMPARED),
    *(Variant(*attention, True, False) for attention in ATTENTIONS_COMPARED),
    *(Variant(*attention, False, False) for attention in ATTENTIONS_COMPARED),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: the test accuracy of its last weights.

    Attributes:
        data: of the recipe.
        model: its name.
        attention, alpha, convolution, gate: see `Variant`.
        parameters: number of trained values.
        accuracy: in %.
        loss: mean cross-entropy of the test examples.
        time: of the training steps, in seconds.
        commit: of the code that trained, followed by a plus if files had been changed since.
        origin: where the data came from.
        changes: the fields of the config that differ from those of the recipe, as the command line takes them.
    """

    data: str
    model: str
    attention: str
    alpha: float | None
    convolution: bool
    gate: bool
    parameters: int
    seed: int
    steps: int
    accuracy: float
    loss: float
    time: float
    hardware: str
    commit: str
    origin: str
    changes: str

    def __post_init__(self):
        if self.data not in RECIPES or self.model not in MODELS:
            raise ValueError(
                f"model {self.model!r} on {self.data!r}, expected {', '.join(MODELS)} on {', '.join(RECIPES)}"
            )
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention {self.attention!r}, expected one of {', '.join(ATTENTIONS)}")

    @property
    def setting(self) -> tuple[str, int, str]:
        """What must be equal for accuracies to be averaged: data, steps, and changes to the recipe."""
        return self.data, self.steps, self.changes

    @property
    def variant(self) -> Variant:
        return Variant(self.attention, self.alpha, self.convolution, self.gate)


@dataclasses.dataclass(frozen=True)
class Step:
    """Time and memory of one training step of a recipe, as `polaformer benchmark recipes` writes them.

    Attributes:
        config: the recipe, with its options.
        batch: examples of a step.
        parameters: number of trained values.
        step_ms, step_ms_least, step_ms_greatest: milliseconds; the first is the median.
        calls: number of steps that were timed.
        memory_mib: MiB that the step needs, by the compiler.
        hardware: on which it was measured.
    """

    config: str
    batch: int
    parameters: int
    step_ms: float
    step_ms_least: float
    step_ms_greatest: float
    calls: int
    memory_mib: float
    hardware: str

    def place(self) -> tuple[str, Variant]:
        """The model and the variant.

        Raises:
            UserError: there is no such recipe, or it compares no attentions.
        """
        config = recipes.load(self.config)
        if not is_compared(config):
            raise UserError(f"recipe {self.config!r}: expected one of {', '.join(RECIPES)}")
        return config.model.name, variant_of(_model_config(config))


def is_compared(config: ml_collections.ConfigDict) -> bool:
    """Whether a run is one of this comparison."""
    return config.task.name == "image" and config.data.name in RECIPES and config.model.name in MODELS


def row_of(workdir: epath.PathLike) -> Row:
    """The result of a finished training in its work directory.

    Raises:
        UserError: it is not a training of a recipe that compares attentions, its weights were not those of the last
            step; or see `rows.finished`.
    """
    workdir = paths.given(workdir, "workdir")
    config = read_config(workdir)
    if not is_compared(config):
        raise UserError(
            f"{workdir} trained {config.model.name} on {config.data.name}, expected {' or '.join(MODELS)} on"
            f" {' or '.join(RECIPES)}: see the recipes of these names"
        )
    training, result = results.finished(workdir, config)
    if result["step"] != training["steps"]:
        raise UserError(
            f"{workdir}/eval.json is of step {result['step']} of {training['steps']}: checkpoints were chosen by test"
            " accuracy, and the results compare last weights. Run `polaformer eval --checkpoint latest` on it"
        )
    model = _model_config(config)
    variant = variant_of(model)
    return Row(
        data=config.data.name,
        model=config.model.name,
        **variant._asdict(),
        parameters=parameter_count(registry.create_abstract(model)),
        seed=config.seed,
        steps=training["steps"],
        accuracy=round(100 * result["accuracy"], 2),
        loss=round(result["loss"], 4),
        time=training["seconds"],
        hardware=training["hardware"],
        commit=training["commit"],
        origin=result["origin"],
        changes=results.changes(config, recipe_of(config, variant)),
    )


def _model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    fields = config.model
    return registry.model_config(
        fields.name, num_classes=fields.num_classes, img_size=fields.img_size, **architecture(fields)
    )


def variant_of(model: ModelConfig) -> Variant:
    alpha = model.alpha if model.attention == "polarity" else None
    return Variant(model.attention, alpha, model.convolution, model.gate)


def recipe_of(config: ml_collections.ConfigDict, variant: Variant) -> str:
    """The recipe, with the options that choose a variant, seed and number of steps."""
    options = {name: value for name, value in variant._asdict().items() if value is not None}
    options |= {"seed": config.seed, "steps": config.train.steps}
    name = config.model.name.removeprefix("pola_").removesuffix("_nano")
    return f"{config.data.name}:{','.join([name, *(f'{key}={value}' for key, value in options.items())])}"


def table(rows: Sequence[Row], steps: Sequence[Step]) -> str:
    """The table in Markdown: a line for each model and variant, dashes where nothing was run; then any other settings.

    Runs that differ only in the seed and the hardware are one line: their mean, with the standard deviation if there
    are at least two. Time and memory are those of the recipe as it is.

    Raises:
        UserError: a step is not one of a recipe that compares attentions.
    """
    costs = {step.place(): step for step in steps}
    lines = [
        "| model | attention | parameters | test accuracy, % | seeds | steps | ms per step | memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, title in MODELS.items():
        of_model = [row for row in rows if row.model == model]
        others = {row.variant for row in of_model} - set(VARIANTS)
        for variant in (*VARIANTS, *sorted(others, key=str)):
            found = [row for row in of_model if row.variant == variant]
            cost = costs.get((model, variant))
            for setting in sorted({row.setting for row in found}) or [None]:
                same = [row for row in found if row.setting == setting]
                changed = same[0].changes if same else ""
                cells = [title, f"{variant}; {changed}" if changed else str(variant)]
                if same:
                    cells += [f"{same[0].parameters:,}", results.accuracy(same), str(len(same)), f"{same[0].steps:,}"]
                else:
                    cells += ["–" if cost is None else f"{cost.parameters:,}", "–", "–", "–"]
                measured = cost is not None and not changed
                cells += [f"{cost.step_ms:.0f}", f"{cost.memory_mib:.0f}"] if measured else ["–", "–"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each model: for each variant a mark for each seed's accuracy, and a line at their mean.

    Of the runs of the unchanged recipe with the number of steps that most of them have.
    """
    plain = [row for row in rows if not row.changes]
    common = statistics.mode(row.setting for row in plain) if plain else None
    rows = [row for row in plain if row.setting == common]
    figure = figures.new(10.5, 0.9 + 0.36 * len(VARIANTS))
    panels = figure.subplots(1, len(MODELS), sharey=True)
    panels[0].invert_yaxis()  # of all panels, which share it
    for axes, (model, title) in zip(panels, MODELS.items(), strict=True):
        for place, variant in enumerate(VARIANTS):
            values = [row.accuracy for row in rows if (row.model, row.variant) == (model, variant)]
            colour = figures.ATTENTION_COLOURS[variant.attention]
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=5.5, alpha=0.75, markeredgewidth=0)
            if values:
                mean = sum(values) / len(values)
                axes.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, linewidth=2)
        figures.tidy(axes)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("test accuracy, %")
        axes.set_yticks(range(len(VARIANTS)), [str(variant) for variant in VARIANTS])
    return figure
