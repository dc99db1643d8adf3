"""Batches grouped by length: functions of (seed, step), the same on any number of processes, every example once."""

import itertools

import numpy as np
import pytest

from polaformer_jax.data.lra import buckets, store
from polaformer_jax.data.lra.source import SequenceSource
from polaformer_jax.errors import UserError
from tests.support import tiny_lra


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny_lra.write(tmp_path_factory.mktemp("lra"), train=300, dev=45, longest=1900)


def source(data_dir, split="train", task="listops"):
    return SequenceSource(
        task, data_dir=data_dir, tokenisation="no_brackets" if task == "listops" else None, split=split
    )


def take(stream, count):
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def examples(batch):
    """The unpadded examples of a batch, as things that can be compared and counted."""
    rows = zip(batch["tokens"], batch["length"], batch["label"], batch["mask"], strict=True)
    return [(tuple(tokens[:length].tolist()), int(label)) for tokens, length, label, mask in rows if mask]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_lengths_are_equal_parts_of_the_longest():
    assert buckets.bucket_sizes(2048, 8) == (256, 512, 768, 1024, 1280, 1536, 1792, 2048)
    assert buckets.bucket_sizes(1024, 1) == (1024,)
    assert buckets.bucket_sizes(10, 4) == (3, 5, 8, 10)


def test_a_batch_is_padded_to_the_smallest_length_that_takes_it(data_dir):
    for batch in take(buckets.train_batches(source(data_dir), batch_size=8, seed=0), 40):
        size, longest = batch["tokens"].shape[1], batch["length"].max()
        assert size == min(s for s in buckets.bucket_sizes(2048, 8) if s >= longest)
        there = np.arange(size) < batch["length"][:, None]
        assert (batch["tokens"][there] > 0).all() and not batch["tokens"][~there].any()


@pytest.mark.parametrize("start", [1, 15, 16, 1000])
def test_any_batch_can_be_computed_alone(data_dir, start):
    straight = buckets.train_batches(source(data_dir), batch_size=8, seed=3)
    for one, other in zip(
        itertools.islice(straight, start, start + 3),
        take(buckets.train_batches(source(data_dir), batch_size=8, seed=3, start=start), 3),
        strict=True,
    ):
        assert_same(one, other)
    straight.close()


def test_processes_share_a_batch_and_pad_it_alike(data_dir):
    whole = take(buckets.train_batches(source(data_dir), batch_size=8, seed=0), 34)
    parts = [
        take(buckets.train_batches(source(data_dir), batch_size=8, seed=0, rows=np.array([p, p + 4])), 34)
        for p in range(4)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for part, share in enumerate(shares):
            assert_same({name: array[part::4] for name, array in batch.items()}, share)


@pytest.mark.slow
def test_workers_change_nothing(data_dir):
    alone = take(buckets.train_batches(source(data_dir), batch_size=8, seed=0), 5)
    helped = take(buckets.train_batches(source(data_dir), batch_size=8, seed=0, workers=2), 5)
    for one, other in zip(alone, helped, strict=True):
        assert_same(one, other)


def test_a_window_holds_the_examples_of_the_stream(data_dir):
    """The same as without grouping: what is grouped is only who shares a batch with whom."""
    count = buckets.WINDOW
    grouped = take(buckets.train_batches(source(data_dir), batch_size=8, seed=0), 2 * count)
    plain = take(buckets.train_batches(source(data_dir), batch_size=8, seed=0, buckets=1), 2 * count)
    assert {batch["tokens"].shape[1] for batch in plain} == {2048}
    for window in (slice(0, count), slice(count, 2 * count)):
        one, other = ([e for b in batches[window] for e in examples(b)] for batches in (grouped, plain))
        assert sorted(one) == sorted(other)


def test_grouping_saves_most_of_the_padding(data_dir):
    """Random batches are nearly as long as the longest example; grouped ones hardly longer than their mean."""
    batches = take(buckets.train_batches(source(data_dir), batch_size=8, seed=0), buckets.WINDOW)
    padded = np.mean([batch["tokens"].shape[1] for batch in batches])
    mean = np.mean([batch["length"].mean() for batch in batches])
    assert padded < 1.25 * mean < 0.7 * 2048


def test_long_and_short_batches_come_in_random_order(data_dir):
    sizes = [b["tokens"].shape[1] for b in take(buckets.train_batches(source(data_dir), batch_size=8, seed=0), 32)]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)


def test_another_seed_gives_other_batches(data_dir):
    one, other = (next(buckets.train_batches(source(data_dir), batch_size=8, seed=seed)) for seed in (0, 1))
    assert examples(one) != examples(other)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [1, 8])
def test_evaluation_takes_every_example_once(data_dir, count, number):
    split = source(data_dir, "dev")
    seen, order = [], []
    parts = [
        buckets.eval_batches(split, batch_size=16, buckets=number, rows=rows)
        for rows in np.arange(16).reshape(count, -1)
    ]
    for shares in zip(*parts, strict=True):
        assert len({share["tokens"].shape for share in shares}) == 1
        seen += [example for share in shares for example in examples(share)]
        order.append([share["mask"].sum() for share in shares])
    expected = [(tuple(split[i]["tokens"].tolist()), split[i]["label"]) for i in parts[0].order]
    assert seen == expected and len(seen) == 45
    assert sorted(parts[0].order) == list(range(45))
    for part in parts:
        part.close()


def test_of_a_pair_the_longer_text_counts(data_dir):
    for batch in take(buckets.train_batches(source(data_dir, task="retrieval"), batch_size=4, seed=0), 10):
        assert batch["tokens"].shape[:2] == batch["length"].shape == (4, 2)
        assert 0 <= batch["tokens"].shape[2] - batch["length"].max() < 512


def test_what_cannot_be_shared_out(data_dir):
    with pytest.raises(UserError, match=r"rows \[9\] of a batch of 9: expected some of 0 to 8"):
        buckets.train_batches(source(data_dir), batch_size=9, seed=0, rows=np.array([9]))
    with pytest.raises(UserError, match="start is -1"):
        buckets.train_batches(source(data_dir), batch_size=8, seed=0, start=-1)


def test_a_damaged_record_ends_the_run_and_is_named(data_dir, monkeypatch):
    monkeypatch.setattr(store, "decode", lambda record, texts: (3, (np.zeros(5, np.uint8),) * texts))
    with pytest.raises(UserError, match=r"lra_listops no_brackets/train\[\d+\].*does not fit its index"):
        next(buckets.train_batches(source(data_dir), batch_size=8, seed=0))
