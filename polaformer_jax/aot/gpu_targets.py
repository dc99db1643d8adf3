"""What XLA has to know of a GPU to compile for it when it is not present."""

import dataclasses

from polaformer_jax.hardware.chips import Chip, chip_of

# "Technical specifications per compute capability" of NVIDIA's CUDA C++ programming guide, for 9.0 (Hopper); names of
# XLA's GpuDeviceInfoProto. KiB of shared memory: 48 unless a kernel asks for more, at most 227 a block, 228 an SM.
_HOPPER = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 64 * 2**10,
    "registers_per_block_limit": 64 * 2**10,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_core": 228 * 2**10,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        chip: its published figures.
        capability: compute capability, major and minor.
        figures: further ones, by XLA's names.
        cuda, cudnn: versions of the libraries that it is to run with.
    """

    chip: Chip
    capability: tuple[int, int]
    figures: dict[str, float]
    cuda: tuple[int, int, int] = (12, 8, 0)
    cudnn: tuple[int, int, int] = (9, 10, 0)


TARGETS = {
    # SMs, FP32 units of an SM, L2 and boost clock: "NVIDIA H100 Tensor Core GPU Architecture" (2022), H100 SXM5.
    "h100": Target(
        chip_of("NVIDIA H100 80GB HBM3"),
        (9, 0),
        {**_HOPPER, "core_count": 132, "fpus_per_core": 128, "l2_cache_size": 50 * 2**20, "clock_rate_ghz": 1.98},
    ),
}


def description(target: Target) -> str:
    """The target as XLA reads it: the text of a GpuTargetConfigProto."""
    figures = target.figures | {
        "memory_bandwidth": round(target.chip.memory_bandwidth),
        "device_memory_size": round(target.chip.memory),
    }
    major, minor = target.capability
    lines = [f"{name}: {value}" for name, value in figures.items()]
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"runtime_version {{ {_version(target.cuda)} }}",
            f"dnn_version_info {{ {_version(target.cudnn)} }}",
            f'device_description_str: "{target.chip.kind}"',
        ]
    )


def _version(numbers: tuple[int, int, int]) -> str:
    return " ".join(f"{name}: {number}" for name, number in zip(("major", "minor", "patch"), numbers, strict=True))
