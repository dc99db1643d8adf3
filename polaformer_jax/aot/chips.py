"""What the makers publish of their chips: peaks, which no program reaches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        name: as in the name of a topology, "v5e:2x4".
        kind: what JAX calls the device (`device_kind`).
        flops: operations a second of bfloat16 matrix products.
        memory: bytes of HBM.
        memory_bandwidth: bytes a second between HBM and the chip.
        link_bandwidth: bytes a second that a chip can send to its neighbours, over all its links together.
    """

    name: str
    kind: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "Key specifications". For the links Google gives the sum of
# both directions for v5e (400 GB/s) and v6e (800 GB/s), of which a chip sends half, and 4800 Gbit/s for v5p; v4 has six
# links of 50 GB/s (Jouppi et al., "TPU v4", arXiv 2304.01433).
CHIPS = (
    Chip("v4", "TPU v4", 275e12, 32 * 2**30, 1200e9, 300e9),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9),
    Chip("v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1638e9, 400e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not in the table: then nothing is estimated."""
    return next((chip for chip in CHIPS if chip.kind == device_kind), None)
