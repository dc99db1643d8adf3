"""From a config to the pieces of a run: data, model, optimizer, and the compiled steps."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from polaformer_jax import creation, weights
from polaformer_jax.data import pipeline, sources, transforms
from polaformer_jax.errors import UserError
from polaformer_jax.layers import Keys
from polaformer_jax.training import debugging, sharding
from polaformer_jax.training.checks import check_config
from polaformer_jax.training.optimizer import head_only, make_optimizer
from polaformer_jax.training.progress import log
from polaformer_jax.training.schedule import Durations, durations, learning_rate
from polaformer_jax.training.sharding import with_shardings
from polaformer_jax.training.step import TrainState, make_eval_step, make_train_step
from polaformer_jax.training.tasks import ImageClassification, Task

# Fields of `config.model` that are passed on to the model's constructor where they are not None.
ARCHITECTURE = ("attn_type", "window_size", "softmax_window_size", "alpha", "kernel_size")


def build_model(config: ml_collections.ConfigDict, rngs: nnx.Rngs | Keys) -> nnx.Module:
    """The model of the config's `model` part.

    Raises:
      UserError: the model's constructor refuses a value.
    """
    try:
        model = creation.create_model(
            config.name,
            num_classes=config.num_classes,
            img_size=config.img_size,
            drop_path=config.drop_path,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
            **{name: config[name] for name in ARCHITECTURE if config[name] is not None},
        )
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    model.remat = config.remat
    return model


class Experiment:
    """What a config describes. Making one reads no weights and no images, and compiles nothing.

    Attributes:
      config: the config; `model.num_classes`, where it was None, is the data set's number.
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
        if config.model.num_classes is None:
            if num_examples is not None:
                raise UserError("model.num_classes=None: there is no data set here to take it from, give a number")
            config.model.num_classes = self.eval_source.num_classes
        model = nnx.eval_shape(lambda: build_model(config.model, nnx.Rngs(0)))
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
        durations(self.config, num_examples=len(self.train_source))

    def check_batch(self) -> None:
        """Raises a UserError if the batch cannot be split into its parts, and these over the devices."""
        train = self.config.train
        if train.batch_size % train.accumulate:
            raise UserError(
                f"train.batch_size={train.batch_size} cannot be split into train.accumulate={train.accumulate}"
            )
        name = "train.batch_size" if train.accumulate == 1 else "train.batch_size / train.accumulate"
        sharding.check_batch(train.batch_size // train.accumulate, self.mesh, name)

    # --- data

    @functools.cached_property
    def train_source(self) -> sources.Source:
        return sources.open_source(self.config.data, self.config.data.train_split)

    @functools.cached_property
    def eval_source(self) -> sources.Source:
        return sources.open_source(self.config.data, self.config.data.eval_split)

    @functools.cached_property
    def mesh(self) -> Mesh:
        return sharding.make_mesh(self.config.mesh, self._devices)

    def train_batches(self, start: int):
        """This process's part of each training batch from step `start` on, without end."""
        return pipeline.train_batches(
            self.train_source,
            transforms.train_transform(self.config),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start=start,
            **self._reading,
        )

    def describe_batch(self, step: int) -> list[str]:
        """Names of the records that the whole batch of a step is made of."""
        indices = pipeline.batch_indices(
            len(self.train_source), batch_size=self.config.train.batch_size, seed=self.config.seed, batch=step
        )
        return [self.train_source.describe(index) for index in indices]

    def eval_batches(self) -> pipeline.EvalBatches:
        """Batches of the whole evaluation split."""
        return pipeline.EvalBatches(
            self.eval_source, self.eval_transform, batch_size=self.eval_batch_size, **self._reading
        )

    @property
    def eval_batch_size(self) -> int:
        """`eval.batch_size`, rounded up to a multiple of the devices."""
        return self.config.eval.batch_size + -self.config.eval.batch_size % self.mesh.size

    @functools.cached_property
    def eval_transform(self) -> transforms.EvalImageTransform:
        return transforms.EvalImageTransform(
            self.config.eval.resize,
            self.config.eval.crop,
            num_classes=self.config.model.num_classes,
            on_error=self.config.data.on_error,
        )

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

    @functools.cached_property
    def task(self) -> Task:
        augment = self.config.augment
        return ImageClassification(
            self.config.model.num_classes,
            self.config.train.label_smoothing,
            erase_prob=augment.erase_prob,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            mix_prob=augment.mix_prob,
            switch_prob=augment.switch_prob,
            dtype=jnp.dtype(self.config.model.dtype),
        )

    def initial_params(self) -> Any:
        """Parameters from `init.weights` if given, else drawn from the seed: a nested dict like `abstract_params`.

        Raises:
          UserError: the weights are not this model's.
        """
        if self.config.init.weights is not None:
            return self.read_params(self.config.init.weights, fit=("tables", "classifier"))

        # Eagerly, one parameter after the other: under jit, compiling the many draws takes five times as long as
        # drawing. Each goes from host memory to the devices that keep it, so that none of them ever has them all.
        def place(array: np.ndarray) -> jax.Array:
            return sharding.place(array, sharding.state_sharding(array.shape, self.mesh))

        model = build_model(self.config.model, Keys(nnx.Rngs(self.config.seed).params(), place))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def read_params(self, path: str, *, fit: Collection[weights.Fit] = ("tables",)) -> Any:
        """Parameters from a file of weights of any kind that `weights.read_file` reads.

        Args:
          fit: what may be changed to fit, see `weights.load_weights`. Each change is logged.

        Raises:
          UserError: they are not this model's.
        """
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
        examples = len(self.train_source) if self._num_examples is None else self._num_examples
        return durations(self.config, num_examples=examples)

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

    def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch of this size over all hosts."""
        size = self.config.model.img_size
        shapes = {"image": ((size, size, 3), np.uint8), "label": ((), np.int32), "mask": ((), np.bool_)}
        placed = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)
            for name, (shape, dtype) in shapes.items()
        }

    def compile_train_step(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, sums of metrics); the state given is used up."""
        options = debugging.compiler_options(self.config.debug)
        return self.trace_train_step().lower().compile(compiler_options=options)

    def trace_train_step(self) -> jax.stages.Traced:
        """The same before it is compiled, for any devices."""
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
        # The state goes out as it came in, so that its memory is reused.
        step = jax.jit(step, donate_argnums=0, out_shardings=(self._state_shardings, sharding.replicated(self.mesh)))
        return step.trace(self.abstract_state, self.abstract_batch(self.config.train.batch_size))

    def compile_eval_step(self, batch_size: int) -> jax.stages.Compiled:
        """(params, batch) -> (sums of metrics, outputs of each example)."""
        step = make_eval_step(self.graphdef, self.task, mesh=self.mesh)
        # Outputs are copied to all devices, so that every process can read those of the whole batch.
        step = jax.jit(step, out_shardings=sharding.replicated(self.mesh))
        return step.lower(self.abstract_params, self.abstract_batch(batch_size)).compile()
