"""Time and memory of the training step of recipes for image classification, taking turns.

    polaformer benchmark recipes fashion_mnist:pvt fashion_mnist:pvt,attention=softmax --csv steps.csv

The step is the recipe's own, with its batch and all its work on the device; images are random.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import jax
from tqdm import tqdm

from polaformer_jax.benchmark import options, programs
from polaformer_jax.benchmark.ours import training_step
from polaformer_jax.benchmark.timing import Timing, seconds_of, take_turns, warm
from polaformer_jax.errors import UserError
from polaformer_jax.files import tables
from polaformer_jax.training import recipes
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.workdir import hardware

_EXAMPLES = 60_000  # of the data, which set the length of a schedule in epochs and nothing that is measured
_MIB = 2**20


class Row(NamedTuple):
    """A recipe, its number of trained values and examples of a step, its compiled step, and seconds of a step."""

    config: str
    parameters: int
    batch: int
    program: programs.Program
    timing: Timing

    def record(self) -> dict[str, object]:
        """The row of a CSV file."""
        timing = self.timing
        return {
            "config": self.config,
            "batch": self.batch,
            "parameters": self.parameters,
            "step_ms": f"{1e3 * timing.median:.2f}",
            "step_ms_least": f"{1e3 * timing.least:.2f}",
            "step_ms_greatest": f"{1e3 * timing.greatest:.2f}",
            "calls": timing.calls,
            "memory_mib": f"{self.program.memory / _MIB:.1f}",
            "hardware": hardware(1),
        }


def experiment(text: str) -> Experiment:
    """The training of a recipe on the first device.

    Raises:
        UserError: there is no such recipe, it is not one of image classification, or it cannot be built.
    """
    config = recipes.load(text)
    if config.task.name != "image" or config.model.num_classes is None:
        raise UserError(
            f"config {text!r} is of the task {config.task.name} with {config.model.num_classes} classes: expected image"
            " classification with a number of classes"
        )
    made = Experiment(config, devices=jax.devices()[:1], num_examples=_EXAMPLES)
    made.check_batch()
    return made


def measure(texts: Sequence[str], *, calls: int, seconds: float) -> list[Row]:
    """The rows of recipes, in their order; see `take_turns`."""
    made = {text: experiment(text) for text in dict.fromkeys(texts)}  # what cannot be built is found before any work
    compiled, runs = {}, {}
    for text in tqdm(made, desc="compiling", unit="recipe", disable=None, leave=False):
        compiled[text], runs[text] = _step(made[text])
    with tqdm(total=calls * len(made), desc="measuring", unit="turn", disable=None, leave=False) as bar:
        timings = take_turns(runs, calls=calls, seconds=seconds, after_turn=bar.update)
    return [
        Row(text, one.parameter_count, one.config.train.batch_size, compiled[text], timings[text])
        for text, one in made.items()
    ]


def _step(made: Experiment):
    """The compiled step, and a function that runs it once and returns the seconds, already warm."""
    config = made.config
    program, call = training_step(made, config.train.batch_size, classes=config.model.num_classes)
    warm(call)
    return program, lambda: seconds_of(call)


def table(rows: Sequence[Row]) -> str:
    head = ["config", "parameters", "batch", "ms per step", "least", "greatest", "memory, MiB"]
    lines = [
        [
            row.config,
            f"{row.parameters:,}",
            str(row.batch),
            *(f"{1e3 * value:.1f}" for value in (row.timing.median, row.timing.least, row.timing.greatest)),
            f"{row.program.memory / _MIB:.1f}",
        ]
        for row in rows
    ]
    return tables.columns(head, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="RECIPE", help="as --config of `polaformer train` takes them")
    options.add_timing(parser)


def main(args: argparse.Namespace) -> None:
    options.check_timing(args)
    rows = measure(args.configs, calls=args.calls, seconds=args.seconds)
    print(table(rows))
    if args.csv:
        tables.write_csv(args.csv, [row.record() for row in rows])
