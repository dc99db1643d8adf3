"""The interface of tasks: everything that differs between kinds of data and models is behind it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from polaformer_jax.data.pipeline import Passes
from polaformer_jax.data.records import Source
from polaformer_jax.data.workers import Stream
from polaformer_jax.models.initializers import Keys
from polaformer_jax.training.metrics import Sums
from polaformer_jax.weights import Fit

Batch = dict[str, jax.Array]


class Task(Protocol):
    """A task, created from a whole config. Creating one reads nothing.

    Attributes:
        examples: what examples are called, in the plural.
        fits: what may be changed in a run's initial weights to fit the model, see `weights.load_weights`.
    """

    examples: str
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

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape of one example and dtype of each array of a batch; of the largest batch, where they differ."""

    # Computation on the device, inside the compiled steps.

    def inputs(self, batch: Batch) -> Any:
        """The model's input in evaluation."""

    def augment(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        """The augmented training batch: `inputs`, the model's input, and all that `losses` needs.

        Receives the whole batch, so that its examples may be mixed; it is split into micro-batches afterwards. `key`
        returns the random key for a purpose.
        """

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The training loss of each example of an augmented batch, (B,), in at least float32."""

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        """Evaluation metrics, summed over the batch's valid examples."""

    def outputs(self, logits: jax.Array) -> Batch:
        """The reported values of each example: arrays of length B."""

    # Reports.

    def picture_of(self, source: Source) -> Callable[[int], np.ndarray] | None:
        """A function from an example's index to the picture that the model saw; None if examples have no pictures."""

    def metadata(self) -> Mapping[str, Any]:
        """How inputs are prepared, for the metadata of a weights file: names and values for JSON."""
