"""Finds the largest batch that fits, with few attempts, since each is a compilation of minutes."""

from collections.abc import Callable, Sequence

import jax
import ml_collections
import tqdm

from polaformer_jax.aot.compiling import OutOfMemoryError, Program, compile_step
from polaformer_jax.errors import UserError
from polaformer_jax.hardware.chips import chip_of
from polaformer_jax.training import sharding
from polaformer_jax.training.progress import log

GIB = 2**30


def largest(
    used: Callable[[int], tuple[bool, float | None]], *, start: int, limit: float, within: float = 1 / 16
) -> int:
    """The largest number of examples per chip that fits, to a relative `within`; 0 if not even one does.

    Memory grows linearly with the number of examples, so the next attempt is where the line through the last two meets
    the limit; if it is not known by how much an attempt failed, the interval is halved.

    Args:
        used: returns whether a number of examples fits, and the bytes used, None if they are not known.
        start: the first attempt.
        limit: bytes of memory.
    """
    fits, fails = 0, None  # the most that is known to fit, the least that is known not to
    points: list[tuple[int, float]] = []
    attempt = max(start, 1)
    while fails is None or fails - fits > max(1, within * fits):
        ok, size = used(attempt)
        if ok:
            fits = attempt
        else:
            fails = attempt
        if size is not None:
            points.append((attempt, size))
        attempt = _next(points[-2:], fits, fails, limit)
    return fits


def _next(points: list[tuple[int, float]], fits: int, fails: int | None, limit: float) -> int:
    """The next attempt, strictly between what fits and what does not."""
    guess = None
    if len(points) == 2 and points[1][1] != points[0][1]:
        (n0, size0), (n1, size1) = points
        guess = n0 + (limit - size0) * (n1 - n0) / (size1 - size0)
    elif points and points[0][1] > 0:
        guess = points[0][0] * limit / points[0][1]
    if fails is None:
        # At most fourfold: a line through two points close to each other may lead anywhere.
        return max(fits + 1, min(int(guess or 0) + 1, 4 * fits))
    if guess is None or not fits < guess < fails:
        guess = (fits + fails) / 2
    return min(max(int(guess), fits + 1), fails - 1)


def largest_batch(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], *, num_examples: int) -> Program:
    """The program of the largest batch that fits, to a sixteenth, found by compiling.

    Raises:
        UserError: not even one example per chip fits.
    """
    programs: dict[int, Program] = {}
    parts = sharding.make_mesh(config.mesh, devices).size * config.train.accumulate

    def used(examples: int) -> tuple[bool, float | None]:
        bar.set_postfix_str(f"batch {examples * parts}")
        try:
            program = compile_step(config, devices, num_examples=num_examples, batch_size=examples * parts)
        except OutOfMemoryError as error:
            log.info("batch %d: does not fit", examples * parts)
            return False, error.used
        finally:
            bar.update()
        fits = program.chip is None or program.memory <= program.chip.memory
        log.info("batch %d: %.2f GiB, compiled in %.0f s", program.batch, program.memory / GIB, program.seconds)
        if fits:
            programs[examples] = program
        return fits, program.memory

    with tqdm.tqdm(desc="compile", unit="program", disable=None) as bar:
        start = max(1, config.train.batch_size // parts)
        best = largest(used, start=start, limit=_limit(devices), within=1 / 16)
    if best == 0:
        raise UserError(f"not even a batch of {parts} fits: try model.remat=True, or more chips")
    return programs[best]


def _limit(devices) -> float:
    if (chip := chip_of(devices[0].device_kind)) is None:
        raise UserError(f"the memory of a {devices[0].device_kind} is not known, so neither is its largest batch")
    return chip.memory
