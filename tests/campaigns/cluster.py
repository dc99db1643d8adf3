"""A rehearsal of clusters on one host: real processes that find each other by what a cluster would tell them.

    python -m tests.campaigns.cluster --data-dir data
    python -m tests.campaigns.cluster --data-dir data --clusters slurm tpu-vms --processes 4 --model pola_pvt_nano

For each cluster and number of processes a training runs from start to end, and again with something in its way; then
it is evaluated and exported. Ends that must be the same bit for bit are compared so: every array of the last
checkpoint, and all that TensorBoard shows but times. Other numbers of processes sum in another order: losses, norms of
gradients and metrics agree to a relative 1e-5 there, and the arrays of the state to 1e-4 of its norm.

Everything is as on the cluster but for the hosts (all are this one), the ports (free ones) and the devices (CPUs). See
`tests/support/clusters.py`.
"""

import argparse
import contextlib
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from polaformer_jax import weights
from polaformer_jax.training import progress
from tests.support import clusters, dense_model, small_models
from tests.support.forked_scripts import Group, SlowFiles
from tests.support.runs import (
    RUN,
    assert_equal_to_rounding,
    assert_same_evaluation,
    assert_same_run,
    evaluation,
    final_state,
    steps_of,
)

CLUSTERS = {
    "slurm": clusters.slurm,
    "slurm-two-tasks-a-node": functools.partial(clusters.slurm, on_a_node=2),
    "gke": clusters.gke,
    "tpu-vms": clusters.tpu_vms,
    "tpu-vms-two-slices": functools.partial(clusters.tpu_vms, slices=2),
}
STEPS = RUN["train.steps"]
SETTINGS = RUN | {"train.batch_size": 16, "eval.batch_size": 104}  # of 360: the last batch is padded
STOPPED = 75
LOST_A_PEER = {1, -signal.SIGABRT}


class Rehearsal:
    """One cluster with a number of processes. Each scenario is a method, which raises AssertionError."""

    def __init__(self, cluster: str, processes: int, *, config: list[str], alone: Path, folder: Path, seed: int):
        self._cluster, self._processes = CLUSTERS[cluster], processes
        self._config, self._alone, self._folder = config, alone, folder
        self._rng = random.Random(f"{seed} {cluster} {processes}")
        folder.mkdir()
        self._straight = folder / "straight"
        self._groups = 0

    # --- scenarios, in this order

    def train(self) -> str:
        """Undisturbed, as one process trains."""
        self._train(self._straight)
        assert_equal_to_rounding(self._straight, self._alone)
        return "as one process, to rounding"

    def stop_and_resume(self) -> str:
        """SIGTERM to one process; all stop at the same step and go on."""
        workdir = self._stopped("stopped")
        self._train(workdir, resumed=True)
        assert_same_run(workdir, self._straight)
        return "bit for bit"

    def resume_on_half(self) -> str:
        workdir = self._stopped("halved")
        self._train(workdir, processes=self._processes // 2, resumed=True)
        assert_equal_to_rounding(workdir, self._straight)
        return "to rounding"

    def lost_process(self) -> str:
        """SIGKILL to one process; the others end soon, by themselves."""
        workdir = self._folder / "lost"
        with self._group("train.py", workdir) as running:
            running.wait_for(workdir / "checkpoints" / "4")
            time.sleep(self._rng.uniform(0, 1))
            killed = self._rng.randrange(self._processes)
            os.kill(running.processes[killed].pid, signal.SIGKILL)
            statuses = running.statuses()
            allowed = [{-signal.SIGKILL} if index == killed else LOST_A_PEER for index in range(self._processes)]
            if set(statuses) != {0}:  # they may have been at their end
                assert all(s in a for s, a in zip(statuses, allowed, strict=True)), (statuses, running.errors())
        self._train(workdir, resumed=True)
        assert_same_run(workdir, self._straight)
        return "bit for bit"

    def late_process(self) -> str:
        """One process starts long after the others, as after a slow boot or a container's download."""
        workdir = self._folder / "late"
        self._train(workdir, late={self._rng.randrange(self._processes): 15.0})
        assert_same_run(workdir, self._straight)
        return "bit for bit"

    def slow_files(self) -> str:
        """Each access of the first process to the work directory takes 30 ms longer, of others 100."""
        for name, processes, seconds in (("first", [0], 0.03), ("others", range(1, self._processes), 0.1)):
            workdir = self._folder / f"slow_for_{name}"
            self._train(workdir, slow_files=SlowFiles(workdir, seconds, processes))
            assert_same_run(workdir, self._straight)
        return "bit for bit"

    def evaluate(self) -> str:
        """By all processes and by half of them, as by one process."""
        alone = self._folder / "alone"
        with self._group("eval.py", self._straight, processes=1, own=False, results=alone) as running:
            assert running.statuses() == [0], running.errors()
        for processes in (self._processes, self._processes // 2):
            results = self._folder / f"by_{processes}"
            with self._group("eval.py", self._straight, processes=processes, results=results) as running:
                assert running.statuses() == [0] * processes, running.errors()
                spoken = [index for index in range(processes) if "{" in running.output(index)]
                assert spoken == [0], spoken
            assert_same_evaluation(evaluation(results), evaluation(alone))
        return "the same predictions"

    def export(self) -> str:
        """By one process, on a host of the cluster."""
        file = self._folder / "exported.safetensors"
        arguments = ["export", str(file), f"--workdir={self._straight}", "--checkpoint=latest", "--weights=raw"]
        with self._cluster(self._processes) as environment:
            logs = self._logs()
            script = "polaformer_jax/cli/__main__.py"
            with Group(script, arguments, processes=1, logs=logs, environment=environment) as running:
                assert running.statuses() == [0], running.errors()
        exported, wanted = weights.read_file(file).tensors, weights.flatten(final_state(self._straight).params)
        assert exported.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(exported[name], array, err_msg=name)
        return "bit for bit"

    # --- their parts

    def _train(self, workdir: Path, *, processes: int | None = None, resumed: bool = False, **options) -> None:
        processes = processes or self._processes
        with self._group("train.py", workdir, processes=processes, **options) as running:
            assert running.statuses() == [0] * processes, running.errors()
            said = [running.error(index) for index in range(processes)]
        for index, text in enumerate(said):
            assert f"process {index} of {processes}\n" in text, text
        first, *others = said
        assert not any("step" in text for text in others), others
        assert ("resuming from the checkpoint of step" in first) == resumed, first

    def _stopped(self, name: str) -> Path:
        """The work directory of a training that was told to stop, by a signal to one process."""
        workdir = self._folder / name
        with self._group("train.py", workdir) as running:
            running.wait_for(workdir / "checkpoints" / "4")
            running.processes[self._rng.randrange(self._processes)].terminate()
            assert running.statuses() == [STOPPED] * self._processes, running.errors()
        assert 4 <= steps_of(workdir)[-1] < STEPS, steps_of(workdir)
        return workdir

    @contextlib.contextmanager
    def _group(
        self, script: str, workdir: Path, *, processes: int | None = None, own: bool = True, results=None, **options
    ) -> Iterator[Group]:
        """Processes of the cluster (`own`), or that nobody told of a cluster; `results`: folder of an evaluation."""
        processes = processes or self._processes
        arguments = [*self._config, f"--workdir={workdir}"]
        if results is not None:
            results.mkdir()
            arguments += [f"--json={results}/eval.json", f"--predictions={results}/table.csv"]
        with self._cluster(processes) if own else contextlib.nullcontext() as environment:
            logs = self._logs()
            with Group(
                script, arguments, processes=processes, logs=logs, environment=environment, **options
            ) as running:
                yield running

    def _logs(self) -> Path:
        self._groups += 1
        return self._folder / f"logs_{self._groups}"


SCENARIOS = ("train", "stop_and_resume", "resume_on_half", "lost_process", "late_process", "slow_files")
SCENARIOS += ("evaluate", "export")


def campaign(args) -> int:
    """The number of scenarios that failed."""
    root = Path(tempfile.mkdtemp(prefix="cluster_"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "cache")
    jax.config.update("jax_platforms", "cpu")
    progress.set_up_logging()
    settings = {**SETTINGS, "data.data_dir": Path(args.data_dir).absolute(), "model.name": args.model}
    if args.model != dense_model.NAME:
        settings["model.kernel_size"] = 1  # compiles sooner
    config = ["--config=configs/digits.py", *(f"--config.{name}={value}" for name, value in settings.items())]
    alone = root / "alone"
    with Group("train.py", [*config, f"--workdir={alone}"], processes=1, logs=root / "alone_logs") as running:
        assert running.statuses() == [0], running.errors()

    failed = 0
    pairs = [(cluster, processes) for cluster in args.clusters for processes in args.processes]
    with tqdm(total=len(pairs) * len(SCENARIOS), unit="scenario", disable=None) as bar:
        for cluster, processes in pairs:
            folder = root / f"{cluster}_{processes}"
            rehearsal = Rehearsal(cluster, processes, config=config, alone=alone, folder=folder, seed=args.seed)
            for scenario in SCENARIOS:
                began = time.monotonic()
                try:
                    result = getattr(rehearsal, scenario)()
                except AssertionError:
                    result, failed = f"FAILED\n{traceback.format_exc()}", failed + 1
                seconds = time.monotonic() - began
                tqdm.write(f"{cluster:24} {processes} processes  {scenario:16} {seconds:5.1f} s  {result}")
                bar.update()
    print(f"{len(pairs) * len(SCENARIOS)} scenarios, {failed} failed" + (f": see {root}" if failed else ""))
    if not failed:
        shutil.rmtree(root)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="where sklearn_digits is prepared")
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--processes", nargs="+", type=int, choices=(4, 8), default=[4, 8])
    parser.add_argument("--model", choices=(dense_model.NAME, "pola_pvt_nano"), default=dense_model.NAME)
    parser.add_argument("--seed", type=int, default=0)
    with dense_model.registered(), small_models.shallow():
        sys.exit(1 if campaign(parser.parse_args()) else 0)
