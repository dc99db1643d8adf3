"""Batches are a pure function of (seed, step); evaluation counts every example once; errors name the record."""

import hashlib
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest

from polaformer_jax.data.images.transforms import EvalImageTransform, TrainImageTransform
from polaformer_jax.data.pipeline import EvalBatches, train_batches
from polaformer_jax.data.records import CorruptRecordError, Source
from polaformer_jax.data.sources import open_source
from polaformer_jax.errors import UserError


class Numbers:
    """A source whose records are their own indices."""

    name, origin, digest, num_classes, class_names = "numbers", "made up", "0", 10, None

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return {"index": index}

    def describe(self, index):
        return f"numbers[{index}]"


class Trace:
    """Shows which record and which random number an example was made from."""

    on_error = "stop"

    def __call__(self, record, rng):
        noise = rng.integers(2**62) if rng else 0
        return {"index": np.int64(record["index"]), "noise": np.int64(noise), "mask": np.bool_(True)}

    def blank(self, label=0):
        return {"index": np.int64(-1), "noise": np.int64(0), "mask": np.bool_(False)}


class Fail(Trace):
    """Fails at record 3, in a way that is told by name."""

    def __init__(self, how, on_error="stop"):
        self._how, self.on_error = how, on_error

    def __call__(self, record, rng):
        if record["index"] == 3:
            if self._how == "exit":
                raise SystemExit(0)
            if self._how == "stop":
                raise StopIteration
            if self._how == "unpicklable":
                raise type("LocalError", (Exception,), {"__reduce__": lambda self: (open, ("/nonexistent",))})(
                    "own kind"
                )
            if self._how == "corrupt":
                raise CorruptRecordError("no image")
            if self._how == "unreadable":
                raise OSError("cannot read")
        return super().__call__(record, rng)


def digest(batch):
    content = b"".join(k.encode() + batch[k].dtype.str.encode() + batch[k].tobytes() for k in sorted(batch))
    return hashlib.sha256(content).hexdigest()


def take(count, *, length=50, transform=None, **options):
    batches = train_batches(Numbers(length), transform or Trace(), **{"batch_size": 8, "seed": 0} | options)
    result = [next(batches) for _ in range(count)]
    batches.close()
    return result


def shares(batch_size, processes):
    """Rows of a batch for each process, in several stretches, as the devices of a pod may have them."""
    return [np.sort(rows) for rows in np.random.default_rng(0).permutation(batch_size).reshape(processes, -1)]


def union(parts):
    """The global batch from its processes' parts."""
    rows = np.concatenate(shares(sum(len(part["mask"]) for part in parts), len(parts)))
    return {name: np.concatenate([part[name] for part in parts])[np.argsort(rows)] for name in parts[0]}


def test_the_test_source_is_a_source():
    assert isinstance(Numbers(3), Source)


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_are_the_same_for_any_number_of_processes(processes):
    parts = [take(20, rows=rows) for rows in shares(8, processes)]
    assert [digest(union(step)) for step in zip(*parts, strict=True)] == [digest(batch) for batch in take(20)]


@pytest.mark.parametrize(("workers", "start", "process"), [pytest.param(1, 7, 1, marks=pytest.mark.slow), (2, 5, 0)])
def test_batches_are_the_same_for_any_number_of_workers(workers, start, process):
    place = {"start": start, "rows": shares(8, 2)[process]}
    assert [*map(digest, take(6, workers=workers, **place))] == [*map(digest, take(6, **place))]


@pytest.mark.parametrize("start", [1, 6, 7, 30])
def test_starting_later_is_the_same_as_skipping(start):
    assert [*map(digest, take(10, start=start))] == [*map(digest, take(start + 10)[start:])]


def test_a_start_far_on_costs_nothing():
    begin = time.monotonic()
    take(1, start=10**9)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("length", [1, 2, 3, 50, 1437])
def test_every_epoch_is_a_permutation(length):
    epochs = np.concatenate([batch["index"] for batch in take(5, length=length, batch_size=length)]).reshape(5, length)
    assert (np.sort(epochs) == np.arange(length)).all()
    assert length < 50 or len({tuple(epoch) for epoch in epochs}) == 5


def test_seeds_differ_and_share_no_epoch():
    first, second = (np.stack([b["index"] for b in take(6, length=64, batch_size=64, seed=s)]) for s in (0, 1))
    assert not {tuple(epoch) for epoch in first} & {tuple(epoch) for epoch in second}
    assert [*map(digest, take(3, seed=5))] == [*map(digest, take(3, seed=5))]


def test_random_numbers_are_drawn_anew_for_every_example_and_epoch():
    noise = np.concatenate([batch["noise"] for batch in take(40, length=16, batch_size=16)])
    assert len(set(noise)) == noise.size


def test_training_batches_of_the_digits(digits_dir):
    data = SimpleNamespace(source="tfds", name="sklearn_digits", data_dir=digits_dir)
    source, transform = open_source(data, "train"), TrainImageTransform(32, num_classes=10)
    found = {}
    for workers in (0, 2):
        batches = train_batches(source, transform, batch_size=64, seed=1, start=21, workers=workers)
        found[workers] = [next(batches) for _ in range(3)]  # over the end of the first epoch
        batches.close()
    for batch in found[0] + found[2]:
        assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
            "image": (np.uint8, (64, 32, 32, 3)),
            "label": (np.int32, (64,)),
            "mask": (np.bool_, (64,)),
        }
        assert all(type(v) is np.ndarray for v in batch.values())  # not a view of memory shared with a worker
    assert [*map(digest, found[2])] == [*map(digest, found[0])]
    # Written down, so that another version of a library cannot change the order of the data unnoticed.
    assert found[0][0]["label"][:20].tolist() == [0, 7, 9, 1, 7, 2, 8, 5, 2, 2, 0, 7, 9, 5, 7, 2, 1, 6, 9, 6]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("length", "batch_size"), [(1, 4), (3, 4), (8, 8), (9, 4), (50, 8), (50, 64), (360, 100)])
def test_evaluation_takes_every_example_once(length, batch_size, processes):
    passes = [
        EvalBatches(Numbers(length), Trace(), batch_size=batch_size, rows=rows)
        for rows in shares(batch_size, processes)
    ]
    assert {len(batches) for batches in passes} == {-(-length // batch_size)}
    steps = [union(step) for step in zip(*passes, strict=True)]
    assert all(len(step["mask"]) == batch_size for step in steps)
    index, mask = (np.concatenate([step[name] for step in steps]) for name in ("index", "mask"))
    np.testing.assert_array_equal(index[mask], np.arange(length))
    assert (index[~mask] == -1).all() and not mask[length:].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_is_the_same_and_workers_stay(workers):
    batches = EvalBatches(Numbers(30), Trace(), batch_size=8, workers=workers)
    expected = [digest(batch) for batch in EvalBatches(Numbers(30), Trace(), batch_size=8)]
    streams = set()
    for _ in range(3):
        assert [digest(batch) for batch in batches] == expected
        streams.add(id(batches._stream))
    assert len(streams) == 1
    batches.close()


def test_a_pass_that_was_left_early_does_not_disturb_the_next():
    batches = EvalBatches(Numbers(30), Trace(), batch_size=8)
    expected = [digest(batch) for batch in batches]
    next(iter(batches))
    assert [digest(batch) for batch in batches] == expected
    batches.close()
    assert [digest(batch) for batch in batches] == expected


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("exit", RuntimeError),
        ("stop", RuntimeError),
        ("unpicklable", RuntimeError),
        ("corrupt", UserError),
        ("unreadable", UserError),
    ],
)
def test_a_failing_record_ends_the_data_with_its_name(how, error):
    batches = iter(EvalBatches(Numbers(8), Fail(how), batch_size=2))
    assert next(batches)["index"].tolist() == [0, 1]
    with pytest.raises(error, match=r"numbers\[3\]"):
        next(batches)


def test_an_error_in_a_worker_arrives_in_order_and_is_final():
    batches = train_batches(Numbers(8), Fail("unpicklable"), batch_size=1, seed=0, workers=2)
    expected = [int(b["index"][0]) for b in take(8, length=8, batch_size=1)]
    for index in expected[: expected.index(3)]:
        assert next(batches)["index"] == index
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"numbers\[3\]: LocalError: own kind"):
            next(batches)


@pytest.mark.parametrize("how", ["corrupt", "unreadable"])
def test_a_broken_record_can_be_skipped_and_is_named(how, caplog):
    with caplog.at_level(logging.WARNING):
        (batch,) = EvalBatches(Numbers(8), Fail(how, on_error="skip"), batch_size=8)
    assert batch["mask"].tolist() == [True] * 3 + [False] + [True] * 4
    assert batch["index"].tolist() == [0, 1, 2, -1, 4, 5, 6, 7]
    assert "skipped numbers[3]" in caplog.text


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_label_outside_the_classes_ends_the_data(digits_dir, on_error):
    data = SimpleNamespace(source="tfds", name="sklearn_digits", data_dir=digits_dir)
    transform = EvalImageTransform(8, 8, num_classes=5, on_error=on_error)
    with pytest.raises(UserError, match=r"sklearn_digits/test\[\d+\]: label [5-9] is outside the 5 classes"):
        list(EvalBatches(open_source(data, "test"), transform, batch_size=60))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": np.array([0, 8])}, r"rows \[0, 8\] of a batch of 8: expected some of 0 to 7"),
        ({"rows": np.arange(0)}, r"rows \[\] of a batch of 8"),
        ({"batch_size": 0}, "batch size 0"),
        ({"length": 0}, "numbers has no examples"),
        ({"start": -1}, "start is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch 0"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        take(1, **options)


def test_a_closed_stream_says_so():
    batches = train_batches(Numbers(8), Trace(), batch_size=2, seed=0)
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
