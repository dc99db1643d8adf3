"""The data of an experiment: sources by split, and this process's rows of each batch."""

import functools
import math
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from polaformer_jax.data.pipeline import Passes
from polaformer_jax.data.records import Source
from polaformer_jax.data.workers import Stream, check_shared_memory, check_start
from polaformer_jax.training.sharding import local_rows
from polaformer_jax.training.tasks import Shapes, Task


class Inputs:
    """Opens each split once, on first use. Creating it reads nothing.

    Args:
        config: the whole config.
        task: opens sources and makes batches.
        mesh: the devices over which a batch is split.
        epoch_examples: by how many training examples an epoch is counted; None: by their number.
    """

    def __init__(self, config: ml_collections.ConfigDict, task: Task, *, mesh: Mesh, epoch_examples: int | None):
        self._config, self._task, self._mesh, self._epoch_examples = config, task, mesh, epoch_examples

    @functools.cached_property
    def _sources(self) -> dict[str, Source]:
        return {}

    def source(self, split: str) -> Source:
        """The records of a split."""
        if split not in self._sources:
            self._sources[split] = self._task.open_source(split)
        return self._sources[split]

    @property
    def train_source(self) -> Source:
        return self.source(self._config.data.train_split)

    @property
    def eval_source(self) -> Source:
        return self.source(self._config.data.eval_split)

    @property
    def report_split(self) -> str:
        """The split on which the best checkpoint is reported; it may have been chosen by another one."""
        return self._config.data.test_split or self._config.data.eval_split

    @property
    def epoch_examples(self) -> int:
        """The number of training examples by which an epoch is counted."""
        return len(self.train_source) if self._epoch_examples is None else self._epoch_examples

    @property
    def eval_batch_size(self) -> int:
        """`eval.batch_size`, rounded up to a multiple of the devices."""
        return self._config.eval.batch_size + -self._config.eval.batch_size % self._mesh.size

    def train_batches(self, start: int) -> Stream:
        """This process's rows of each training batch from step `start` on, without end."""
        reading = self._reading(self._config.train.batch_size)
        return self._task.train_batches(self.train_source, start=start, **reading)

    def eval_batches(self, split: str) -> Passes:
        """Batches of a whole split, without augmentation."""
        reading = self._reading(self.eval_batch_size)
        return self._task.eval_batches(self.source(split), batch_size=self.eval_batch_size, **reading)

    def check_workers(self, split: str, *, training: bool) -> None:
        """Raises a UserError if data workers cannot be started, or their batches do not fit into shared memory.

        Args:
            split: that is evaluated.
            training: whether training batches are read as well as those of an evaluation.
        """
        check_start(self._config.data.workers)
        batches = {"evaluation": self._bytes(self._task.eval_shapes(self.source(split)), self.eval_batch_size)}
        if training:
            batches["training"] = self._bytes(self._task.batch_shapes(), self._config.train.batch_size)
        check_shared_memory(self._config.data.workers, self._config.data.prefetch, batches)

    def _bytes(self, shapes: Shapes, batch_size: int) -> int:
        """Of this process's rows of a batch."""
        example = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values())
        return example * len(local_rows(self._mesh, batch_size))

    def describe_batch(self, step: int) -> list[str]:
        """Names of the records in the whole training batch of a step."""
        source = self.train_source
        return [source.describe(index) for index in self._task.batch_indices(source, step)]

    def _reading(self, batch_size: int) -> dict[str, Any]:
        return {
            "rows": local_rows(self._mesh, batch_size),
            "workers": self._config.data.workers,
            "prefetch": self._config.data.prefetch,
            "timeout_s": self._config.watchdog.input_s,
        }
