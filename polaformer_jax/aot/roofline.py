"""Estimates the time of a step from what it computes, reads and sends, and from the peaks of the chip.

The roofline model (Williams et al., "Roofline: an insightful visual performance model", 2009), with a third roof for
communication between chips. It assumes that all three overlap, and that each runs at its published peak.
"""

import dataclasses

from polaformer_jax.hardware.chips import Chip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step for each resource by itself. An estimate, not a measurement."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """The resource that limits the step."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the peak at which matrix products are computed."""
        return self.compute / self.step


def estimate(chip: Chip, *, flops: float, memory_bytes: float, link_bytes: float) -> Estimate:
    """The time of a step by the model.

    Args:
        flops: operations of the matrix products on one chip, in one step.
        memory_bytes: bytes that the chip reads from and writes to its memory.
        link_bytes: bytes that it sends.
    """
    return Estimate(
        compute=flops / chip.flops, memory=memory_bytes / chip.memory_bandwidth, links=link_bytes / chip.link_bandwidth
    )
