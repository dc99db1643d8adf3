"""What a program computes, counted from the program as it is written."""

import math

from jax.extend import core


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
