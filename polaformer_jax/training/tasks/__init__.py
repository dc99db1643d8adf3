"""What is learnt: everything that differs between kinds of data and models is behind one interface, `Task`.

Experiment, step, loop and evaluation know this interface only; `task_of` chooses by the config's `task.name`.
"""

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
    """Made from a whole config; making one reads nothing.

    Attributes:
        examples: what examples are called, in the plural.
        fits: what may be changed in a run's initial weights to fit the model, see `weights.load_weights`.
    """

    examples: str
    fits: Collection[Fit]

    # The model.

    def create_model(self, rngs: nnx.Rngs | Keys) -> nnx.Module:
        """The model that the config describes, with initial weights. A UserError says what cannot be built."""

    # Data on the host. `reading` are the options of `pipeline.train_batches` about processes and workers.

    def open_source(self, split: str) -> Source:
        """The records of a split; a UserError says what is missing."""

    def train_batches(self, source: Source, *, start: int, **reading: int) -> Stream:
        """This process's part of each training batch from step `start` on, without end."""

    def batch_indices(self, source: Source, step: int) -> list[int]:
        """The indices of the records in the whole training batch of a step."""

    def eval_batches(self, source: Source, *, batch_size: int, **reading: int) -> Passes:
        """Batches of a whole split."""

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape of one example and dtype of each array of a batch; of the largest, where batches differ."""

    # Computation on the device, inside the compiled steps.

    def inputs(self, batch: Batch) -> Any:
        """What the model is called with in evaluation."""

    def augment(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        """A training batch with `inputs`, what the model is called with, and all that `losses` needs.

        Gets the whole batch, so that its examples may be mixed; it is split into micro-batches afterwards. `key` gives
        the random key for a purpose.
        """

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The training loss of each example of an augmented batch, (B,), float32 or wider."""

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        """Evaluation metrics, summed over the batch's unmasked examples."""

    def outputs(self, logits: jax.Array) -> Batch:
        """What is reported of each example: arrays of length B."""

    # Reports.

    def picture_of(self, source: Source) -> Callable[[int], np.ndarray] | None:
        """Maps an index to what the model saw of an example as a picture; None where there is nothing to show."""

    def metadata(self) -> Mapping[str, Any]:
        """How inputs are prepared, for the metadata of a weights file: names and values for JSON."""


def task_of(config) -> Task:
    """The task of a config."""
    # Imported here: image tasks need nothing of sequences, nor the other way round.
    if config.task.name == "image":
        from polaformer_jax.training.tasks.images import ImageClassification

        return ImageClassification(config)
    from polaformer_jax.training.tasks.sequences import SequenceClassification

    return SequenceClassification(config)
