"""Numbers over time, written for TensorBoard by clu and read back from there."""

import os
from collections import defaultdict

import jax
import numpy as np
from etils import epath


def make_writer(workdir: epath.PathLike):
    """A clu metric writer into the work directory. On other processes than the first it writes nothing."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it only writes files here, and announces this at length
    import tensorflow as tf  # four seconds: only who trains pays for it
    from clu import metric_writers

    tf.config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
    return metric_writers.create_default_writer(workdir, just_logging=jax.process_index() > 0)


def read_scalars(workdir: epath.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All numbers ever written to a work directory: name -> (steps, values), by increasing step.

    Where a step was written more than once (a resumed run repeats the steps after its checkpoint), the last counts.
    """
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
