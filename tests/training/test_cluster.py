"""What the environment says of a run's processes: which are announced, and which GPUs each of them gets."""

import os
import subprocess
import sys

import pytest

from polaformer_jax.errors import UserError
from polaformer_jax.training import cluster
from tests.support import ROOT, clusters


@pytest.mark.parametrize(
    "environ, name",
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),  # `srun --pty bash`
        ({"SLURM_NTASKS": "8"}, None),  # a batch script, outside `srun`
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, "TPU_PROCESS_ADDRESSES"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, "MEGASCALE_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, None),
    ],
)
def test_several_processes_are_announced(environ, name):
    assert cluster.announced_by(environ) == name


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({"TPU_LIBRARY_PATH": "libtpu.so"}, True),
        ({"TPU_LIBRARY_PATH": "libtpu.so", "TPU_SKIP_MDS_QUERY": "1"}, False),  # JAX sets it where there is no chip
        ({"TPU_LIBRARY_PATH": "libtpu.so", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_LIBRARY_PATH": "libtpu.so", "JAX_PLATFORMS": "tpu,cpu"}, True),
    ],
)
def test_a_tpu_vm_may_be_one_of_several(environ, expected):
    assert cluster.may_be_tpu_vm(environ) == expected


def test_jax_says_that_there_is_no_tpu_chip():
    """Its note is what tells a TPU VM from other machines."""
    code = "import os; os.environ.pop('TPU_SKIP_MDS_QUERY', None); import jax; print(os.environ['TPU_SKIP_MDS_QUERY'])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "1"


@pytest.mark.slow
def test_a_tpu_vm_whose_metadata_server_is_silent_or_knows_of_no_slice():
    """JAX says so by an error of a connection and by a ValueError; the one ends a run, the other is a single host."""
    code = """
import os, sys
import jax
from polaformer_jax.config import defaults
from polaformer_jax.errors import UserError
from polaformer_jax.training import runtime
from tests.support import clusters

jax.config.update("jax_platforms", "cpu")
clusters.Environment(({"GCE_METADATA_IP": "localhost:1"},), tpu_chips=True).enter(0)
try:
    with runtime.session(defaults().distributed):
        print("joined")
except UserError as error:
    print(error)
with clusters.no_slice() as environment:
    environment.enter(0)
    with runtime.session(defaults().distributed):
        print(jax.distributed.is_initialized())
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT, timeout=60)
    refused, single = output.splitlines()
    assert refused.startswith("this TPU VM's metadata server does not say which hosts belong together: HTTPConnection")
    assert refused.endswith("If it is a single host, set TPU_SKIP_MDS_QUERY=1")
    assert single == "False"


def slurm(rank, tasks, visible=None, on_node=None, node=0):
    environ = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": rank, "SLURM_STEP_TASKS_PER_NODE": tasks}
    environ |= {"SLURM_NODEID": node, "CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}
    return {name: str(value) for name, value in environ.items() if value is not None}


def open_mpi(rank, processes, visible):
    environ = {"OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_LOCAL_SIZE": processes}
    return {name: str(value) for name, value in environ.items()} | {"CUDA_VISIBLE_DEVICES": visible}


EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    "environ, expected",
    [
        pytest.param(slurm(0, "1(x2)", EIGHT, 8), [], id="one-task-a-node"),
        pytest.param(slurm(0, "1(x2)"), [], id="one-task-a-node-whatever-it-sees"),
        pytest.param(slurm(3, "8(x2)", EIGHT, 8), [3], id="one-task-a-gpu"),
        pytest.param(slurm(1, "2(x8)", EIGHT, 8), [4, 5, 6, 7], id="two-tasks-share-eight"),
        pytest.param(slurm(3, "8(x2)", "3", 8), [], id="bound-to-one"),
        pytest.param(slurm(1, "2(x8)", "4,5,6,7", 8), [], id="bound-to-four"),
        pytest.param(slurm(1, "2(x8)", "0,1,2,3", 4), [2, 3], id="four-on-the-node"),
        pytest.param(slurm(1, "4(x2),2", "0,1", 2, node=2), [1], id="fewer-tasks-on-the-last-node"),
        pytest.param(slurm(1, "4(x4)", ""), None, id="no-gpu"),
        pytest.param(slurm(1, "4(x4)", "-1"), None, id="gpus-hidden"),
        pytest.param(open_mpi(2, 4, EIGHT), [4, 5], id="open-mpi"),
        pytest.param(open_mpi(0, 1, EIGHT), [], id="open-mpi-one-a-host"),
        pytest.param({"CUDA_VISIBLE_DEVICES": EIGHT}, None, id="no-cluster"),
        pytest.param(slurm(1, "2(x8)", EIGHT, 8) | {"JAX_LOCAL_DEVICE_IDS": "0"}, None, id="told-by-the-user"),
    ],
)
def test_the_gpus_of_a_host_are_shared_by_its_processes(environ, expected):
    assert cluster.local_gpus(environ) == expected


def test_gpus_that_cannot_be_shared_evenly():
    with pytest.raises(UserError, match="3 processes on this host see 8 GPUs, which cannot be shared evenly: start 1"):
        cluster.local_gpus(slurm(0, "3(x2)", EIGHT, 8))


@pytest.mark.parametrize("tasks, gpus", [(1, "all"), (2, "0,1,2,3")])
def test_jax_takes_the_gpus_that_it_is_told(tasks, gpus):
    """By a process of a Slurm step on a node with eight GPUs; JAX's own choice would be the first."""
    code = """
import jax
from jax._src import xla_bridge
from polaformer_jax.config import defaults
from polaformer_jax.training import runtime
with runtime.session(defaults().distributed):
    print(jax.distributed.is_initialized(), xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
    with clusters.slurm(1) as environment:
        environ = environment.variables[0] | slurm(0, tasks, EIGHT, 8) | {"JAX_PLATFORMS": "cpu"}
        script = [sys.executable, "-c", code]
        output = subprocess.check_output(script, env=os.environ | environ, text=True, cwd=ROOT, timeout=60)
    assert output.split() == ["True", gpus]
