"""Progress of a long run: a progress bar on a terminal, plain log lines elsewhere."""

import contextlib
import logging as std_logging
import math
import sys
import time

import jax
import tqdm
from absl import flags, logging

log = std_logging.getLogger("polaformer_jax")


# Orbax warns about intended states: checkpoints between evaluations have no metrics, and readers do not write.
_INTENDED = ("did not provide metrics", "read_only=True", "Given directory is read only")


def set_up_logging(*, verbose: bool = False) -> None:
    """Sends this project's messages to stderr, with the time.

    Other libraries are limited to warnings, unless `verbose`: Orbax alone would write dozens of lines for each
    checkpoint.
    """
    logging.use_absl_handler()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl warns about messages before its flags are parsed; the commands have none
    if verbose:
        logging.set_verbosity(logging.INFO)
    else:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(lambda record: not any(text in record.getMessage() for text in _INTENDED))
    if not log.handlers:
        handler = _TqdmHandler()
        handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(std_logging.INFO)
        log.propagate = False


class _TqdmHandler(std_logging.Handler):
    """Prints above a progress bar rather than through it."""

    def emit(self, record: std_logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed must not end the run
            tqdm.tqdm.write(self.format(record), file=sys.stderr)


def bar(*args, **options) -> tqdm.tqdm:
    """A tqdm bar, on process 0 only, and only if stderr is a terminal."""
    return tqdm.tqdm(*args, disable=True if jax.process_index() else None, **options)


class Progress:
    """Progress of a training. Use as a context manager.

    Args:
        total: steps of the whole run.
        start: steps taken before, by an earlier process.
        examples: what examples are called, in the plural.
    """

    def __init__(self, total: int, start: int, examples: str = "images"):
        self._examples = examples
        self._total = total
        self._start = start
        self._began = time.monotonic()
        self._bar = bar(total=total, initial=start, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def step(self) -> None:
        self._bar.update()

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of the last steps, at step number `step` (steps taken so far)."""
        if metrics["skipped"]:
            log.warning("step %d: %d records could not be decoded since the last report", step, metrics["skipped"])
        seen = {"loss": math.nan, "accuracy": math.nan, "learning_rate": math.nan, **metrics}  # if all were skipped
        rate = f"{metrics[f'{self._examples}_per_second']:.0f} {self._examples}/s"
        used = [
            f"{title} {100 * metrics[name]:.0f}%"
            for name, title in (("mfu", "MFU"), ("device_memory_share", "device memory"))
            if name in metrics
        ]
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join([f"loss {seen['loss']:.3f}", rate, *used]), refresh=False)
            return
        left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
        log.info(
            "step %d/%d  loss %.4f  accuracy %.3f  lr %.2e  %s  waiting for data %.0f%%%s  left %s",
            step,
            self._total,
            seen["loss"],
            seen["accuracy"],
            seen["learning_rate"],
            rate,
            100 * metrics["input_wait_share"],
            "".join(f"  {each}" for each in used),
            tqdm.tqdm.format_interval(left),
        )
