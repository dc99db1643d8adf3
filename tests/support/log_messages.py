"""What the package logs, whatever handlers other tests have left."""

import contextlib
import logging
from collections.abc import Iterator

from polaformer_jax.training.progress import log


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """The messages that are logged while it lasts."""
    found: list[str] = []
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: found.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
