"""What a run learns from, images or sequences: all that differs between the two stands behind one interface.

Experiment, loop and evaluation know this interface and no modality; `of` chooses by the config's `task.name`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from flax import nnx

from polaformer_jax import weights
from polaformer_jax.data.pipeline import Passes
from polaformer_jax.data.sources import Source
from polaformer_jax.data.workers import Stream
from polaformer_jax.models.initializers import Keys
from polaformer_jax.training.tasks.task import Task


class Modality(Protocol):
    """Made from a whole config; making one reads nothing.

    Attributes:
      examples: what examples are called, in the plural.
      fit: what of a run's initial weights may be changed to fit, see `weights.load_weights`.
      task: what is learnt.
    """

    examples: str
    fit: Collection[weights.Fit]
    task: Task

    def build_model(self, rngs: nnx.Rngs | Keys) -> nnx.Module:
        """The model that the config describes, with initial weights. A ValueError says what cannot be built."""

    def open_source(self, split: str) -> Source:
        """The records of a split; a UserError says what is missing."""

    def train_batches(self, source: Source, *, start: int, **reading: int) -> Stream:
        """This process's part of each training batch from step `start` on, without end."""

    def batch_indices(self, source: Source, step: int) -> list[int]:
        """The records that the whole training batch of a step is made of."""

    def eval_batches(self, source: Source, *, batch_size: int, **reading: int) -> Passes:
        """Batches of a whole split."""

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape of one example and type of each array of a batch; of the largest, where batches differ."""

    def picture_of(self, source: Source) -> Callable[[int], np.ndarray] | None:
        """Gives what the model saw of an example as a picture; None: there is none to see."""

    def about(self) -> Mapping[str, Any]:
        """What a file of weights says of the preparation of its inputs: metadata names and values for JSON."""


def of(config) -> Modality:
    """The modality of a config."""
    # Imported here: images do not need the data of sequences, nor the other way round.
    if config.task.name == "image":
        from polaformer_jax.training.tasks.image_modality import ImageModality

        return ImageModality(config)
    from polaformer_jax.training.tasks.sequence_modality import SequenceModality

    return SequenceModality(config)
