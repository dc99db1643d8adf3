"""From a config to the parts of a run: task, devices, model, data, optimizer, states and compiled steps."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.hardware.costs import product_flops
from polaformer_jax.models.batch_norm import parameter_count, statistics_of
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.training import runtime, sharding
from polaformer_jax.training.config_checks import check
from polaformer_jax.training.inputs import Inputs
from polaformer_jax.training.optimizer import Durations, durations, head_only, learning_rate, make_optimizer
from polaformer_jax.training.programs import AnyBatch, ProgramCache, batch_shapes
from polaformer_jax.training.state import Parameters, States
from polaformer_jax.training.step import make_eval_step, make_train_step
from polaformer_jax.training.tasks import Shapes, task_of


class Experiment:
    """What a config describes. Creating one reads no weights and no examples, and compiles nothing.

    Attributes:
        config: the config; `model.num_classes`, where it was None, is the data set's number.
        task: the task, see `tasks`.
        mesh: the devices.
        inputs: the data.
        graphdef: the model's static part; with parameters it is the model.
        params: creates and reads the model's parameters.

    Args:
        config: the config.
        devices: devices to run on; None: all.
        num_examples: size of the training set, if the steps are only compiled and no data set is available.
        epoch_examples: by how many examples an epoch is counted; None: by the size of the training set.

    Raises:
        UserError: the config is not valid: its values, its model, or its data set.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        devices: Sequence[jax.Device] | None = None,
        num_examples: int | None = None,
        epoch_examples: int | None = None,
    ):
        check(config)
        _check_paths(config)
        self.config = config = config.copy_and_resolve_references()
        self.mesh: Mesh = sharding.make_mesh(config.mesh, devices)
        self.task = task_of(config)
        self.inputs = Inputs(config, self.task, mesh=self.mesh, epoch_examples=num_examples or epoch_examples)
        if config.model.num_classes is None:
            if num_examples is not None:
                raise UserError("model.num_classes=None: there is no data set here to take it from, give a number")
            config.model.num_classes = self.inputs.eval_source.num_classes
        model = create_abstract_model(config)
        self.graphdef, params = nnx.split(model)
        self._statistics = statistics_of(model)
        self.parameter_count = parameter_count(model)
        abstract = sharding.sharded(nnx.to_pure_dict(params), self.mesh)
        self.params = Parameters(abstract, model.config, config, self.task, self.mesh)
        if num_examples is None:
            self._check_classes()

    def _check_classes(self) -> None:
        config, classes = self.config, self.inputs.eval_source.num_classes
        if config.model.num_classes != classes:
            raise UserError(
                f"model.num_classes={config.model.num_classes}, but {config.data.name} has {classes} classes:"
                f" set model.num_classes={classes}"
            )

    def check_training(self) -> None:
        """Raises a UserError if this cannot be trained, though it may be evaluated: data, batch, workers, length."""
        self.check_batch()
        init = self.config.init
        if init.freeze_statistics and init.weights is None and self._statistics is not None:
            raise UserError(
                "init.freeze_statistics=True without init.weights: batch normalisations would keep initial statistics,"
                " which normalise nothing; give weights to start from, or set init.freeze_statistics=False"
            )
        train, evaluation = self.inputs.train_source, self.inputs.eval_source
        if train.num_classes != evaluation.num_classes:
            raise UserError(
                f"data.train_split={self.config.data.train_split} has {train.num_classes} classes, and"
                f" data.eval_split={self.config.data.eval_split} {evaluation.num_classes}"
            )
        self.inputs.check_workers(self.config.data.eval_split, training=True)
        _ = self.length

    def check_batch(self) -> None:
        """Raises a UserError if the batch cannot be split into micro-batches, and these over the devices."""
        train = self.config.train
        if train.batch_size % train.accumulate:
            raise UserError(
                f"train.batch_size={train.batch_size} cannot be split into train.accumulate={train.accumulate}"
            )
        name = "train.batch_size" if train.accumulate == 1 else "train.batch_size / train.accumulate"
        sharding.check_batch(train.batch_size // train.accumulate, self.mesh, name)

    @functools.cached_property
    def length(self) -> Durations:
        """The length of the training in steps."""
        return durations(self.config, num_examples=self.inputs.epoch_examples)

    @functools.cached_property
    def states(self) -> States:
        """Creates training states."""
        optimizer = make_optimizer(self.config.optimizer, self._rate, trainable=self._trainable)
        return States(self.params, optimizer, with_ema=self.config.ema.decay is not None)

    @functools.cached_property
    def train_step(self) -> ProgramCache:
        """(state, batch) -> (state, sums of metrics); the state is donated."""
        config, states = self.config, self.states
        step = make_train_step(
            self.graphdef,
            self.task,
            states.optimizer,
            rate=self._rate,
            seed=config.seed,
            accumulate=config.train.accumulate,
            ema_decay=config.ema.decay,
            trainable=self._trainable,
            statistics=self._statistics is not None,
            mesh=self.mesh,
        )
        # Donating the state lets its memory be reused; but not if a step may have to be run again to find a NaN.
        donate = () if config.debug.nans else 0
        jitted = jax.jit(step, donate_argnums=donate, out_shardings=(states.shardings, sharding.replicated(self.mesh)))
        options = runtime.compiler_options(config.debug)
        return ProgramCache(jitted, states.abstract, "training step", options, compiled=not config.debug.nans)

    @functools.cached_property
    def eval_step(self) -> ProgramCache:
        """(params, batch) -> (sums of metrics, outputs of each example)."""
        # Outputs are replicated, so that every process can read those of the whole batch.
        step = make_eval_step(self.graphdef, self.task, mesh=self.mesh)
        jitted = jax.jit(step, out_shardings=sharding.replicated(self.mesh))
        return ProgramCache(jitted, self.params.abstract, "evaluation step")

    @functools.cached_property
    def _rate(self):
        return learning_rate(self.config, self.length)

    @functools.cached_property
    def _trainable(self) -> Any:
        chosen = head_only(self.params.abstract) if self.config.init.freeze_backbone else None
        if self._statistics is None:
            return chosen
        learnt = jax.tree.map(lambda is_statistic: not is_statistic, self._statistics)
        return learnt if chosen is None else jax.tree.map(operator.and_, chosen, learnt)

    def model(self, params: Any) -> nnx.Module:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)

    def abstract_batch(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a training batch of this size over all hosts.

        Of the largest, where they differ.
        """
        return self._abstract(self.task.batch_shapes(), batch_size)

    def abstract_eval_batch(self, split: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Those of a batch of an evaluation; of the largest, where they differ."""
        return self._abstract(self.task.eval_shapes(self.inputs.source(split)), self.inputs.eval_batch_size)

    def _abstract(self, shapes: Shapes, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        placed = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)
            for name, (shape, dtype) in shapes.items()
        }

    def step_flops(self, batch: AnyBatch) -> float:
        """Operations of the matrix products and convolutions of a step on a batch like this, on all devices together.

        They are those of the step without recomputation (`model.remat`), and with attention and MLPs by XLA operations,
        since the kernels also multiply zeros and compute some products again.
        """
        key = batch_shapes(batch)
        if key not in self._flops:
            self._flops[key] = product_flops(self._plain.train_step.trace(batch).jaxpr.jaxpr)
        return self._flops[key]

    @functools.cached_property
    def _flops(self) -> dict[tuple, float]:
        return {}

    @functools.cached_property
    def _plain(self) -> "Experiment":
        if not self.config.model.remat and self.config.model.attention_impl != "pallas":
            return self
        config = self.config.copy_and_resolve_references()
        config.model.remat, config.model.attention_impl = False, "xla"
        devices, examples = list(self.mesh.devices.flat), self.inputs.epoch_examples
        return Experiment(config, devices=devices, num_examples=examples)


def _check_paths(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError if a path of the config cannot work, whatever is there."""
    checks = {
        "data.data_dir": (config.data.data_dir, paths.given),
        "init.weights": (config.init.weights, _check_weights),
    }
    for field, (path, check_path) in checks.items():
        if path is not None:
            try:
                check_path(path)
            except UserError as error:
                raise UserError(f"{field}={path!r}: {error}") from None


def _check_weights(path: str) -> None:
    weights.hub.Address.parse(path) if weights.hub.is_address(path) else paths.given(path)


def create_abstract_model(config: ml_collections.ConfigDict) -> nnx.Module:
    """The model that a whole config describes, whose parameters are shapes and dtypes only.

    Raises:
        UserError: the model does not accept a value.
    """
    try:
        return task_of(config).create_model(AbstractKeys())
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
