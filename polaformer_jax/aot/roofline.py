"""How long a step might take, from what it computes, reads and sends, and what the chip could do at best.

The roofline model (Williams et al., "Roofline: an insightful visual performance model", 2009), with a third roof for
what chips send each other. All three overlap in it, and each runs at its published peak.
"""

import dataclasses
import math

from jax.extend import core

from polaformer_jax.aot.chips import Chip


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


def product_flops(jaxpr: core.Jaxpr) -> float:
    """Operations of the matrix products and convolutions of a program, two for each multiplication with its addition.

    Counted from the program as it is written, since what a compiled one reports depends on the compiler's fusions. The
    longest branch of a condition counts, the body of a `scan` as often as it runs, that of a `while` once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        elif name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(product_flops(sub) for sub in core.jaxprs_in_params(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total
