"""What the environment says of a run's other processes, and of the GPUs that belong to each of them.

JAX finds the number of processes, the index of this one and the address of the first: under Slurm and Open MPI, in the
containers of GKE and on Cloud TPU VMs (`jax.distributed.initialize`). Here is what has to be known beside that.
"""

import glob
import importlib.util
import os
import re
from collections.abc import Mapping

from polaformer_jax.errors import UserError

# How the environments that JAX supports indicate several processes: a variable, and a test of its value.
_MANY = {
    "JAX_COORDINATOR_ADDRESS": bool,
    "SLURM_STEP_NUM_TASKS": lambda value: int(value) > 1,  # within `srun`
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "TPU_PROCESS_ADDRESSES": lambda value: "," in value,  # GKE, a slice of several hosts
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_COORDINATOR_ADDRESS": bool,  # several slices
}
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def announced_by(environ: Mapping[str, str] = os.environ) -> str | None:
    """The variable that indicates several processes, or None."""
    return next((name for name, many in _MANY.items() if environ.get(name) and many(environ[name])), None)


def may_be_tpu_vm(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this may be one of the hosts of a TPU slice which only its metadata server knows.

    On Cloud TPU VMs no variable is set for a program. JAX itself sets TPU_SKIP_MDS_QUERY, as it is imported, where it
    finds no TPU chip.
    """
    wanted = environ.get("JAX_PLATFORMS", "tpu").split(",")
    return "TPU_SKIP_MDS_QUERY" not in environ and "tpu" in wanted and _has_libtpu(environ)


def _has_libtpu(environ: Mapping[str, str]) -> bool:
    return "TPU_LIBRARY_PATH" in environ or importlib.util.find_spec("libtpu") is not None


def local_gpus(environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """Which of the GPUs that this process sees are its own under Slurm or Open MPI.

    JAX takes the one whose number is the process's rank on its host. That leaves GPUs without work where there are
    fewer processes than GPUs on a host, and names one that is not there where Slurm shows each task only its own. Here
    the processes of a host share its GPUs evenly.

    Returns:
        Their numbers; [] for all that are visible; None: JAX's own rule.

    Raises:
        UserError: they cannot be shared evenly.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_LOCALID" in environ:
        rank, tasks = int(environ["SLURM_LOCALID"]), _slurm_tasks(environ)
    elif "OMPI_COMM_WORLD_LOCAL_RANK" in environ and "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        rank, tasks = int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]), int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    else:
        return None
    visible, of_node = _visible_gpus(environ), environ.get("SLURM_GPUS_ON_NODE", "")
    if tasks == 1 or (of_node.isdecimal() and visible < int(of_node)):  # the task is bound to its own
        return []
    if not visible or tasks is None:
        return None
    if visible % tasks:
        raise UserError(
            f"{tasks} processes on this host see {visible} GPUs, which cannot be shared evenly: start 1 process on each"
            " host, or one for each GPU"
        )
    share = visible // tasks
    return list(range(rank * share, (rank + 1) * share))


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    """The number of this step's tasks on this node, from a list such as "4(x2),3" of all nodes."""
    counts = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeats or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else None


def _visible_gpus(environ: Mapping[str, str]) -> int:
    listed = next((environ[name] for name in _VISIBLE if name in environ), None)
    if listed is None:
        return len(glob.glob("/dev/nvidia[0-9]*"))
    return len([device for device in listed.split(",") if device and device != "-1"])
