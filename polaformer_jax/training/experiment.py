"""From a config to the pieces of a run: data, model, optimizer, and the compiled steps."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from polaformer_jax import weights
from polaformer_jax.data import sources
from polaformer_jax.data.pipeline import Passes
from polaformer_jax.data.workers import Stream
from polaformer_jax.errors import UserError
from polaformer_jax.hardware.costs import product_flops
from polaformer_jax.models.initializers import Keys
from polaformer_jax.training import debugging, sharding, tasks
from polaformer_jax.training.checks import check_config
from polaformer_jax.training.compiled import CompiledByShape, abstract
from polaformer_jax.training.optimizer import head_only, make_optimizer
from polaformer_jax.training.progress import log
from polaformer_jax.training.schedule import Durations, durations, learning_rate
from polaformer_jax.training.sharding import with_shardings
from polaformer_jax.training.step import TrainState, make_eval_step, make_train_step
from polaformer_jax.training.tasks.task import Task


def build_model(config: ml_collections.ConfigDict, rngs: nnx.Rngs | Keys) -> nnx.Module:
    """The model that a whole config describes.

    Raises:
      UserError: the model's constructor refuses a value.
    """
    try:
        return tasks.of(config).build_model(rngs)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error


class Experiment:
    """What a config describes. Making one reads no weights and no examples, and compiles nothing.

    Attributes:
      config: the config; `model.num_classes`, where it was None, is the data set's number.
      modality: what differs between images and sequences.
      graphdef: the model's static part; with parameters it makes the model.
      abstract_params: nested dict of the parameters' shapes, dtypes and shardings.
      arguments: of the model's constructor.

    Args:
      config: the config.
      devices: on which it runs; None: on those that there are.
      num_examples: size of the training set, given where the steps are only compiled and no data set need be there.

    Raises:
      UserError: the config cannot work: its values, its model, or its data set.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        devices: Sequence[jax.Device] | None = None,
        num_examples: int | None = None,
    ):
        check_config(config)
        self._devices = devices
        self._num_examples = num_examples
        self.config = config = config.copy_and_resolve_references()
        self.modality = tasks.of(config)
        if config.model.num_classes is None:
            if num_examples is not None:
                raise UserError("model.num_classes=None: there is no data set here to take it from, give a number")
            config.model.num_classes = self.eval_source.num_classes
            self.modality = tasks.of(config)
        model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
        self.arguments: dict[str, Any] = dict(model.arguments)
        graphdef, params = nnx.split(model)
        self.graphdef: nnx.GraphDef = graphdef
        self.abstract_params: Any = self._placed(nnx.to_pure_dict(params))
        if num_examples is None:
            self._check_classes()

    def _check_classes(self) -> None:
        config, classes = self.config, self.eval_source.num_classes
        if config.model.num_classes != classes:
            raise UserError(
                f"model.num_classes={config.model.num_classes}, but {config.data.name} has {classes} classes:"
                f" set --config.model.num_classes={classes}"
            )

    def check_training(self) -> None:
        """Raises a UserError if this cannot be trained, though it may well be evaluated: data, batch, length."""
        self.check_batch()
        if self.train_source.num_classes != self.eval_source.num_classes:
            raise UserError(
                f"data.train_split={self.config.data.train_split} has {self.train_source.num_classes} classes, and"
                f" data.eval_split={self.config.data.eval_split} {self.eval_source.num_classes}"
            )
        durations(self.config, num_examples=self._train_examples)

    def check_batch(self) -> None:
        """Raises a UserError if the batch cannot be split into its parts, and these over the devices."""
        train = self.config.train
        if train.batch_size % train.accumulate:
            raise UserError(
                f"train.batch_size={train.batch_size} cannot be split into train.accumulate={train.accumulate}"
            )
        name = "train.batch_size" if train.accumulate == 1 else "train.batch_size / train.accumulate"
        sharding.check_batch(train.batch_size // train.accumulate, self.mesh, name)

    @property
    def _train_examples(self) -> int:
        return len(self.train_source) if self._num_examples is None else self._num_examples

    # --- data

    def source(self, split: str) -> sources.Source:
        """The records of a split, opened once."""
        if split not in self._sources:
            self._sources[split] = self.modality.open_source(split)
        return self._sources[split]

    @functools.cached_property
    def _sources(self) -> dict[str, sources.Source]:
        return {}

    @property
    def train_source(self) -> sources.Source:
        return self.source(self.config.data.train_split)

    @property
    def eval_source(self) -> sources.Source:
        return self.source(self.config.data.eval_split)

    @property
    def report_split(self) -> str:
        """The split that the best checkpoint is reported on, which need not be that by which it was chosen."""
        return self.config.data.test_split or self.config.data.eval_split

    @functools.cached_property
    def mesh(self) -> Mesh:
        return sharding.make_mesh(self.config.mesh, self._devices)

    def train_batches(self, start: int) -> Stream:
        """This process's part of each training batch from step `start` on, without end."""
        return self.modality.train_batches(self.train_source, start=start, **self._reading)

    def describe_batch(self, step: int) -> list[str]:
        """Names of the records that the whole batch of a step is made of."""
        source = self.train_source
        return [source.describe(index) for index in self.modality.batch_indices(source, step)]

    def eval_batches(self, split: str) -> Passes:
        """Batches of a whole split, without augmentation."""
        return self.modality.eval_batches(self.source(split), batch_size=self.eval_batch_size, **self._reading)

    @property
    def eval_batch_size(self) -> int:
        """`eval.batch_size`, rounded up to a multiple of the devices."""
        return self.config.eval.batch_size + -self.config.eval.batch_size % self.mesh.size

    @property
    def _reading(self) -> dict[str, Any]:
        return {
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
            "workers": self.config.data.workers,
            "prefetch": self.config.data.prefetch,
            "timeout_s": self.config.watchdog.input_s,
        }

    # --- model

    @property
    def task(self) -> Task:
        return self.modality.task

    def initial_params(self) -> Any:
        """Parameters from `init.weights` if given, else drawn from the seed: a nested dict like `abstract_params`.

        Raises:
          UserError: the weights are not this model's.
        """
        if self.config.init.weights is not None:
            return self.read_params(self.config.init.weights, fit=self.modality.fit)

        # Eagerly, one parameter after the other: under jit, compiling the many draws takes five times as long as
        # drawing. Each goes from host memory to the devices that keep it, so that none of them ever has them all.
        def place(array: np.ndarray) -> jax.Array:
            return sharding.place(array, sharding.state_sharding(array.shape, self.mesh))

        model = build_model(self.config, Keys(nnx.Rngs(self.config.seed).params(), place))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def read_params(self, path: str, *, fit: Collection[weights.Fit] | None = None) -> Any:
        """Parameters from a file of weights of any kind that `weights.read_file` reads.

        Args:
          fit: what may be changed to fit, see `weights.load_weights`; None: as much of what the modality allows as
            leaves the classifier alone. Each change is logged.

        Raises:
          UserError: they are not this model's.
        """
        if fit is None:
            fit = [kind for kind in self.modality.fit if kind != "classifier"]
        params, changes = weights.params_from(path, self.abstract_params, self.arguments, fit=fit)
        for line in weights.summary(changes):
            log.warning("%s, changed to fit the model: %s", path, line)
        return params

    def model(self, params: Any) -> nnx.Module:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)

    # --- training

    @functools.cached_property
    def length(self) -> Durations:
        return durations(self.config, num_examples=self._train_examples)

    @functools.cached_property
    def rate(self):
        return learning_rate(self.config, self.length)

    @functools.cached_property
    def optimizer(self):
        return make_optimizer(self.config.optimizer, self.rate, trainable=self._trainable)

    @functools.cached_property
    def _trainable(self) -> Any:
        return head_only(self.abstract_params) if self.config.init.freeze_backbone else None

    def _new_state(self, params: Any) -> TrainState:
        ema = None if self.config.ema.decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), ema)

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices of the mesh."""
        create = jax.jit(self._new_state, out_shardings=self._state_shardings, donate_argnums=0)
        return create(self.initial_params())

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        return self._placed(jax.eval_shape(self._new_state, self.abstract_params))

    @property
    def _state_shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def _placed(self, abstract: Any) -> Any:
        return with_shardings(abstract, sharding.state_shardings(abstract, self.mesh))

    def abstract_batch(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch of this size over all hosts; the largest, where they differ."""
        placed = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)
            for name, (shape, dtype) in self.modality.batch_shapes().items()
        }

    @functools.cached_property
    def train_step(self) -> CompiledByShape:
        """(state, batch) -> (state, sums of metrics); the state given is used up."""
        debug = self.config.debug
        options = debugging.compiler_options(debug)
        return CompiledByShape(
            self._jitted_train_step, self.abstract_state, "training step", options, compiled=not debug.nans
        )

    def trace_train_step(self, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> jax.stages.Traced:
        """The same for a batch like this one before it is compiled, for any devices."""
        return self._jitted_train_step.trace(self.abstract_state, abstract(batch))

    def step_flops(self, batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> float:
        """Operations of the matrix products and convolutions of a step on a batch like this, on all devices together.

        Of the step without recomputation (`model.remat`), which is no progress, and with the attention by operations,
        for its kernel multiplies zeros too.
        """
        model = self.config.model
        if not model.remat and model.attention_impl != "pallas":
            return product_flops(self.trace_train_step(batch).jaxpr.jaxpr)
        return self._plain.step_flops(batch)

    @functools.cached_property
    def _plain(self) -> "Experiment":
        config = self.config.copy_and_resolve_references()
        config.model.remat, config.model.attention_impl = False, "xla"
        return Experiment(config, devices=self._devices, num_examples=self._train_examples)

    @functools.cached_property
    def _jitted_train_step(self):
        step = make_train_step(
            self.graphdef,
            self.task,
            self.optimizer,
            rate=self.rate,
            seed=self.config.seed,
            accumulate=self.config.train.accumulate,
            ema_decay=self.config.ema.decay,
            trainable=self._trainable,
            mesh=self.mesh,
        )
        # The state goes out as it came in, so that its memory is reused; but not if a step may have to be looked into.
        donate = () if self.config.debug.nans else 0
        return jax.jit(
            step, donate_argnums=donate, out_shardings=(self._state_shardings, sharding.replicated(self.mesh))
        )

    @functools.cached_property
    def eval_step(self) -> CompiledByShape:
        """(params, batch) -> (sums of metrics, outputs of each example)."""
        step = make_eval_step(self.graphdef, self.task, mesh=self.mesh)
        # Outputs are copied to all devices, so that every process can read those of the whole batch.
        step = jax.jit(step, out_shardings=sharding.replicated(self.mesh))
        return CompiledByShape(step, self.abstract_params, "evaluation step")
