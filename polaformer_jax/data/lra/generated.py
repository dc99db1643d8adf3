"""Generates ListOps and Pathfinder-32 on all cores; what is written does not depend on how many there are."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from multiprocessing import connection

import numpy as np
from etils import epath
from tqdm import tqdm

from polaformer_jax.data.lra import listops, pathfinder_pictures, store
from polaformer_jax.errors import UserError

# The number of examples, and the split's shares: train, dev, test.
LISTOPS_EXAMPLES, LISTOPS_SHARES = 100_000, (48, 1, 1)
PATHFINDER_EXAMPLES, PATHFINDER_SHARES = 200_000, (8, 1, 1)
_UNBOUNDED = 2**31


def cores() -> int:
    """How many processes can run at once here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_of(number: int, examples: int, shares: tuple[int, int, int]) -> str:
    """The split of example `number`: the first go to train, then to dev, then to test."""
    dev, test = (examples * share // sum(shares) for share in shares[1:])
    return "train" if number < examples - dev - test else "dev" if number < examples - test else "test"


def prepare_listops(
    data_dir: epath.PathLike,
    *,
    seed: int = 0,
    examples: int | None = None,
    processes: int = 1,
    name: str = "lra_listops",
    between: tuple[int, int] = listops.LENGTHS,
) -> None:
    """Writes `lra_listops`: distinct expressions, in the order of their draws.

    Args:
      data_dir: the directory that holds all prepared data sets.
      seed: a non-negative integer.
      examples: for all splits together; by default 100,000.
      processes: does not change what is written.
      name, between: of what is written, and the least and greatest number of symbols of an expression.

    Raises:
      UserError: see `store.writing`.
    """
    examples = examples or LISTOPS_EXAMPLES
    settings = {"seed": seed, "examples": examples}
    seen = set()
    with (
        store.writing(name, data_dir, origin=f"generated from seed {seed}", settings=settings) as writer,
        _blocks(_ListopsBlock(seed, between), _UNBOUNDED, processes) as blocks,
        tqdm(total=examples, desc=name, unit=" examples", disable=None) as progress,
    ):
        while len(seen) < examples:
            block = next(blocks)
            ends = np.cumsum(block["lengths"]).tolist()
            for begin, end, value in zip([0, *ends], ends, block["values"].tolist(), strict=False):
                symbols = block["symbols"][begin:end]
                text = symbols.tobytes()
                digest = hashlib.blake2b(text, digest_size=16).digest()
                if digest in seen or len(seen) == examples:
                    continue
                split = split_of(len(seen), examples, LISTOPS_SHARES)
                seen.add(digest)
                shorter = len(symbols) - int(np.count_nonzero(symbols == listops.CLOSE))
                writer.add(split, value, text, lengths=(len(symbols), shorter))
                progress.update()


def prepare_pathfinder(
    data_dir: epath.PathLike, *, seed: int = 0, examples: int | None = None, processes: int = 1
) -> None:
    """Writes `lra_pathfinder`; arguments as in `prepare_listops`, by default 200,000 examples."""
    examples = examples or PATHFINDER_EXAMPLES
    settings = {"seed": seed, "examples": examples}
    count = -(-examples // pathfinder_pictures.BLOCK)
    with (
        store.writing("lra_pathfinder", data_dir, origin=f"generated from seed {seed}", settings=settings) as writer,
        _blocks(_PathfinderBlock(seed, examples), count, processes) as blocks,
        tqdm(total=examples, desc="lra_pathfinder", unit=" examples", disable=None) as progress,
    ):
        number = 0
        while number < examples:
            block = next(blocks)
            for image, label in zip(block["images"], block["labels"].tolist(), strict=True):
                split = split_of(number, examples, PATHFINDER_SHARES)
                writer.add(split, label, image.tobytes(), lengths=image.size)
                number += 1
            progress.update(len(block["labels"]))


@dataclasses.dataclass(frozen=True)
class _ListopsBlock:
    seed: int  # pickled into the processes, as a function in a function could not be
    between: tuple[int, int]

    def __call__(self, block: int) -> dict[str, np.ndarray]:
        return listops.draw_block(self.seed, block, self.between)._asdict()


@dataclasses.dataclass(frozen=True)
class _PathfinderBlock:
    seed: int
    examples: int

    def __call__(self, block: int) -> dict[str, np.ndarray]:
        begin = block * pathfinder_pictures.BLOCK
        indices = np.arange(begin, min(begin + pathfinder_pictures.BLOCK, self.examples))
        made = pathfinder_pictures.make_examples(self.seed, indices)
        return {"images": made.images, "labels": made.labels}


@contextlib.contextmanager
def _blocks(make: Callable[[int], dict], count: int, processes: int) -> Iterator[Iterator[dict]]:
    """The results of `make(0)`, `make(1)`, ... in this order, computed ahead in processes where there are several."""
    if processes < 1:
        raise UserError(f"--processes is {processes}, expected at least 1")
    if processes == 1:
        yield map(make, range(count))
        return
    # Spawned: they import NumPy and little else, and inherit no threads.
    executor = futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        yield _computed_ahead(executor, make, count, 2 * processes)
    except futures.BrokenExecutor as error:
        raise UserError("a process that generates examples was ended from outside; is there memory enough?") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _computed_ahead(executor: futures.Executor, make: Callable[[int], dict], count: int, ahead: int) -> Iterator[dict]:
    numbers = iter(range(count))
    pending = collections.deque(executor.submit(make, number) for number in itertools.islice(numbers, ahead))
    while pending:
        result = pending.popleft().result()
        pending.extend(executor.submit(make, number) for number in itertools.islice(numbers, 1))
        yield result


def _follow_parent() -> None:
    """Runs first in every process: it leaves Ctrl-C to its parent, and does not live on without it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([parent]), os._exit(1)), daemon=True).start()
