"""Several processes are one training: the same numbers, one end, and a way on from whatever happens to one of them.

Some find each other by what a cluster tells them; `python -m tests.campaigns.cluster` tries all of it on every cluster.
"""

import contextlib
import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest

from polaformer_jax import weights
from polaformer_jax.training.evaluation import evaluate
from tests.support import clusters
from tests.support.forked_scripts import Group, SlowFiles
from tests.support.runs import (
    RUN,
    assert_equal_to_rounding,
    assert_same_evaluation,
    assert_same_run,
    evaluation,
    one_device,
    steps_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shallow")]
STEPS = RUN["train.steps"]
WEIGHTS = "weights.safetensors"
SETTINGS = RUN | {"train.batch_size": 8, "eval.batch_size": 100}  # of 360: the last batch is padded
dense_and_polaformer = pytest.mark.parametrize("trained", ["dense", "pola_pvt_nano"], indirect=True, scope="module")
dense = pytest.mark.parametrize("trained", ["dense"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def trained(request, digits_dir):
    """The config's flags, of a training of this model."""
    changes = {**SETTINGS, "data.data_dir": digits_dir, "model.name": request.param}
    if request.param != "dense":
        changes["model.kernel_size"] = 1  # compiles sooner
    return ["--config=configs/digits.py", *(f"--config.{name}={value}" for name, value in changes.items())]


@contextlib.contextmanager
def group(trained, workdir, processes, *, cluster=None, **options):
    """A training by so many processes, which a cluster (of `clusters`) tells of each other, or flags of the config."""
    logs, arguments = workdir.with_name(f"{processes}.logs"), [*trained, f"--workdir={workdir}"]
    with cluster(processes) if cluster else contextlib.nullcontext() as environment:
        options |= {"processes": processes, "logs": logs, "environment": environment}
        with Group("train.py", arguments, **options) as running:
            yield running


def finish(trained, workdir, processes, **options):
    """Runs a training to its end; what process 0 has told."""
    with group(trained, workdir, processes, **options) as running:
        assert running.statuses() == [0] * processes, running.errors()
        return running.error(0)


@pytest.fixture(scope="module")
def straight(trained, tmp_path_factory):
    """The undisturbed training of two processes."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(trained, workdir, 2)
    return workdir


def rewound(straight, workdir, step):
    """A copy of a finished run as a power cut after the checkpoint of `step` would have left it."""
    shutil.copytree(straight, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    assert steps_of(workdir)[-1] == step


@dense_and_polaformer
def test_two_processes_give_the_training_of_one(trained, straight, tmp_path):
    finish(trained, tmp_path / "run", 1)
    assert_equal_to_rounding(tmp_path / "run", straight)


@dense
def test_four_processes_give_the_training_of_two(trained, straight, tmp_path):
    """Under Slurm, one of them late, another with a slow file system."""
    workdir = tmp_path / "run"
    slow = SlowFiles(workdir, 0.05, [1])
    finish(trained, workdir, 4, cluster=partial(clusters.slurm, on_a_node=2), late={2: 5.0}, slow_files=slow)
    assert_equal_to_rounding(tmp_path / "run", straight)


@dense
def test_each_image_is_counted_once_and_only_the_first_process_speaks(trained, straight, tmp_path):
    result = json.loads((straight / "eval.json").read_text())
    assert (result["images"], result["skipped"]) == (360, 0)
    alone = evaluate(one_device(straight), straight, json_path=tmp_path / "eval.json")
    for name in ("accuracy", "accuracy_top5", "loss"):
        assert result[name] == pytest.approx(alone[name], rel=1e-5), name
    assert len(list(straight.glob("events.out.tfevents.*"))) == 1
    logs = straight.with_name("2.logs")
    first, second = ((logs / f"{index}.err").read_text() for index in (0, 1))
    assert f"step {STEPS}/{STEPS}" in first and "360 images" in first
    assert second.splitlines()[0].endswith("process 1 of 2") and "step" not in second
    assert "test accuracy" in (logs / "0.out").read_text() and "accuracy" not in (logs / "1.out").read_text()


@dense
def test_a_signal_to_one_process_stops_both_at_the_same_step(trained, straight, tmp_path):
    workdir = tmp_path / "run"
    with group(trained, workdir, 2, cluster=clusters.tpu_vms) as running:
        running.wait_for(workdir / "checkpoints" / "4")
        running.processes[1].terminate()
        assert running.statuses() == [75, 75], running.errors()
        said = [running.error(index).splitlines()[-1] for index in (0, 1)]
    stopped_at = steps_of(workdir)[-1]
    assert 4 < stopped_at < STEPS
    assert (
        said
        == [f"interrupted: the checkpoint of step {stopped_at} of {STEPS} is saved; the same command resumes from it"]
        * 2
    )
    assert f"resuming from the checkpoint of step {stopped_at} of {STEPS}" in finish(
        trained, workdir, 2, cluster=clusters.tpu_vms
    )
    assert_same_run(workdir, straight)


@dense
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(trained, straight, tmp_path, killed):
    workdir = tmp_path / "run"
    with group(trained, workdir, 2, cluster=clusters.slurm) as running:
        running.wait_for(workdir / "checkpoints" / "4")
        os.kill(running.processes[killed].pid, signal.SIGKILL)
        statuses = running.statuses()
        said = running.error(1 - killed)
    assert statuses[killed] == -signal.SIGKILL
    ours, of_jax = "another process is gone, and its output says why", "another task died"
    assert (statuses[1 - killed], True) in ((1, ours in said), (-signal.SIGABRT, of_jax in said)), said
    assert "disk full" not in said
    assert "resuming from the checkpoint of step" in finish(trained, workdir, 2)
    assert_same_run(workdir, straight)


@dense
@pytest.mark.parametrize("processes, cluster", [(1, None), (4, partial(clusters.tpu_vms, slices=2))])
def test_a_run_goes_on_with_another_number_of_processes(trained, straight, tmp_path, processes, cluster):
    workdir = tmp_path / "run"
    rewound(straight, workdir, STEPS - 4)
    assert f"resuming from the checkpoint of step {STEPS - 4}" in finish(trained, workdir, processes, cluster=cluster)
    assert_equal_to_rounding(workdir, straight)


@dense
def test_processes_agree_on_a_damaged_checkpoint(trained, straight, tmp_path):
    workdir = tmp_path / "run"
    rewound(straight, workdir, STEPS - 4)
    for path in (workdir / f"checkpoints/{STEPS - 4}/params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"resuming from the checkpoint of step {STEPS - 8} of" in finish(trained, workdir, 2)
    assert len(list((workdir / "damaged_checkpoints").iterdir())) == 1
    assert_same_run(workdir, straight)


def evaluated(trained, workdir, folder, processes, **options):
    """What eval.py prints, by process, and its evaluation."""
    folder.mkdir()
    files = [f"--json={folder}/eval.json", f"--predictions={folder}/table.csv", f"--save-weights={folder}/{WEIGHTS}"]
    arguments = [*trained, f"--workdir={workdir}", *files]
    with Group("eval.py", arguments, processes=processes, logs=folder, **options) as running:
        assert running.statuses() == [0] * processes, running.errors()
        return [running.output(index) for index in range(processes)], evaluation(folder)


@dense
def test_processes_whose_devices_are_mixed_train_and_evaluate_as_one(trained, straight, tmp_path):
    """Rows of a batch are those of the devices: partners of mixing, losses, and the names in the table."""
    mixed = {"devices": 2, "order": 5}
    finish([*trained, "--config.mesh.fsdp=2"], tmp_path / "run", 4, **mixed)
    assert_equal_to_rounding(tmp_path / "run", straight)
    _, together = evaluated(trained, straight, tmp_path / "mixed", 4, **mixed)
    _, alone = evaluated(trained, straight, tmp_path / "one", 1)
    assert_same_evaluation(together, alone)


@dense
def test_two_processes_evaluate_as_one(trained, straight, tmp_path):
    _, alone = evaluated(trained, straight, tmp_path / "one", 1)
    (first, second), together = evaluated([*trained, "--config.mesh.fsdp=2"], straight, tmp_path / "two", 2)
    assert json.loads(first[first.index("{") :]) == together[0] and together[0]["images"] == 360
    assert "{" not in second
    assert_same_evaluation(together, alone)
    one, two = (weights.read_file(tmp_path / folder / WEIGHTS) for folder in ("one", "two"))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(np.array_equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
