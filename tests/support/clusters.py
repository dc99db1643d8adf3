"""What clusters tell a process of the others, for processes that all run on this host.

Each function returns the environment of one process of a run. JAX reads it as it does on the real cluster; only the
names of hosts are "localhost", and ports are free ones.
"""

import contextlib
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

_PREFIXES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "JAX_PLATFORMS", "JAX_LOCAL_DEVICE")
_SLURM_PORTS, _SLURM_FIRST_PORT = 2**12, 2**16 - 2**12  # JAX computes the port from the job's number


class Environment(NamedTuple):
    """Of all processes of a run.

    Attributes:
        variables: of each process.
        tpu_chips: whether the hosts have any, as JAX sees when it is imported.
    """

    variables: tuple[dict[str, str], ...]
    tpu_chips: bool = False

    def enter(self, index: int) -> None:
        """Makes this the environment of the calling process, whatever it was before."""
        for name in [name for name in os.environ if name.startswith(_PREFIXES) or "_proxy" in name.lower()]:
            del os.environ[name]
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # JAX sets it where there are no chips
        if self.tpu_chips:
            from jax._src import cloud_tpu_init
            from jax._src.clusters import cloud_tpu_cluster, cluster

            del os.environ["TPU_SKIP_MDS_QUERY"]
            os.environ["TPU_LIBRARY_PATH"] = __file__  # stands for libtpu, which is not loaded on CPUs
            for module in (cloud_tpu_init, cloud_tpu_cluster, cluster):
                module.running_in_cloud_tpu_vm = True
        os.environ.update(self.variables[index])


@contextlib.contextmanager
def slurm(processes: int, *, on_a_node: int = 1) -> Iterator[Environment]:
    """A step of `srun --ntasks-per-node=...`; the first of its nodes is this host."""
    nodes = processes // on_a_node
    job = 70 * _SLURM_PORTS + _free_port(range(_SLURM_FIRST_PORT, 2**16)) - _SLURM_FIRST_PORT

    def variables(index: int) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_NODELIST": "localhost" if nodes == 1 else f"localhost,gpu[002-{nodes:03}]",
            "SLURM_NTASKS": str(processes),
            "SLURM_STEP_NUM_TASKS": str(processes),
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_STEP_TASKS_PER_NODE": f"{on_a_node}(x{nodes})",
            "SLURM_PROCID": str(index),
            "SLURM_NODEID": str(index // on_a_node),
            "SLURM_LOCALID": str(index % on_a_node),
        }

    yield Environment(tuple(map(variables, range(processes))))


@contextlib.contextmanager
def gke(processes: int) -> Iterator[Environment]:
    """Containers of Google Kubernetes Engine, one on each host of a TPU slice."""
    with _metadata_server(lambda index: {"tpu-env": ""}) as metadata:
        port = _free_port()

        def variables(index: int) -> dict[str, str]:
            return metadata(index) | {
                "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * processes),
                "TPU_WORKER_ID": str(index),
                "JAX_COORDINATOR_PORT": str(port),
            }

        yield Environment(tuple(map(variables, range(processes))), tpu_chips=True)


@contextlib.contextmanager
def tpu_vms(processes: int, *, slices: int = 1) -> Iterator[Environment]:
    """Cloud TPU VMs, the hosts of one or several slices, of which only the metadata server knows."""
    hosts, port = processes // slices, _free_port()

    def attributes(index: int) -> dict[str, str]:
        of_slices = {
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
            "MEGASCALE_NUM_SLICES": slices,
            "MEGASCALE_SLICE_ID": index // hosts,
        }
        lines = {"ZONE": "local", **(of_slices if slices > 1 else {})}
        return {
            "agent-worker-number": str(index % hosts),
            "worker-network-endpoints": ",".join(["unknown:8470:localhost"] * hosts),
            "tpu-env": "\n".join(f"{name}: '{value}'" for name, value in lines.items()),
        }

    with _metadata_server(attributes) as metadata:
        variables = (metadata(index) | {"JAX_COORDINATOR_PORT": str(port)} for index in range(processes))
        yield Environment(tuple(variables), tpu_chips=True)


@contextlib.contextmanager
def no_slice() -> Iterator[Environment]:
    """A virtual machine with TPU chips whose metadata server does not know of a slice."""
    with _metadata_server(lambda index: {}) as metadata:
        yield Environment((metadata(0),), tpu_chips=True)


@contextlib.contextmanager
def _metadata_server(attributes: Callable[[int], dict[str, str]]) -> Iterator[Callable[[int], dict[str, str]]]:
    """Answers for the metadata servers of all hosts; yields the variables that lead a process to its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            index, _, path = self.path.removeprefix("/").partition("/")
            known = attributes(int(index))
            name = path.removeprefix("computeMetadata/v1/instance/attributes/")
            found = self.headers["Metadata-Flavor"] == "Google" and name in known
            body = (known[name] if found else "not found").encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield lambda index: {"GCE_METADATA_IP": f"localhost:{server.server_port}/{index}"}
        server.shutdown()
        thread.join()


def _free_port(among: range | None = None) -> int:
    for port in among or [0]:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("localhost", port))
            return found.getsockname()[1]
    raise RuntimeError(f"none of the ports {among} is free")
