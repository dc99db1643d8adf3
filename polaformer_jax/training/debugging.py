"""What helps to find out why: checks for NaN, transfers that nobody asked for, profiles."""

import contextlib

import jax
from etils import epath

from polaformer_jax.training.progress import log


def checked(config) -> contextlib.AbstractContextManager:
    """A training step under `debug.nans` and `debug.transfer_guard`: data that nobody sent may not be in it."""
    stack = contextlib.ExitStack()
    if config.nans:
        stack.enter_context(jax.debug_nans(True))
    if config.transfer_guard is not None:
        stack.enter_context(jax.transfer_guard(config.transfer_guard))
    return stack


def compiler_options(config) -> dict[str, bool]:
    """For `Lowered.compile`: what `debug.deterministic` means on this back end. CPUs and TPUs are deterministic."""
    if config.deterministic and jax.default_backend() == "gpu":
        return {"xla_gpu_deterministic_ops": True}
    return {}


class Profile:
    """A trace of the steps from `log.profile_start` to before `log.profile_stop`, in `WORKDIR/profile`."""

    def __init__(self, config, workdir: epath.Path):
        self._start, self._stop = config.profile_start, config.profile_stop
        self._directory = workdir / "profile"
        self._running = False

    def before(self, step: int) -> None:
        if self._start is None:
            return
        if step == self._start:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step == self._stop:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            log.info("the trace of steps %d to %d is in %s", self._start, self._stop - 1, self._directory)
