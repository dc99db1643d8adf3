"""What is counted of the steps since the last report."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from polaformer_jax.training.metrics import Mean


class Window:
    """Sums over the steps since the last report, and how fast they went.

    The sums can be saved and taken up again by another process, so that a report does not depend on where a run was
    interrupted. The times cannot: they are those of this process's steps.

    Args:
        batch_size: examples in a step.
        examples: what they are called, in the plural.
    """

    def __init__(self, batch_size: int, examples: str):
        self._batch_size, self._examples = batch_size, examples
        self._restart()

    def _restart(self) -> None:
        self._mean = Mean()
        self._steps = 0
        self._nonfinite = 0
        self._timed = 0
        self._waited = 0.0
        self._began = time.monotonic()

    def add(self, sums: Any) -> None:
        """Adds a step's numbers, (sum, count) by name; `nonfinite` if they are left out of the means."""
        self._mean.add(sums)
        self._steps += 1
        self._timed += 1

    def leave_out(self) -> None:
        """Counts a step whose numbers are not finite."""
        self._steps += 1
        self._timed += 1
        self._nonfinite += 1

    def close(self) -> dict[str, float]:
        """The means, and how fast it went; a new window begins."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        means = self._mean.result()
        metrics = {
            **means,
            "skipped": means.get("skipped", 0.0) * (self._steps - self._nonfinite),  # records, not a mean
            "nonfinite_steps": float(self._nonfinite),
            "steps_per_second": self._timed / seconds,
            "seconds": seconds,
            f"{self._examples}_per_second": self._timed * self._batch_size / seconds,
            "input_wait_share": self._waited / seconds,
        }
        self._restart()
        return metrics

    def saved(self) -> dict[str, Any]:
        """The sums, in types that JSON has and gives back exactly."""
        return {"steps": self._steps, "nonfinite": self._nonfinite, "sums": self._mean.sums()}

    def take_up(self, saved: dict[str, Any]) -> None:
        """Goes on from what `saved` gave; from nothing where that is empty."""
        self._steps, self._nonfinite = saved.get("steps", 0), saved.get("nonfinite", 0)
        self._mean.add(saved.get("sums", {}))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Waiting for data: the time counts, and is also counted apart."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not training: the time does not count."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began
