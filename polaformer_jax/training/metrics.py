"""Metrics: summed on the device, averaged since the last log line, written for TensorBoard and read back from there.

They leave the device as (sum, count) pairs, which can be added anywhere and are divided once, on the host.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from polaformer_jax.files import atomic, paths
from polaformer_jax.hardware.chips import chip_of

# (sum, count) by name. The sum may be an array, such as a matrix of counts.
Sums = Mapping[str, tuple[jax.Array, jax.Array]]


def masked(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum and number of the valid values (B,), where the mask (B,) is True, in at least float32.

    Masked values are ignored, even NaN.
    """
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0).astype(dtype)), jnp.sum(mask.astype(dtype))


class Mean:
    """Adds up sums and counts in double precision."""

    def __init__(self):
        self._sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, count) in sums.items():
            before, counted = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = before + np.asarray(total, np.float64), counted + np.asarray(count, np.float64)

    def result(self) -> dict[str, float]:
        """The means of all that are no arrays, `nan` where nothing was counted."""
        return {
            name: float(total / count) if count else float("nan")
            for name, (total, count) in self._sums.items()
            if total.ndim == 0
        }

    def total(self, name: str) -> np.ndarray:
        """The sum of a metric."""
        return self._sums[name][0]

    def sums(self) -> dict[str, list[float]]:
        """[sum, count] of each metric; `add` restores them without loss."""
        return {name: [float(value) for value in pair] for name, pair in self._sums.items()}

    def count(self, name: str) -> int:
        """How many examples went into a metric."""
        return int(self._sums[name][1]) if name in self._sums else 0


class RunningAverages:
    """Averages over the steps since the last log line, and their speed.

    The sums can be saved and restored by another process, so that a log line does not depend on where a run was
    interrupted. The times are those of this process's steps.

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
        """Adds the sums of a step, (sum, count) by name."""
        self._mean.add(sums)
        self._steps += 1
        self._timed += 1

    def count_skipped(self) -> None:
        """Counts a step whose loss or gradient was not finite; it is excluded from the averages."""
        self._steps += 1
        self._timed += 1
        self._nonfinite += 1

    def reset(self) -> dict[str, float]:
        """The averages and speeds since the last call; all counters start again from zero."""
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

    def state_dict(self) -> dict[str, Any]:
        """The sums, in types that JSON stores exactly."""
        return {"steps": self._steps, "nonfinite": self._nonfinite, "sums": self._mean.sums()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; an empty dict restores nothing."""
        self._steps, self._nonfinite = saved.get("steps", 0), saved.get("nonfinite", 0)
        self._mean.add(saved.get("sums", {}))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Waiting for data: this time is also counted separately."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Not training: this time does not count."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began


class Utilisation:
    """Counts the operations of the steps since the last log line.

    The model FLOPs utilisation (Chowdhery et al., "PaLM", 2022, appendix B) is the fraction of the devices' published
    bfloat16 peak, whatever `model.dtype` is, that the model's matrix products and convolutions take up, recomputation
    not counted. Devices without a published peak have none.

    Args:
        step_flops: the operations of a step on a batch, on all devices together.
        mesh: the devices.
    """

    def __init__(self, step_flops: Callable[[Mapping[str, Any]], float], mesh: Mesh):
        self._step_flops, self._mesh = step_flops, mesh
        self._chip = chip_of(mesh.devices.flat[0].device_kind)
        self._done = 0.0

    def step(self, batch: Mapping[str, Any]) -> None:
        """Counts a step on this batch."""
        if self._chip is not None:
            self._done += self._step_flops(batch)

    def reset(self, seconds: float) -> dict[str, float]:
        """Metrics of the steps since the last call, which took this many seconds; those that are known."""
        metrics = {}
        if self._chip is not None:
            metrics["mfu"] = self._done / (seconds * self._mesh.size * self._chip.flops)
        self._done = 0.0
        return metrics | self._memory()

    def _memory(self) -> dict[str, float]:
        """Peak memory of the fullest device of this process, in GiB and as a fraction of its limit."""
        stats = [device.memory_stats() for device in self._mesh.local_devices]
        if not all(stats):  # CPUs do not report it
            return {}
        peak, limit = max((each["peak_bytes_in_use"], each["bytes_limit"]) for each in stats)
        return {"device_memory_gib": peak / 2**30, "device_memory_share": peak / limit}


def make_writer(workdir: epath.PathLike, start: int):
    """A clu metric writer into the work directory. It writes on process 0 only.

    Args:
        start: the step from which the run resumes. Events of later steps, written by an earlier process, are removed,
            since they will be written again.
    """
    os.environ.setdefault(
        "TF_ENABLE_ONEDNN_OPTS", "0"
    )  # otherwise TensorFlow, which only writes files here, logs a warning
    import tensorflow as tf  # takes seconds; needed for training only
    from clu import metric_writers

    tf.config.set_visible_devices([], "GPU")  # it would allocate the memory that JAX needs
    if jax.process_index() == 0:
        for path in paths.given(workdir).glob("events.out.tfevents.*"):
            _truncate(path, start)
    return metric_writers.create_default_writer(workdir, just_logging=jax.process_index() > 0)


def _truncate(path: epath.Path, step: int) -> None:
    """Truncates an event file before the first event after `step`; before all of them where `step` is 0.

    TensorBoard marks a new session with an event after which readers drop earlier events of later steps, but only in
    the first version of its format, and clu writes the second.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    content, end = path.read_bytes(), 0
    while end < len(content):  # TFRecord: length, checksum, data, checksum
        size = int.from_bytes(content[end : end + 8], "little")
        if end + size + 16 > len(content):
            break  # the process that wrote it was killed in the middle
        event = Event.FromString(content[end + 12 : end + 12 + size])
        if event.step > step or (step == 0 and event.HasField("summary")):
            break
        end += size + 16
    if end < len(content):
        atomic.write(path, content[:end])


def read_scalars(workdir: epath.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All scalars that a run has written to its work directory: name -> (steps, values), by increasing step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    written = defaultdict(dict)
    events = EventAccumulator(os.fspath(workdir), size_guidance={"tensors": 0}).Reload()
    for name in events.Tags()["tensors"]:
        for event in sorted(events.Tensors(name), key=lambda event: event.wall_time):
            value = tensor_util.make_ndarray(event.tensor_proto)
            if value.dtype.kind == "f":  # a number, not a text
                written[name][event.step] = float(value)
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in written.items()
    }
