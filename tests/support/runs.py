"""Finished trainings compared: their checkpoints, what TensorBoard shows of them, and what evaluations predict."""

import csv
import json

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.workdir import read_config

# A training that several processes share: fields of a config of the digits.
RUN = {
    "data.workers": 0,
    "train.epochs": None,
    "train.steps": 24,
    "schedule.warmup": 2.0,
    "eval.every": 12.0,
    "log.every": 2,
    "log.pictures": False,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 3,
    "ema.decay": 0.9,
    "augment.mixup": 0.8,
}
TIMES = {"seconds", "images_per_second", "steps_per_second", "input_wait_share"}


def written(workdir):
    """What TensorBoard shows: name -> [(step, value), ...], as often as it was written.

    By time: files of one second and one process are read as their names are sorted, the tenth before the ninth.
    """
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    found = {}
    for name in events.Tags()["tensors"]:
        if not name.startswith("parameters"):
            by_time = sorted(events.Tensors(name), key=lambda event: event.wall_time)
            found[name] = [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in by_time]
    return found


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def one_device(workdir):
    """The run's config, for this process."""
    config = read_config(workdir)
    config.mesh.data = 1
    return config


def final_state(workdir):
    """That of the last step of a finished run, on one device."""
    config = one_device(workdir)
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        state = checkpoints.restore(Experiment(config).states.abstract).state
    assert state.step == config.train.steps
    return state


def final_arrays(workdir):
    """Every array of it, by name."""
    state = final_state(workdir)
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


def evaluation(folder):
    """The result of eval.py, eval.json, and the rows of its table.csv."""
    with open(folder / "table.csv", newline="") as table:
        return json.loads((folder / "eval.json").read_text()), list(csv.DictReader(table))


def assert_same_evaluation(found, wanted):
    """The same examples, each once, and predictions; probabilities and metrics agree to rounding."""
    (ours, our_rows), (theirs, their_rows) = found, wanted
    metrics = ("accuracy", "accuracy_top5", "loss")
    assert [ours.pop(name) for name in metrics] == pytest.approx([theirs.pop(name) for name in metrics], rel=1e-5)
    assert ours.pop("images_per_second") > 0 and theirs.pop("images_per_second") > 0
    assert ours == theirs
    assert len(our_rows) == len({row["record"] for row in our_rows}) == ours["images"]
    for one, other in zip(our_rows, their_rows, strict=True):
        assert float(one.pop("probability")) == pytest.approx(float(other.pop("probability")), abs=2e-6)
        assert one == other
