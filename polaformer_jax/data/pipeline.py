"""From a source to batches that are a pure function of (seed, step).

Grain's random-access datasets are chained so that batch b can be computed without batches 0 to b-1; resuming is a slice
from b on, with any number of processes and workers. Global batch b of B examples holds the stream positions b·B to
(b+1)·B - 1, in this order, and a process computes those rows of it that it is asked for. Together with the seed, a
position determines the record (a new permutation each epoch) and every random number of its transform.
"""

from collections.abc import Iterator

import grain
import numpy as np
from absl import logging

from polaformer_jax.data.records import Batch, CorruptRecordError, Example, Source, Transform
from polaformer_jax.data.workers import Stream
from polaformer_jax.errors import UserError


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: np.ndarray | None = None,
    workers: int = 0,
    prefetch: int = 2,
    timeout_s: float | None = None,
) -> Stream:
    """Endless shuffled batches, from global batch number `start` on.

    Args:
        source: where the records come from.
        transform: turns a record and a random generator into an example; `transform.on_error` says what happens with
            broken records.
        batch_size: examples in a global batch, over all processes.
        seed: a non-negative integer; for a given source, transform and batch_size, batch b depends only on (seed, b).
        start: the first global batch to compute; a large number costs nothing.
        rows: which rows of every global batch this process computes, (n,) int, in this order; None: all of them.
        workers: number of worker processes of this process; 0 computes in the calling thread.
        prefetch: batches each worker keeps ready (see `workers.Stream`).
        timeout_s: the longest wait for a batch from the workers; None sets no limit.

    Returns:
        An iterator of dicts of arrays with leading dimension `len(rows)`; to be closed with `close()`.

    Raises:
        UserError: a batch without examples, or a source without any; from `next`, a corrupt record or a label outside
            the classes, naming the record.
        RuntimeError: from `next`, any other failure with a record, naming it, or a worker that died.
    """
    rows = checked_rows(source, batch_size, rows)
    if start < 0:
        raise UserError(f"start is {start}, expected a batch number from 0 on")
    indices, transform_seed = _shuffled(len(source), seed)
    # Before rows are chosen: the generator then depends on the position in the global stream.
    examples = indices.random_map(_Load(source, transform), seed=transform_seed)
    dataset = _batched(examples, batch_size, rows)[start:]
    return Stream(dataset, workers=workers, prefetch=prefetch, timeout_s=timeout_s)


def batch_indices(length: int, *, batch_size: int, seed: int, batch: int) -> list[int]:
    """Indices of the records of a global batch of `train_batches`, for a source of that length."""
    indices, _ = _shuffled(length, seed)
    return [int(indices[batch * batch_size + place]) for place in range(batch_size)]


def _shuffled(length: int, seed: int) -> tuple[grain.MapDataset, int]:
    """The indices of a source, endless and reshuffled for each epoch, and a seed for the transforms of records."""
    # Explicit seeds: those that Grain derives depend on an operation's place in the chain. Hashed, because Grain
    # permutes epoch e by seed + e, which would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    shuffle_seed, transform_seed = (int(n) for n in np.random.SeedSequence(seed).generate_state(2))
    return grain.MapDataset.range(length).shuffle(seed=shuffle_seed).repeat(), transform_seed


class Passes:
    """Batches of a dataset, from the first to the last, any number of times; every `iter()` is one pass.

    Workers stay alive between passes and begin the next one while they wait. Only one pass runs at a time: beginning
    another before the last has ended restarts the workers.

    Args:
        dataset: its elements are whole batches.
        order: index in the split of the example at each position of the pass, at least the number of examples for a
            blank one; None: the order of the split. Positions beyond it are blank.
        workers, prefetch, timeout_s: see `workers.Stream`.

    `len()` is the number of batches in a pass.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        *,
        order: np.ndarray | None = None,
        workers: int = 0,
        prefetch: int = 2,
        timeout_s: float | None = None,
    ):
        self.order = order
        self._length = len(dataset)
        self._dataset = dataset.repeat()
        self._options = {"workers": workers, "prefetch": prefetch, "timeout_s": timeout_s}
        self._stream: Stream | None = None
        self._taken = 0  # batches taken in the current pass

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self._taken:
            self.close()
        if self._stream is None:
            self._stream = Stream(self._dataset, **self._options)
        stream = self._stream
        for number in range(1, self._length + 1):
            batch = next(stream)
            self._taken = number % self._length
            yield batch

    def close(self) -> None:
        """Stops the workers; a later pass starts new ones."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._taken = None, 0


class EvalBatches(Passes):
    """All examples of a source in order, each exactly once, where the processes' rows are all those of a batch.

    The last batch is padded with blank examples (`mask` False), so that every process has the same number of batches of
    the same size. Arguments and errors as in `train_batches`.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        rows: np.ndarray | None = None,
        **options,
    ):
        rows = checked_rows(source, batch_size, rows)
        padded = grain.MapDataset.range(-(-len(source) // batch_size) * batch_size)
        super().__init__(_batched(padded.map(LoadOrPad(source, transform)), batch_size, rows), **options)


class _Load:
    """Turns an index and a generator into an example; any failure becomes an error that names the record."""

    def __init__(self, source: Source, transform: Transform):
        self._source = source
        self._transform = transform

    def __call__(self, index: int, rng: np.random.Generator | None) -> Example:
        name, record = self._source.describe(index), {}
        # Errors raised here hold only text: an exception that cannot be pickled would hang the main process, and a
        # StopIteration would end the iteration.
        try:
            record = self._source[index]
            return self._transform(record, rng)
        except (CorruptRecordError, OSError) as error:
            if self._transform.on_error == "stop":
                raise UserError(f"{name}: {error}") from error
            logging.warning("skipped %s: %s", name, error)
            return self._transform.blank(record.get("label", -1))  # -1: the label is unknown too
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error


class LoadOrPad(_Load):
    """As `_Load`, without a generator; indices past the end give blank examples."""

    def __call__(self, index: int) -> Example:
        return super().__call__(index, None) if index < len(self._source) else self._transform.blank()


class _Rows:
    """Random access to the examples of some rows of each batch, one batch after the other."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: np.ndarray):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, place: int) -> Example:
        batch, row = divmod(place, len(self._rows))
        return self._examples[batch * self._batch_size + int(self._rows[row])]


def _batched(examples: grain.MapDataset, batch_size: int, rows: np.ndarray) -> grain.MapDataset:
    """These rows of each batch of `batch_size` examples."""
    return grain.MapDataset.source(_Rows(examples, batch_size, rows)).batch(len(rows), drop_remainder=True)


def checked_rows(source: Source, batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """The rows of a batch that a process computes, all of them for None.

    Raises:
        UserError: no examples, or rows outside the batch.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}, expected at least 1")
    if not len(source):
        raise UserError(f"{source.name} has no examples")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"rows {rows.tolist()} of a batch of {batch_size}: expected some of 0 to {batch_size - 1}")
    return rows
