"""The models of this package, compiled for the present devices and ready to be timed."""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from polaformer_jax.benchmark import options, programs
from polaformer_jax.benchmark.timing import seconds_of, warm
from polaformer_jax.config import defaults, use_official_augmentation
from polaformer_jax.data.sources import IMAGENET_EXAMPLES
from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.sharding import Constraints, batch_sharding, replicated

CLASSES = 1000
_SEED = 0


class Case(NamedTuple):
    """A model, and its input.

    Attributes:
        model: name of an image model.
        img_size: pixels, square.
        batch: number of images, over all devices.
        dtype: of the computation, "float32" or "bfloat16"; parameters are float32.
    """

    model: str
    img_size: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} {self.img_size} x {self.img_size}, batch {self.batch}, {self.dtype}"


def add_arguments(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """The options that `cases` reads; `batch_size` is the default."""
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", default=["pola_pvt_t", "pola_swin_t"], help="[pola_pvt_t pola_swin_t]"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[batch_size], help=f"images, over all devices [{batch_size}]"
    )
    parser.add_argument("--img-size", type=int, help="pixels, square [the model's own]")
    parser.add_argument("--dtypes", nargs="+", choices=options.DTYPES, default=["float32"], help="[float32]")


def cases(args: argparse.Namespace) -> list[Case]:
    """All requested combinations.

    Raises:
        UserError: there is no such image model, or a size is not valid.
    """
    options.check_positive("--batch-sizes", *args.batch_sizes)
    options.check_positive("--img-size", args.img_size)
    for model in args.models:
        if registry.model_config(model).family == "PolaSequence":
            raise UserError(f"{model} is a model of sequences, expected one of images; see `benchmark length`")
    combinations = itertools.product(args.models, args.batch_sizes, args.dtypes)
    return [
        Case(model, args.img_size or registry.model_config(model).img_size, batch, dtype)
        for model, batch, dtype in dict.fromkeys(combinations)
    ]


class Subject(NamedTuple):
    """Something to be timed, already warm.

    Attributes:
        run: runs it once and returns the seconds.
        compile_s: seconds of compiling; None if nothing is compiled.
        memory: bytes needed on one device; None if they are not known.
        memory_by: what reported the memory, "compiler" or "device".
        flops: operations of matrix products and convolutions, on all devices; None if they are not counted.
    """

    run: Callable[[], float]
    compile_s: float | None
    memory: float | None
    memory_by: str
    flops: float | None


def experiment(case: Case, devices: Sequence[jax.Device]) -> Experiment:
    """The training of a case: the recipe of `configs/` with all its work on the device, on a mesh of the devices.

    Raises:
        UserError: it cannot be built with these sizes, or the batch does not divide over the devices.
    """
    config = defaults()
    use_official_augmentation(config)
    config.model.name, config.model.num_classes, config.model.dtype = case.model, CLASSES, case.dtype
    config.model.img_size = config.eval.crop = config.eval.resize = case.img_size
    config.optimizer.clip_norm = 5.0
    config.train.epochs, config.train.batch_size = 300.0, case.batch
    made = Experiment(config, devices=devices, num_examples=IMAGENET_EXAMPLES)
    made.check_batch()
    return made


def subject(made: Experiment, case: Case, mode: str) -> Subject:
    """Compiles one of `MODES` and calls it until it is warm, before it is timed."""
    program, call = MODES[mode](made, case)
    peak = programs.device_peak(program, call, made.mesh.local_devices)
    warm(call)
    return Subject(
        run=lambda: seconds_of(call),
        compile_s=program.seconds,
        memory=program.memory if peak is None else peak,
        memory_by="compiler" if peak is None else "device",
        flops=program.flops,
    )


def _forward(made: Experiment, case: Case):
    """Logits of a batch of images, in evaluation."""
    constrain, graphdef = Constraints(made.mesh), made.graphdef

    def forward(params, images):
        params, images = constrain.whole(params), constrain.batch(images)
        return nnx.merge(graphdef, params)(images, train=False)

    params, images = made.params.initial(), _images(made, case)
    program = programs.compiled(lambda: jax.jit(forward).trace(params, images))
    return program, lambda: program.run(params, images)


def _gradient(made: Experiment, case: Case):
    """The mean cross-entropy of a batch and the gradients of all parameters, with stochastic depth."""
    constrain, graphdef = Constraints(made.mesh), made.graphdef

    def loss(params, images, labels, key):
        params, images = constrain.whole(params), constrain.batch(images)
        logits = nnx.merge(graphdef, params)(images, train=True, rngs=nnx.Rngs(dropout=key))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))

    given = (made.params.initial(), _images(made, case), random_batch(made, case.batch, classes=CLASSES)["label"])
    given = (*given, jax.device_put(jax.random.key(_SEED), replicated(made.mesh)))
    program = programs.compiled(lambda: jax.jit(jax.value_and_grad(loss)).trace(*given))
    return program, lambda: program.run(*given)


def _step(made: Experiment, case: Case):
    return training_step(made, case.batch, classes=CLASSES)


def training_step(made: Experiment, size: int, *, classes: int) -> tuple[programs.Program, Callable[[], object]]:
    """The training's own step, augmentation on the device and AdamW included, and a function that calls it once."""
    batch, state = random_batch(made, size, classes=classes), made.states.initial()
    program = programs.compiled(lambda: made.train_step.trace(batch))

    def call():
        nonlocal state  # a step donates its state
        state, sums = program.run(state, batch)
        return state, sums

    return program, call


# What can be measured of a model: each returns the program, and a function that calls it once.
MODES = {"forward": _forward, "gradient": _gradient, "step": _step}


def _images(made: Experiment, case: Case) -> jax.Array:
    """(B, S, S, 3) float32, of about zero mean and unit variance."""
    shape = (case.batch, case.img_size, case.img_size, 3)
    images = np.random.default_rng(_SEED).standard_normal(shape, np.float32)
    return jax.device_put(images, batch_sharding(made.mesh))


def random_batch(made: Experiment, size: int, *, classes: int) -> dict[str, jax.Array]:
    """A training batch of images: bytes, labels, and a mask of True."""
    rng = np.random.default_rng(_SEED)
    values = {"image": functools.partial(rng.integers, 0, 256), "label": functools.partial(rng.integers, 0, classes)}
    return {
        name: jax.device_put(
            values[name](size=leaf.shape, dtype=leaf.dtype) if name in values else np.ones(leaf.shape, leaf.dtype),
            leaf.sharding,
        )
        for name, leaf in made.abstract_batch(size).items()
    }
