"""The training state, and how parameters and states are created: each array on the devices where it stays."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from polaformer_jax import weights
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.model_config import ModelConfig
from polaformer_jax.training import sharding
from polaformer_jax.training.progress import log
from polaformer_jax.training.tasks import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step: plain arrays in a plain pytree."""

    step: jax.Array  # () int32, number of steps taken
    params: Any  # nested dict
    opt_state: Any
    ema: Any = None  # exponential moving average of the parameters, a nested dict like them; None without


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Creates or reads the parameters of a model, each on the devices where it stays: nested dicts like `abstract`.

    Attributes:
        abstract: shapes, dtypes and shardings.
        model_config: the model's hyper-parameters.
        config: the whole config.
        task: creates the model.
        mesh: the devices.
    """

    abstract: Any
    model_config: ModelConfig
    config: ml_collections.ConfigDict
    task: Task
    mesh: Mesh

    def initial(self, file: weights.WeightsFile | None = None) -> Any:
        """From `init.weights` if given, otherwise drawn from the seed.

        The weights may be those of the model's backbone alone; the rest is then drawn from the seed.

        Args:
            file: what `weights.read_file` returned for `init.weights`; None: it is read here.

        Raises:
            UserError: the weights are not this model's.
        """
        if self.config.init.weights is None:
            return self._drawn()
        file = file or weights.read_file(self.config.init.weights)
        if self.is_of_backbone(file):
            return self._with_backbone(file)
        return self.read(file, fits=self.task.fits)

    def is_of_backbone(self, file: weights.WeightsFile) -> bool:
        """Whether a file holds the backbone of the model only, such as a classifier that a segmenter starts from."""
        return "backbone" in self.abstract and weights.family_of(file) != self.model_config.family

    def _with_backbone(self, file: weights.WeightsFile) -> Any:
        """Drawn from the seed, but for the backbone, which is that of the file without its classifier."""
        params = self._drawn()
        params["backbone"], changes = weights.params_from(
            file, self.abstract["backbone"], self.model_config.backbone, fit=self.task.fits
        )
        log.info(
            "%s: the backbone; drawn from the seed: %s", file.path, ", ".join(sorted(params.keys() - {"backbone"}))
        )
        self._report(file, changes)
        return params

    def _drawn(self) -> Any:
        """From the seed."""

        # Eagerly, one parameter after the other: under jit, compiling the many draws takes five times as long as
        # drawing. Each goes from host memory to the devices that keep it, so that no device ever holds all.
        def place(array: np.ndarray) -> jax.Array:
            return sharding.place(array, sharding.state_sharding(array.shape, self.mesh))

        model = self.task.create_model(Keys(nnx.Rngs(self.config.seed).params(), place))
        return nnx.to_pure_dict(nnx.state(model))

    def read(self, source: str | weights.WeightsFile, *, fits: Collection[weights.Fit] | None = None) -> Any:
        """Reads parameters from a weights file.

        Args:
            source: its path, or what `weights.read_file` returned.
            fits: what may be changed to fit, see `weights.load_weights`; None: what the task allows, without the
                classifier. Each change is logged.

        Raises:
            UserError: the parameters are not this model's.
        """
        if fits is None:
            fits = [kind for kind in self.task.fits if kind != "classifier"]
        file = source if isinstance(source, weights.WeightsFile) else weights.read_file(source)
        params, changes = weights.params_from(file, self.abstract, self.model_config, fit=fits)
        self._report(file, changes)
        return params

    def _report(self, file: weights.WeightsFile, changes: Collection[weights.Change]) -> None:
        for line in weights.summary(changes):
            log.warning("%s, changed to fit the model: %s", file.path, line)


@dataclasses.dataclass(frozen=True)
class States:
    """Creates training states.

    Attributes:
        params: creates the parameters.
        optimizer: the optimizer of the training.
        with_ema: whether the state has a moving average.
    """

    params: Parameters
    optimizer: optax.GradientTransformation
    with_ema: bool

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        return sharding.sharded(jax.eval_shape(self._new, self.params.abstract), self.params.mesh)

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def initial(self, file: weights.WeightsFile | None = None) -> TrainState:
        """The state before the first step, on all devices of the mesh; `file` as for `Parameters.initial`."""
        create = jax.jit(self._new, out_shardings=self.shardings, donate_argnums=0)
        return create(self.params.initial(file))

    def _new(self, params: Any) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if self.with_ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), ema)
