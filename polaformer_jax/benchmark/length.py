"""Time and memory of the sequence model against the length of its sequences, with each of its three attentions.

    polaformer benchmark length --csv length.csv --plot length.png

The model is that of the Long Range Arena, with ListOps' sizes unless another config is given; sequences have full
length. The forward pass is evaluation, training is the real step with AdamW. Measurements take turns, on one device.
"""

import argparse
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from polaformer_jax.benchmark import length_plot, options, sweep
from polaformer_jax.benchmark.sweep import Job, Point
from polaformer_jax.config import SEQUENCE_TASKS
from polaformer_jax.data.lra.facts import facts_of
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, tables
from polaformer_jax.models.pola_sequence import ATTENTIONS
from polaformer_jax.training import recipes
from polaformer_jax.training.optimizer import durations, learning_rate, make_optimizer
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.step import make_train_step
from polaformer_jax.training.tasks import Batch
from polaformer_jax.training.tasks.sequences import SequenceClassification

MODES = ("forward", "training")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
_SEED = 0


def job(tokens: int, attention: str, mode: str, *, config: ml_collections.ConfigDict) -> Job:
    """A config's model with another attention and length, on `train.batch_size` sequences."""
    config = config.copy_and_resolve_references()
    config.model.attention = attention
    task = SequenceClassification(config)

    def make_model():
        return task.create_model(nnx.Rngs(_SEED), max_length=tokens)

    graphdef, _ = nnx.split(nnx.eval_shape(make_model))
    make_batch = functools.partial(batch, config, tokens)

    def make_params():
        return nnx.to_pure_dict(nnx.state(make_model()))

    if mode == "forward":

        def forward(params, examples):
            return nnx.merge(graphdef, params)(task.inputs(examples), train=False)

        def start_forward(program: jax.stages.Compiled):
            params, examples = make_params(), make_batch()
            return lambda: program(params, examples)

        return Job(
            lambda: jax.jit(forward).trace(jax.eval_shape(make_params), jax.eval_shape(make_batch)), start_forward
        )

    rate = learning_rate(config, durations(config, num_examples=config.train.batch_size))
    optimizer = make_optimizer(config.optimizer, rate)
    step = make_train_step(graphdef, task, optimizer, rate=rate, seed=config.seed)

    def make_state():
        params = make_params()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def start_training(program: jax.stages.Compiled):
        state, examples = make_state(), make_batch()

        def call():
            nonlocal state  # a step donates its state
            state, sums = program(state, examples)
            return state, sums

        return call

    return Job(
        lambda: jax.jit(step, donate_argnums=0).trace(jax.eval_shape(make_state), jax.eval_shape(make_batch)),
        start_training,
    )


def batch(config: ml_collections.ConfigDict, tokens: int) -> Batch:
    """Random full sequences: tokens (B, N), or (B, 2, N) of pairs, with lengths, labels and a mask of True."""
    facts, size = facts_of(config.task.name), config.train.batch_size
    shape = (size,) if facts.texts == 1 else (size, facts.texts)
    key = jax.random.key(_SEED)
    return {
        "tokens": jax.random.randint(key, (*shape, tokens), 1, facts.vocabulary),
        "length": jnp.full(shape, tokens, jnp.int32),
        "label": jax.random.randint(key, (size,), 0, config.model.num_classes),
        "mask": jnp.ones(size, bool),
    }


def crossover(points: Sequence[Point], mode: str) -> int | None:
    """The first length at which polarity's median is less than softmax's, of those where both were measured."""
    medians = {point[:3]: point.timing.median for point in points if point.timing is not None}
    for tokens in sorted({point.tokens for point in points}):
        ours, theirs = (medians.get((tokens, name, mode)) for name in ("polarity", "softmax"))
        if ours is not None and theirs is not None and ours < theirs:
            return tokens
    return None


def table(points: Sequence[Point]) -> str:
    """A line for each mode and length; the last line states from which length polarity is faster than softmax."""
    by_name = {point[:3]: point for point in points}
    head = ["mode", "tokens", *(f"{name} {cell}" for name in ATTENTIONS for cell in sweep.CELLS)]
    lines = [
        [mode, f"{tokens:,}", *(text for name in ATTENTIONS for text in sweep.cells(by_name[tokens, name, mode]))]
        for mode in MODES
        for tokens in sorted({point.tokens for point in points})
    ]
    return f"{tables.columns(head, lines)}\n{_verdict(points)}"


def _verdict(points: Sequence[Point]) -> str:
    found = {mode: crossover(points, mode) for mode in MODES}
    places = ("at none of these lengths" if n is None else f"first at {n:,} tokens" for n in found.values())
    return "polarity is faster than softmax: " + ", ".join(
        f"{mode} {place}" for mode, place in zip(found, places, strict=True)
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=list(LENGTHS),
        help=f"numbers of tokens [{' '.join(map(str, LENGTHS))}]",
    )
    parser.add_argument("--batch-size", type=int, help="sequences, or pairs of them [the config's]")
    parser.add_argument("--config", default="lra:listops", help="[lra:listops]")
    parser.add_argument("--dtype", choices=options.DTYPES, help="of the computation [the config's]")
    sweep.add_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", help="time and memory by length, both axes logarithmic: .png or .svg")


def main(args: argparse.Namespace) -> None:
    sweep.check(args)
    options.check_positive("--lengths", *args.lengths)
    options.check_positive("--batch-size", args.batch_size)
    if args.plot is not None:
        figures.check_name(args.plot, "plot")
    config = recipes.load(args.config)
    if config.task.name not in SEQUENCE_TASKS:
        raise UserError(
            f"--config {args.config}: its task is {config.task.name}, expected one of {', '.join(SEQUENCE_TASKS)}"
        )
    config.model.dtype = args.dtype or config.model.dtype
    config.train.batch_size = args.batch_size or config.train.batch_size
    points = sweep.run(
        args,
        args.lengths,
        functools.partial(job, config=config),
        attentions=ATTENTIONS,
        modes=MODES,
        sizes={"task": config.task.name, "batch": config.train.batch_size, "dtype": config.model.dtype},
        table=table,
    )
    if args.plot is not None:
        crossovers = {mode: crossover(points, mode) for mode in MODES}
        figure = length_plot.draw(points, modes=MODES, attentions=ATTENTIONS, crossovers=crossovers)
        figures.save(figure, args.plot)
