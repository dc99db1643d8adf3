"""Generates ListOps and Pathfinder-32 on all cores; the result does not depend on their number."""

import collections
import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from multiprocessing import connection
from typing import NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from polaformer_jax.data.lra import listops, pathfinder_pictures, store
from polaformer_jax.errors import UserError

_UNBOUNDED = 2**31

Example = tuple[int, bytes, int | tuple[int, int]]  # label, content, and length (with and without closing brackets)


class Generated(NamedTuple):
    """How a data set is generated.

    Attributes:
        examples: the default number of examples, of all splits together.
        shares: relative sizes of train, dev and test.
        block: maps (seed, number) to the arrays of a block of examples; runs in worker processes.
        count: maps a number of examples to the number of blocks for them, at most.
        divided: maps an iterator of blocks to an iterator of the examples taken from them.
    """

    examples: int
    shares: tuple[int, int, int]
    block: Callable[[int, int], dict[str, np.ndarray]]
    count: Callable[[int], int]
    divided: Callable[[Iterator[dict]], Iterator[Example]]


def cores() -> int:
    """How many processes can run at once on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_of(number: int, examples: int, shares: tuple[int, int, int]) -> str:
    """The split of example `number`: the first ones are train, the next dev, the last test."""
    dev, test = (examples * share // sum(shares) for share in shares[1:])
    return "train" if number < examples - dev - test else "dev" if number < examples - test else "test"


def prepare(
    name: str, data_dir: epath.PathLike, *, seed: int = 0, examples: int | None = None, processes: int = 1
) -> None:
    """Writes one of `DATA_SETS`, its examples in the order in which they are drawn.

    Args:
        data_dir: the directory that holds all prepared data sets.
        seed: a non-negative integer.
        examples: for all splits together; by default the number of the Long Range Arena.
        processes: number of processes; does not change the result.

    Raises:
        UserError: see `store.writing`.
    """
    how = DATA_SETS[name]
    examples = examples or how.examples
    settings = {"seed": seed, "examples": examples}
    with (
        store.writing(name, data_dir, origin=f"generated from seed {seed}", settings=settings) as writer,
        _blocks(functools.partial(how.block, seed), how.count(examples), processes) as blocks,
        tqdm(total=examples, desc=name, unit=" examples", disable=None) as progress,
    ):
        for number, (label, content, lengths) in enumerate(itertools.islice(how.divided(blocks), examples)):
            writer.add(split_of(number, examples, how.shares), label, content, lengths=lengths)
            progress.update()


def _listops_block(between: tuple[int, int], seed: int, number: int) -> dict[str, np.ndarray]:
    return listops.draw_block(seed, number, between)._asdict()


def _expressions(blocks: Iterator[dict]) -> Iterator[Example]:
    """The expressions of the blocks, each distinct one once."""
    seen = set()
    for block in blocks:
        ends = np.cumsum(block["lengths"]).tolist()
        for begin, end, value in zip([0, *ends], ends, block["values"].tolist(), strict=False):
            symbols = block["symbols"][begin:end]
            text = symbols.tobytes()
            digest = hashlib.blake2b(text, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                shorter = len(symbols) - int(np.count_nonzero(symbols == listops.CLOSE))
                yield value, text, (len(symbols), shorter)


def _pathfinder_block(seed: int, number: int) -> dict[str, np.ndarray]:
    begin = number * pathfinder_pictures.BLOCK
    made = pathfinder_pictures.make_examples(seed, np.arange(begin, begin + pathfinder_pictures.BLOCK))
    return {"images": made.images, "labels": made.labels}


def _pictures(blocks: Iterator[dict]) -> Iterator[Example]:
    for block in blocks:
        for image, label in zip(block["images"], block["labels"].tolist(), strict=True):
            yield label, image.tobytes(), image.size


def _listops(between: tuple[int, int]) -> Generated:
    block = functools.partial(_listops_block, between)
    return Generated(100_000, (48, 1, 1), block, count=lambda examples: _UNBOUNDED, divided=_expressions)


DATA_SETS = {
    "lra_listops": _listops(listops.LENGTHS),
    "lra_listops_short": _listops(listops.SHORT_LENGTHS),
    "lra_pathfinder": Generated(
        200_000,
        (8, 1, 1),
        _pathfinder_block,
        count=lambda examples: -(-examples // pathfinder_pictures.BLOCK),
        divided=_pictures,
    ),
}


@contextlib.contextmanager
def _blocks(make: Callable[[int], dict], count: int, processes: int) -> Iterator[Iterator[dict]]:
    """The results of `make(0)`, `make(1)`, ... in this order, computed ahead in processes if there are several."""
    if processes < 1:
        raise UserError(f"{processes}: expected at least 1", argument="processes")
    if processes == 1:
        yield map(make, range(count))
        return
    # Spawned: they import NumPy and little else, and inherit no threads.
    executor = futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        yield _computed_ahead(executor, make, count, 2 * processes)
    except futures.BrokenExecutor as error:
        raise UserError("a process that generates examples was killed from outside; is there enough memory?") from error
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
    """Runs first in every worker process: leaves Ctrl-C to the parent, and exits when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([parent]), os._exit(1)), daemon=True).start()
