"""The interface of tasks: everything that differs between kinds of data and models is behind it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from polaformer_jax.data.pipeline import Passes
from polaformer_jax.data.records import Source
from polaformer_jax.data.workers import Stream
from polaformer_jax.models.initializers import Keys
from polaformer_jax.training.metrics import Mean, Sums
from polaformer_jax.weights import Fit

Batch = dict[str, jax.Array]
Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # of one example, and the dtype, of each array of a batch


def computation(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """How the model of a config is computed and stored, as `registry.create` takes it.

    Args:
        model: the config's `model` part.
    """
    types = {name: jnp.dtype(model[name]) for name in ("dtype", "param_dtype")}
    return {"attention_impl": model.attention_impl, **types}


class Task(Protocol):
    """A task, created from a whole config. Creating one reads nothing.

    Attributes:
        examples: what examples are called, in the plural.
        headline: the evaluation metric by which a result is told, in [0, 1]; greater is better.
        draws_with_model: whether `pictures` uses the model.
        fits: what may be changed in a run's initial weights to fit the model, see `weights.load_weights`.
    """

    examples: str
    headline: str
    draws_with_model: bool
    fits: Collection[Fit]

    # The model.

    def create_model(self, rngs: nnx.Rngs | Keys) -> nnx.Module:
        """The model that the config describes, with initial weights. Raises a UserError if it cannot be built."""

    # Data on the host. `reading`: the options of `pipeline.train_batches` for rows and workers.

    def open_source(self, split: str) -> Source:
        """The records of a split. Raises a UserError that names what is missing."""

    def train_batches(self, source: Source, *, start: int, **reading: Any) -> Stream:
        """This process's rows of each training batch from step `start` on, without end."""

    def batch_indices(self, source: Source, step: int) -> list[int]:
        """The indices of the records in the whole training batch of a step."""

    def eval_batches(self, source: Source, *, batch_size: int, **reading: Any) -> Passes:
        """Batches of a whole split."""

    def batch_shapes(self) -> Shapes:
        """Of training batches; of the largest, where they differ."""

    def eval_shapes(self, source: Source) -> Shapes:
        """Of the batches of an evaluation; of the largest, where they differ."""

    # Computation on the device, inside the compiled steps.

    def augment(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        """The augmented training batch: `inputs`, the model's input, `mask`, and all that `losses` needs.

        Where the losses of examples do not count alike, `weight` (B,) says how much each counts, 0 for padding.

        Receives the whole batch, so that its examples may be mixed; it is split into micro-batches afterwards. `key`
        returns the random key for a purpose.
        """

    def losses(self, outputs: Any, batch: Batch) -> jax.Array:
        """The training loss of each example of an augmented batch, (B,), in at least float32.

        Args:
            outputs: what the model returned, in at least float32.
        """

    def metrics(self, outputs: Any, batch: Batch) -> Sums:
        """Metrics of training, summed over the valid examples of an augmented batch."""

    def evaluate(self, model: nnx.Module, batch: Batch) -> tuple[Sums, Batch]:
        """Evaluates a batch.

        Returns:
            The sums of metrics over the valid examples, one of them `loss`, which counts examples; and arrays of length
            B, the reported values of each example.
        """

    # Reports.

    def result(self, mean: Mean, source: Source) -> tuple[dict[str, float], dict[str, Any]]:
        """From the sums of a whole split: metrics by name, and details of them for `eval.json`."""

    def table(self, outputs: Mapping[str, np.ndarray], source: Source) -> list[list[Any]]:
        """A table of the results, in its first row the names of its columns, then a row for each example.

        Args:
            outputs: the reported values, by increasing index of the examples, and `mask`, False where an example could
                not be decoded.
        """

    def pictures(
        self, evaluation: "Evaluated", source: Source, model: nnx.Module | None
    ) -> Mapping[str, Callable[[], Figure]]:
        """What is drawn at the end of a run: functions by name of the file.

        Args:
            model: the evaluated model, on one device of process 0, which draws; None unless `draws_with_model`.
        """

    def metadata(self) -> Mapping[str, Any]:
        """How inputs are prepared, for the metadata of a weights file: names and values for JSON."""


class Evaluated(Protocol):
    """What pictures show of an evaluation.

    Attributes:
        metrics, details: see `Task.result`.
        outputs: see `Task.table`.
    """

    metrics: dict[str, float]
    details: dict[str, Any]
    outputs: dict[str, np.ndarray]
