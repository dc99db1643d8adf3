"""The operations of a program that are to be exported, after all that depends on weights only is computed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.extend import core

from polaformer_jax.export.onnx_operations import Weight, own_form, weight_p
from polaformer_jax.export.onnx_patterns import Replaced

_SMALL = 1 << 18  # bytes that a computed array may have in any case


@dataclasses.dataclass
class _Step:
    primitive: core.Primitive
    params: Mapping
    inputs: Sequence  # variables and literals
    outputs: Sequence[core.Var]


def with_weights(
    program: core.ClosedJaxpr, replaced: Mapping[core.Var, Replaced], names: Mapping[int, str]
) -> Callable:
    """The function that is converted.

    What depends on weights only is computed here, unless the result would take much more space than they do: such
    operations remain, and runtimes compute them once when they load the file.

    Args:
        program: flat.
        replaced: what is computed in another way.
        names: of weights, by the `id` of the array.
    """
    constants: dict[core.Var, Weight] = {}
    for variable, array in zip(program.jaxpr.constvars, program.consts, strict=True):
        constants[variable] = Weight(names.get(id(array), "constant"), np.asarray(array))
    remaining = []
    for step in _live(program.jaxpr, replaced):
        results = _computed(step, constants)
        if results is None:
            remaining.append(step)
            continue
        sources = [constants[v] for v in step.inputs if isinstance(v, core.Var)]
        name = max(sources, key=lambda weight: weight.array.nbytes).name if sources else "constant"
        constants.update((v, Weight(name, array)) for v, array in zip(step.outputs, results, strict=True))
    used = {v for step in remaining for v in step.inputs if isinstance(v, core.Var)} | set(program.jaxpr.outvars)
    _number([weight for v, weight in constants.items() if v in used])

    def run(*values):
        found = dict(zip(program.jaxpr.invars, values, strict=True))

        def value(atom):
            if isinstance(atom, core.Literal):
                return atom.val
            if atom not in found:
                found[atom] = weight_p.bind(weight=constants[atom])
            return found[atom]

        for step in remaining:
            primitive, params = own_form(step.primitive, step.params, step.outputs)
            results = primitive.bind(*(value(atom) for atom in step.inputs), **params)
            found.update(zip(step.outputs, results if step.primitive.multiple_results else [results], strict=True))
        return tuple(value(atom) for atom in program.jaxpr.outvars)

    return run


def _number(weights: Sequence[Weight]) -> None:
    """Makes names different: those of several arrays that were computed from one weight."""
    count: dict[str, int] = {}
    for weight in weights:
        number = count[weight.name] = count.get(weight.name, -1) + 1
        weight.name = f"{weight.name}.{number}" if number else weight.name


def _live(jaxpr: core.Jaxpr, replaced: Mapping[core.Var, Replaced]) -> list[_Step]:
    """The operations that the results depend on."""
    needed, kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        if not needed.intersection(equation.outvars):
            continue
        steps = [_Step(equation.primitive, equation.params, equation.invars, equation.outvars)]
        if equation.outvars[0] in replaced:
            new = [(replaced[v], v) for v in equation.outvars if v in needed]
            steps = [_Step(each.primitive, each.params, each.inputs, [v]) for each, v in new]
        kept += steps
        needed.update(v for step in steps for v in step.inputs if isinstance(v, core.Var))
    return kept[::-1]


def _computed(step: _Step, constants: Mapping[core.Var, Weight]) -> Sequence | None:
    """The results of a step whose arguments are known, unless they would take much space."""
    if any(isinstance(v, core.Var) and v not in constants for v in step.inputs):
        return None
    if any(not isinstance(size, int) for v in step.outputs for size in v.aval.shape):
        return None
    known = [constants[v].array if isinstance(v, core.Var) else v.val for v in step.inputs]
    if sum(v.aval.size * v.aval.dtype.itemsize for v in step.outputs) > max(_SMALL, sum(np.asarray(a).nbytes for a in known)):
        return None
    results = step.primitive.bind(*(jax.numpy.asarray(a) for a in known), **step.params)
    return jax.device_get(results if step.primitive.multiple_results else [results])
