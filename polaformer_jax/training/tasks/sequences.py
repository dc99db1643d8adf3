"""Classification of sequences, the tasks of the Long Range Arena, with batches in length buckets."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from polaformer_jax.data.lra import buckets
from polaformer_jax.data.lra.facts import facts_of
from polaformer_jax.data.lra.source import SequenceSource, open_source
from polaformer_jax.data.pipeline import Passes
from polaformer_jax.data.workers import Stream
from polaformer_jax.models import registry
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.pola_sequence import Sequences
from polaformer_jax.training.metrics import Sums, masked
from polaformer_jax.training.tasks.classification import Classification
from polaformer_jax.training.tasks.task import Batch, Shapes, computation

_ARCHITECTURE = ("attention", "alpha", "kernel_size")


class SequenceClassification(Classification):
    """Sequences, or pairs of them, with one label each; cross-entropy. See `Task`."""

    examples = "sequences"
    fits = ()  # the length of the position tables is fixed by the task

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config
        self._facts = facts_of(config.task.name)

    def create_model(self, rngs: nnx.Rngs | Keys, *, max_length: int | None = None) -> nnx.Module:
        """The config's model; `max_length` replaces the task's."""
        config = self._config.model
        model = registry.create(
            registry.model_config(
                config.name,
                num_classes=config.num_classes,
                vocabulary=self._facts.vocabulary,
                max_length=max_length or self._facts.max_length,
                texts=self._facts.texts,
                **{name: config[name] for name in _ARCHITECTURE if config[name] is not None},
            ),
            **computation(config),
            rngs=rngs,
        )
        model.remat = config.remat
        return model

    def open_source(self, split: str) -> SequenceSource:
        task = self._config.task
        return open_source(self._config.data, task.name, task.tokenisation, split)

    def train_batches(self, source: SequenceSource, *, start: int, **reading: Any) -> Stream:
        return buckets.train_batches(
            source,
            batch_size=self._config.train.batch_size,
            seed=self._config.seed,
            start=start,
            **self._bucketing,
            **reading,
        )

    def batch_indices(self, source: SequenceSource, step: int) -> list[int]:
        size, seed = self._config.train.batch_size, self._config.seed
        return buckets.batch_indices(source, batch_size=size, seed=seed, buckets=self._config.data.buckets, batch=step)

    def eval_batches(self, source: SequenceSource, *, batch_size: int, **reading: Any) -> Passes:
        return buckets.eval_batches(source, batch_size=batch_size, **self._bucketing, **reading)

    @property
    def _bucketing(self) -> dict[str, Any]:
        return {"buckets": self._config.data.buckets, "on_error": self._config.data.on_error}

    def batch_shapes(self) -> Shapes:
        inner = () if self._facts.texts == 1 else (self._facts.texts,)
        return {
            "tokens": ((*inner, self._facts.max_length), np.int32),
            "length": (inner, np.int32),
            "label": ((), np.int32),
            "mask": ((), np.bool_),
        }

    def inputs(self, batch: Batch) -> Sequences:
        return Sequences(batch["tokens"], batch["length"])

    def augment(self, batch: Batch, key: Callable[[str], jax.Array]) -> Batch:
        del key  # nothing is random
        return {"inputs": self.inputs(batch), "label": batch["label"], "mask": batch["mask"]}

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        targets = jax.nn.one_hot(batch["label"], self._config.model.num_classes, dtype=logits.dtype)
        smoothed = optax.smooth_labels(targets, self._config.train.label_smoothing)
        return optax.softmax_cross_entropy(logits, smoothed)

    def metrics(self, logits: jax.Array, batch: Batch) -> Sums:
        label, mask = batch["label"], batch["mask"]
        return {
            "loss": masked(optax.softmax_cross_entropy_with_integer_labels(logits, label), mask),
            "accuracy": masked(jnp.argmax(logits, -1) == label, mask),
        }

    def metadata(self) -> Mapping[str, Any]:
        return {"task": {"name": self._config.task.name, "tokenisation": self._config.task.tokenisation}}
