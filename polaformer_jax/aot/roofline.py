"""How long a step might take, from what it computes, reads and sends, and what the chip could do at best.

The roofline model (Williams et al., "Roofline: an insightful visual performance model", 2009), with a third roof for
what chips send each other. All three overlap in it, and each runs at its published peak.
"""

import dataclasses

from polaformer_jax.hardware.chips import Chip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step, each alone. An estimate, not a measurement."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What the step waits for."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the peak at which matrix products are computed."""
        return self.compute / self.step


def estimate(chip: Chip, *, flops: float, memory_bytes: float, link_bytes: float) -> Estimate:
    """The time of a step by the model.

    Args:
        flops: of the matrix products on one chip, in one step.
        memory_bytes: what the chip reads from its memory and writes there.
        link_bytes: what it sends.
    """
    return Estimate(
        compute=flops / chip.flops, memory=memory_bytes / chip.memory_bandwidth, links=link_bytes / chip.link_bandwidth
    )
