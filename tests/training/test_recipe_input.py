"""The input of the full recipe: the same batches however they are made, and no more memory however many there are."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from polaformer_jax.benchmark.input import make_photographs
from polaformer_jax.data.images.transforms import train_transform
from polaformer_jax.data.pipeline import train_batches
from polaformer_jax.data.sources import open_source
from tests.data.test_pipeline import digest, shares, union
from tests.support.recipes import recipe

pytestmark = pytest.mark.slow
CONFIG = recipe("pola_swin", "t")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder, 96)
    return open_source(SimpleNamespace(source="folder", name="photographs", data_dir=str(folder)), "train")


def take(source, count, *, config=CONFIG, **options):
    batches = train_batches(source, train_transform(config), batch_size=32, seed=3, **options)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def test_batches_are_the_same_for_any_number_of_workers_and_processes(source):
    expected = [*map(digest, take(source, 5))]  # over the end of an epoch
    assert len(set(expected)) == 5
    for workers in (1, 2, 4):
        assert [*map(digest, take(source, 5, workers=workers))] == expected, workers
    for workers in (0, 2):
        parts = [take(source, 5, workers=workers, rows=rows) for rows in shares(32, 2)]
        assert [digest(union(step)) for step in zip(*parts, strict=True)] == expected, workers


def test_memory_stays_flat_over_twenty_thousand_images(source):
    config = recipe("pola_swin", "t")
    config.model.img_size = 64  # as many images in a third of the time
    batches = train_batches(source, train_transform(config), batch_size=64, seed=3, workers=2, prefetch=1)
    used = []
    try:
        for number in range(20_000 // 64 + 1):
            next(batches)
            if number % 13 == 0:
                gc.collect()
                children = _children()
                assert len(children) >= 2  # the workers
                used.append(_megabytes(os.getpid()) + sum(map(_megabytes, children)))
    finally:
        batches.close()
    early, late = np.median(used[4:9]), np.median(used[-5:])
    assert late < early + 40, used  # a megabyte is 80 of these images: 20,000 would be 250


def _megabytes(pid):
    """Of memory, what is shared counted in parts."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def _children():
    """Of all threads: Grain starts its workers from one of its own."""
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
