"""The costs of a program: its operations and the memory that it needs."""

import math
import re

import jax
from jax.extend import core
from jax.interpreters import partial_eval

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|exceed\w* hbm", re.IGNORECASE)


def product_flops(jaxpr: core.Jaxpr) -> float:
    """Operations of the matrix products and convolutions of a program, two for each multiplication with its addition.

    Counted in the traced program, without operations that no result depends on, since what a compiled program reports
    depends on the compiler's fusions. The most expensive branch of a `cond` counts, the body of a `scan` as often as it
    runs, that of a `while` once.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops_of_all(needed)


def _flops_of_all(jaxpr: core.Jaxpr) -> float:
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
            total += max(_flops_of_all(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_flops_of_all(sub) for sub in core.jaxprs_in_params(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def memory_needed(program: jax.stages.Compiled) -> int:
    """Bytes on one device while it runs, as the compiler reports: arguments, results, temporary values, the program."""
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of compiling or running a program says that the memory is too small."""
    return _OUT_OF_MEMORY.search(str(error)) is not None
