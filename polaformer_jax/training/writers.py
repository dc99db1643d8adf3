"""Numbers over time, written for TensorBoard by clu and read back from there."""

import os
from collections import defaultdict

import jax
import numpy as np
from etils import epath

from polaformer_jax.files import atomic


def make_writer(workdir: epath.PathLike, start: int):
    """A clu metric writer into the work directory. On other processes than the first it writes nothing.

    Args:
      start: the step that the run goes on from. What an earlier process has written of later ones will be written
        again, and is taken back.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it only writes files here, and announces this at length
    import tensorflow as tf  # four seconds: only who trains pays for it
    from clu import metric_writers

    tf.config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
    if jax.process_index() == 0:
        for path in epath.Path(workdir).glob("events.out.tfevents.*"):
            _take_back(path, start)
    return metric_writers.create_default_writer(workdir, just_logging=jax.process_index() > 0)


def _take_back(path: epath.Path, step: int) -> None:
    """Cuts an event file off before the first event that is later than `step`; all of it where `step` is 0.

    TensorBoard has a mark for a new session, after which readers drop what was written before of later steps; but they
    do so for the first version of its format alone, and clu writes the second.
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
    """All numbers that a run has written to its work directory: name -> (steps, values), by increasing step."""
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
