"""Devices that are not present, by name: TPU topologies ("v5e:2x4"), GPUs ("h100", "h100:8"), fake CPUs ("cpu:8")."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from polaformer_jax.aot import gpu_targets
from polaformer_jax.errors import UserError

_PLUGIN = re.compile(r"jax[-_]cuda\d+[-_](plugin|pjrt)")


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Devices of a topology, to compile for.

    Args:
        topology: of TPUs, such as "v5e:16x16"; "h100", a GPU, or "h100:8", those of one host; or "cpu:8", eight fake
            devices, for trials.

    Raises:
        UserError: there is no such topology, or the compiler for it is not installed.
    """
    generation, _, shape = topology.partition(":")
    if generation == "cpu" and shape.isdecimal() and int(shape):
        return _cpus(topology, int(shape))
    if generation in gpu_targets.TARGETS and re.fullmatch(r"([1-9]\d*)?", shape) and not topology.endswith(":"):
        return _gpus(topology, generation, int(shape or 1))
    if not re.fullmatch(r"v\w+:\d+(x\d+){1,2}", topology):
        raise UserError(
            f"{topology}: expected a TPU topology, such as v5e:2x4, v5e:16x16 or v5p:2x2x2; h100 or h100:8; or cpu:8",
            argument="topology",
        )
    return _tpus(topology, generation)


def compiler_options(devices: Sequence[jax.Device]) -> tuple[Mapping[str, Any], ...]:
    """Options for compiling for these devices when they are not present, in the order in which to try them.

    Without a GPU nothing can be timed: XLA takes its default for each product rather than the fastest kernel. Its
    defaults for kernels of its own (Triton) do not fit all shapes (`no_default`); then all products are cuBLAS's.
    """
    if devices[0].platform != "gpu":
        return ({},)
    untimed = {"xla_gpu_autotune_level": 0}
    return untimed, {**untimed, "xla_gpu_enable_triton_gemm": False}


def no_default(error: Exception) -> bool:
    """Whether an error of compiling says that XLA's default for a product of its own does not fit."""
    return "tile sizes that satisfy" in str(error)


def _cpus(topology: str, count: int) -> Sequence[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # too late: JAX is in use already
        pass
    if len(devices := jax.devices("cpu")) < count:
        raise UserError(f"{topology}, but this process has {len(devices)} CPU devices already", argument="topology")
    return devices[:count]


def _tpus(topology: str, generation: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'{topology} needs the TPU compiler, libtpu (but no TPU): pip install "polaformer_jax[tpu]" (or -e'
            ' ".[tpu]" in a checkout)',
            argument="topology",
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # a machine without a TPU has no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once: no chip is in use
    # On a v4, JAX sees both cores of a chip as one device, which a topology has to be told.
    return _described(topology, topology, "tpu", **({"chip_config_name": "megacore"} if generation == "v4" else {}))


def _gpus(topology: str, name: str, count: int) -> Sequence[jax.Device]:
    plugins = _cuda_plugins()
    if len({name.rsplit("-", 1)[-1] for name in plugins}) < 2:  # both are needed
        raise UserError(
            f"{topology} needs JAX's compiler for CUDA (but no GPU and no driver), of the version of JAX:"
            f" pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
            " nvidia-cuda-nvcc-cu12",
            argument="topology",
        )
    if other := [f"{plugin} {version}" for plugin, version in plugins.items() if version != jax.__version__]:
        raise UserError(
            f"{topology}: {', '.join(other)} does not fit jax {jax.__version__}, install the same version of it",
            argument="topology",
        )
    # The plugin would look for a driver and CUDA's libraries, which only running a program needs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    target = gpu_targets.description(gpu_targets.TARGETS[name])
    return _described(topology, name, "cuda", target_config=target, topology=f"1x1x{count}")  # slices, hosts, GPUs


def _cuda_plugins() -> dict[str, str]:
    """The installed packages of JAX's plugin for CUDA, and their versions."""
    found = importlib.metadata.distributions()
    names = (((item.metadata["Name"] or "").replace("_", "-"), item.version) for item in found)
    return {name: version for name, version in names if _PLUGIN.fullmatch(name)}


def _described(given: str, /, *arguments: str, **options: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(*arguments, **options).devices
    except Exception as error:  # of several types, by version
        raise UserError(f"{given}: {(str(error) or repr(error)).splitlines()[0]}", argument="topology") from error
