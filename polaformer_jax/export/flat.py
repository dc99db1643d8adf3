"""A function as one flat list of operations, with the model's own functions among them as single operations.

Tracing gives nested programs: calls of jitted and rematerialised functions, choices by platform, and functions with
derivatives of their own. Here calls are inlined and each choice is resolved to its default, the one for devices that
have no form of their own. Calls of functions that the caller knows are replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.extend import core

from polaformer_jax.errors import UserError

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


class Call(NamedTuple):
    """A call of a named function.

    Attributes:
        program: what it was traced to.
        values: its arguments, tracers.
    """

    program: core.ClosedJaxpr
    values: Sequence[jax.Array]

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.program.jaxpr.invars]


# Returns the results of a call, computed in another way, or None.
Rule = Callable[[Call], Sequence[jax.Array] | None]


def flattened(function: Callable, shapes: Sequence, rules: Mapping[str, Rule]) -> core.ClosedJaxpr:
    """The flat program of a function.

    Args:
        function: of arrays of these shapes, which returns an array or a tuple.
        shapes: `jax.ShapeDtypeStruct`s, maybe with symbolic sizes.
        rules: by the names of functions whose calls may be replaced.
    """
    return inlined(jax.make_jaxpr(function)(*shapes), rules)


def inlined(program: core.ClosedJaxpr, rules: Mapping[str, Rule]) -> core.ClosedJaxpr:
    """The flat program of a traced function; its constants are those of the original, the same objects."""

    def run(*values):
        return _evaluate(program.jaxpr, program.consts, values, rules)

    return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars))


def called(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program that an equation calls, None if it is an operation."""
    parameter = _CALLS.get(equation.primitive.name)
    if parameter is None:
        return None
    program = equation.params[parameter]
    return program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, ())


def _evaluate(jaxpr: core.Jaxpr, constants: Sequence, values: Sequence, rules: Mapping[str, Rule]) -> list:
    found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *values], strict=True))
    branches = {}  # the chosen branch, by the variable that holds the choice

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else found[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            branches[equation.outvars[0]] = params["platforms"].index(None)
            continue
        if name == "cond" and equation.invars[0] in branches:
            program = params["branches"][branches[equation.invars[0]]]
            arguments = [value(atom) for atom in equation.invars[1:]]
            results = _evaluate(program.jaxpr, program.consts, arguments, rules)
        elif (program := called(equation)) is not None:
            arguments = [value(atom) for atom in equation.invars]
            rule = rules.get(params.get("name"))
            results = rule(Call(program, arguments)) if rule else None
            if results is None:
                results = _evaluate(program.jaxpr, program.consts, arguments, rules)
        else:
            results = bind(equation, [value(atom) for atom in equation.invars])
        found.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def bind(equation: core.JaxprEqn, values: Sequence) -> Sequence:
    """Applies an equation's operation to other values."""
    results = equation.primitive.bind(*values, **equation.params)
    return results if equation.primitive.multiple_results else [results]


def live(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that the results depend on."""
    needed, kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            kept.append(equation)
            needed.update(v for v in equation.invars if isinstance(v, core.Var))
    return kept[::-1]


def refuse_other_types(program: core.ClosedJaxpr) -> None:
    """Raises a UserError if anything is computed or stored in a float type other than float32, or by a kernel."""
    if kernels := [e for e in program.jaxpr.eqns if e.primitive.name == "pallas_call"]:
        raise UserError(
            f"the model runs {len(kernels)} kernels for accelerators, which ONNX does not have: create it with "
            "attention_impl='xla'"
        )
    variables = [*program.jaxpr.constvars, *program.jaxpr.invars, *(v for e in program.jaxpr.eqns for v in e.outvars)]
    types = {str(v.aval.dtype) for v in variables if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact)}
    if others := sorted(types - {"float32"}):
        raise UserError(
            f"the model computes or is stored in {', '.join(others)}, and ONNX files are written in float32: create it "
            "with dtype='float32', param_dtype='float32'"
        )
