"""Several processes, one program: starting together, and not waiting for those that are gone."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator

import jax

from polaformer_jax.errors import Interrupted, UserError
from polaformer_jax.training.progress import log

# How the environments that JAX knows say that there are several processes: a variable, and whether its value says so.
_MANY = {
    "JAX_COORDINATOR_ADDRESS": bool,
    "SLURM_STEP_NUM_TASKS": lambda value: int(value) > 1,  # within `srun`
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # Cloud TPU, a slice of several hosts
    "MEGASCALE_COORDINATOR_ADDRESS": bool,  # several slices
}


@contextlib.contextmanager
def session(config) -> Iterator[None]:
    """Joins the other processes, where `distributed.*` or the environment says that there are others.

    To be entered before JAX looks for devices. An error in one process ends it at once, whatever the others wait for:
    they notice within `distributed.heartbeat_s` that it is gone, say so and end too: by an error of what they do
    together, with status 1, or by JAX, which aborts a process that waits (SIGABRT).

    Args:
      config: the config's `distributed` part.

    Raises:
      UserError: the part is incomplete, or the others do not answer.
    """
    given = {name: config[name] for name in ("coordinator", "num_processes", "process_id")}
    explicit = [name for name, value in given.items() if value is not None]
    if explicit and len(explicit) < 3 and not os.environ.get("JAX_COORDINATOR_ADDRESS"):
        missing = ", ".join(f"distributed.{name}" for name in given if name not in explicit)
        raise UserError(f"distributed.{explicit[0]} is given without {missing}: give all three, or none")
    named = next((name for name, many in _MANY.items() if os.environ.get(name) and many(os.environ[name])), None)
    if not explicit and named is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # see `stopping`
    try:
        jax.distributed.initialize(
            coordinator_address=given["coordinator"],
            num_processes=given["num_processes"],
            process_id=given["process_id"],
            heartbeat_timeout_seconds=config.heartbeat_s,
        )
    except (RuntimeError, ValueError) as error:
        source = "distributed.*" if explicit else f"the environment ({named})"
        raise UserError(f"the processes that {source} names could not be joined: {error}") from error
    log.info("process %d of %d", jax.process_index(), jax.process_count())
    if jax.process_index():
        log.setLevel(logging.WARNING)  # one tells what all do
    try:
        yield
    except Interrupted:  # all processes agreed on it
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        which = f"process {jax.process_index()}"
        if isinstance(error, UserError):
            print(f"error: {which}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(
                f"error: {which} of {jax.process_count()} ends by the exception above. If that is about a connection, a"
                " barrier or a collective operation, another process is gone, and its output says why. The same command"
                " for all processes goes on from the latest checkpoint",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(getattr(error, "status", 1))  # an orderly end would wait for the others, who wait for this process
    jax.distributed.shutdown()
