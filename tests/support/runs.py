"""Finished trainings compared: their checkpoints, and what TensorBoard shows of them."""

import jax
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.workdir import read_config

TIMES = {"seconds", "images_per_second", "steps_per_second", "input_wait_share"}


def written(workdir):
    """What TensorBoard shows: name -> [(step, value), ...], as often as it was written."""
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    found = {}
    for name in events.Tags()["tensors"]:
        if not name.startswith("parameters"):
            found[name] = [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in events.Tensors(name)]
    return found


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def one_device(workdir):
    """The run's config, for this process."""
    config = read_config(workdir)
    config.mesh.data = 1
    return config


def final_arrays(workdir):
    """Every array of the checkpoint of the last step of a finished run, by name."""
    config = one_device(workdir)
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        state = checkpoints.restore(Experiment(config).states.abstract).state
    assert state.step == config.train.steps
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def assert_same_run(found, wanted):
    """Bit for bit, in the checkpoint and in TensorBoard."""
    one, other = final_arrays(found), final_arrays(wanted)
    assert one.keys() == other.keys() and any("ema" in name for name in one) and any("opt" in name for name in one)
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
    after, before = written(found), written(wanted)
    assert after.keys() == before.keys() and before["loss"] and before["eval_ema_loss"]
    for name in before.keys() - TIMES:
        assert after[name] == before[name], name
    for name in TIMES:
        assert [step for step, _ in after[name]] == [step for step, _ in before[name]], name


def assert_equal_to_rounding(found, wanted):
    after, before = written(found), written(wanted)
    for name in before.keys() - TIMES:
        assert [step for step, _ in after[name]] == [step for step, _ in before[name]], name
    for name in ("loss", "grad_norm", "eval_loss", "eval_ema_loss"):
        np.testing.assert_allclose(*(np.array(of[name])[:, 1] for of in (after, before)), rtol=1e-5, err_msg=name)
    one, other = final_arrays(found), final_arrays(wanted)
    # By whole parts of the state: Adam brings any gradient to the size of a step, rounding errors around zero included.
    for part in ("params", "ema", ".mu", ".nu"):
        names = [name for name in one if part in name]
        ours, theirs = (np.concatenate([state[name].ravel() for name in names]) for state in (one, other))
        assert 0 < np.linalg.norm(theirs), part
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs), part
