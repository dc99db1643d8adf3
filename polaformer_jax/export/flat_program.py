"""A function as one flat list of operations, for converters that know operations only.

Tracing gives nested programs: calls of jitted and rematerialised functions, choices by platform, and functions with
derivatives of their own. Here calls are inlined, and each choice by platform becomes its default, which is the one
without kernels and layouts for certain devices. The caller may replace calls of functions that it knows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from polaformer_jax.errors import UserError

# Operations that call a program, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Call(NamedTuple):
    """A call of a named function.

    Attributes:
        program: what the function was traced to.
        values: its arguments, tracers.
    """

    program: core.ClosedJaxpr
    values: Sequence[jax.Array]

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        return argument_shapes(self.program)


# Returns the results of a call, computed in another way, or None to inline it.
Rule = Callable[[Call], Sequence[jax.Array] | None]


def flattened(
    function: Callable, shapes: Sequence[jax.ShapeDtypeStruct], rules: Mapping[str, Rule]
) -> core.ClosedJaxpr:
    """The flat program of a function of arrays, which returns an array or a tuple.

    Args:
        shapes: of the arguments, maybe with symbolic sizes.
        rules: by the names of the functions whose calls may be replaced.

    Returns:
        A program whose constants are the arrays that the function refers to, the same objects.
    """
    return inlined(jax.make_jaxpr(function)(*shapes), rules)


def inlined(program: core.ClosedJaxpr, rules: Mapping[str, Rule]) -> core.ClosedJaxpr:
    """The flat program of a traced function, see `flattened`."""

    def run(*values):
        return _evaluated(program, values, rules)

    return jax.make_jaxpr(run)(*argument_shapes(program))


def argument_shapes(program: core.ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars]


def _evaluated(program: core.ClosedJaxpr, values: Sequence, rules: Mapping[str, Rule]) -> list:
    jaxpr = program.jaxpr
    found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *values], strict=True))
    defaults = {}  # the index of the default, by the variable that holds the choice

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else found[atom]

    for equation in jaxpr.eqns:
        primitive, params = equation.primitive, equation.params
        if primitive.name == "platform_index":
            defaults[equation.outvars[0]] = params["platforms"].index(None)
            continue
        if primitive.name == "cond" and equation.invars[0] in defaults:
            branch = params["branches"][defaults[equation.invars[0]]]
            results = _evaluated(branch, [value(atom) for atom in equation.invars[1:]], rules)
        elif primitive.name in _CALLS:
            results = _called(equation, [value(atom) for atom in equation.invars], rules)
        else:
            results = applied(primitive, params, [value(atom) for atom in equation.invars])
        found.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _called(equation: core.JaxprEqn, values: Sequence, rules: Mapping[str, Rule]) -> Sequence:
    program = equation.params[_CALLS[equation.primitive.name]]
    if not isinstance(program, core.ClosedJaxpr):
        program = core.ClosedJaxpr(program, ())
    rule = rules.get(equation.params.get("name"))
    results = None if rule is None else rule(Call(program, values))
    return _evaluated(program, values, rules) if results is None else results


def applied(primitive: core.Primitive, params: Mapping, values: Sequence) -> Sequence:
    """The results of an operation."""
    results = primitive.bind(*values, **params)
    return results if primitive.multiple_results else [results]


def check_float32(program: core.ClosedJaxpr) -> None:
    """Checks that a flat program has no float type other than float32, and no kernel of an accelerator.

    Raises:
        UserError: otherwise.
    """
    if any(equation.primitive.name == "pallas_call" for equation in program.jaxpr.eqns):
        raise UserError(
            "the model runs kernels for accelerators, which ONNX does not have: create it with attention_impl='xla'"
        )
    variables = [*program.jaxpr.constvars, *program.jaxpr.invars, *(v for e in program.jaxpr.eqns for v in e.outvars)]
    types = {v.aval.dtype.name for v in variables if jnp.issubdtype(v.aval.dtype, jnp.inexact)}
    if others := sorted(types - {"float32"}):
        raise UserError(
            f"the model is stored or computed in {' and '.join(others)}, and ONNX files are written in float32: create "
            "it with dtype='float32' and param_dtype='float32'"
        )
