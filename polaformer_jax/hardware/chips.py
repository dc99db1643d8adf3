"""Figures of chips as published by their makers: peaks, which no program reaches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        name: for a TPU as in the name of a topology, "v5e:2x4".
        kind: JAX's name of the device (`device_kind`).
        flops: operations per second of bfloat16 matrix products, without sparsity.
        memory: bytes of device memory.
        memory_bandwidth: bytes per second between this memory and the chip.
        link_bandwidth: bytes per second that a chip can send to its neighbours, over all its links together.
    """

    name: str
    kind: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "Key specifications". For the links Google gives the sum of
# both directions for v5e (400 GB/s) and v6e (800 GB/s), half of which a chip can send, and 4800 Gbit/s for v5p; v4 has
# six links of 50 GB/s (Jouppi et al., "TPU v4", arXiv 2304.01433).
CHIPS = (
    Chip("v4", "TPU v4", 275e12, 32 * 2**30, 1200e9, 300e9),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9),
    Chip("v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1638e9, 400e9),
    # NVIDIA's data sheets (A100 80GB, H100, H200, L4), which give twice the operations, with sparsity, and the sum of
    # both directions of NVLink, or of PCIe where there is none.
    Chip("A100", "NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9),
    Chip("A100", "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9),
    Chip("A100", "NVIDIA A100 80GB PCIe", 312e12, 80e9, 1935e9, 300e9),
    Chip("H100", "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9),
    Chip("H100", "NVIDIA H100 PCIe", 756e12, 80e9, 2000e9, 300e9),
    Chip("H200", "NVIDIA H200", 989e12, 141e9, 4800e9, 450e9),
    Chip("L4", "NVIDIA L4", 121e12, 24e9, 300e9, 32e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of this `device_kind`; None if it is not in the table, as figures are never guessed."""
    return next((chip for chip in CHIPS if chip.kind == device_kind), None)
