"""The operations of a flat program that are exported, after all that depends on weights only has been computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from polaformer_jax.export import onnx_operations
from polaformer_jax.export.flat_program import applied
from polaformer_jax.export.onnx_operations import Weight
from polaformer_jax.export.onnx_patterns import Replaced

_SMALL = 1 << 18  # bytes that a computed array may have, however small those are that it depends on


class _Step(NamedTuple):
    """An operation of a program: its operands are variables and literals, its results variables."""

    primitive: core.Primitive
    params: Mapping
    inputs: Sequence
    outputs: Sequence[core.Var]


def with_weights(
    program: core.ClosedJaxpr, replaced: Mapping[core.Var, Replaced], names: Mapping[int, str]
) -> Callable:
    """The function to convert, of the program's arguments.

    What depends on weights only is computed here, unless the result is much larger than they are: such operations are
    exported, and runtimes compute them once, when they load the file.

    Args:
        program: flat.
        replaced: variables that another operation computes.
        names: of the weights, by the `id` of the array.
    """
    jaxpr = program.jaxpr
    constants = {
        variable: Weight(names.get(id(array), "constant"), np.asarray(array))
        for variable, array in zip(jaxpr.constvars, program.consts, strict=True)
    }
    steps = []
    for step in _live(jaxpr, replaced):
        results = _computed(step, constants)
        if results is None:
            steps.append(_as_slice(step, constants))
        else:
            name = _name(step, constants)
            constants.update((v, Weight(name, array)) for v, array in zip(step.outputs, results, strict=True))
    _number([constants[v] for v in dict.fromkeys([*_variables(steps), *jaxpr.outvars]) if v in constants])

    def run(*values):
        found = dict(zip(jaxpr.invars, values, strict=True))

        def value(atom):
            if isinstance(atom, core.Literal):
                return atom.val
            if atom not in found:
                found[atom] = onnx_operations.weight_p.bind(weight=constants[atom])
            return found[atom]

        for step in steps:
            primitive, params = onnx_operations.in_our_form(step.primitive, step.params, step.outputs[0].aval.shape)
            results = applied(primitive, params, [value(atom) for atom in step.inputs])
            found.update(zip(step.outputs, results, strict=True))
        return tuple(value(atom) for atom in jaxpr.outvars)

    return run


def _live(jaxpr: core.Jaxpr, replaced: Mapping[core.Var, Replaced]) -> list[_Step]:
    """The operations that the results depend on."""
    needed, kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        used = [v for v in equation.outvars if v in needed]
        if not used:
            continue
        if all(v in replaced for v in used):
            steps = [_Step(replaced[v].primitive, replaced[v].params, replaced[v].inputs, [v]) for v in used]
        else:
            steps = [_Step(equation.primitive, equation.params, equation.invars, equation.outvars)]
        kept += steps
        needed.update(_variables(steps))
    return kept[::-1]


def _variables(steps: Sequence[_Step]) -> list[core.Var]:
    return [v for step in steps for v in step.inputs if isinstance(v, core.Var)]


def _computed(step: _Step, constants: Mapping[core.Var, Weight]) -> Sequence[np.ndarray] | None:
    """The results of a step, unless it depends on the program's arguments, or they would take much space."""
    if any(isinstance(atom, core.Var) and atom not in constants for atom in step.inputs):
        return None
    if any(not isinstance(size, int) for v in step.outputs for size in v.aval.shape):
        return None
    known = [atom.val if isinstance(atom, core.Literal) else constants[atom].array for atom in step.inputs]
    operands = [jnp.asarray(array) for array in known]
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in step.outputs)
    if size > max(_SMALL, sum(array.nbytes for array in operands)):
        return None
    return jax.device_get(applied(step.primitive, step.params, operands))


def _as_slice(step: _Step, constants: Mapping[core.Var, Weight]) -> _Step:
    """The same step; but a gather of one block at a known place, as which JAX traces `x[:, 3]`, becomes a slice."""
    if step.primitive.name != "gather" or step.inputs[1] not in constants:
        return step
    x, index = step.inputs[0], constants[step.inputs[1]].array
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    if index.ndim != 1 or numbers.operand_batching_dims:
        return step
    starts = dict(zip(numbers.start_index_map, index.tolist(), strict=True))
    starts = {axis: starts.get(axis, 0) for axis, size in enumerate(sizes) if isinstance(size, int)}
    whole = all(size == x.aval.shape[axis] for axis, size in enumerate(sizes) if axis not in starts)
    if not whole or any(not 0 <= start <= x.aval.shape[axis] - sizes[axis] for axis, start in starts.items()):
        return step
    limits = {axis: start + sizes[axis] for axis, start in starts.items()}
    primitive, params = onnx_operations.block(starts, limits, step.outputs[0].aval.shape)
    return step._replace(primitive=primitive, params=params, inputs=[x])


def _name(step: _Step, constants: Mapping[core.Var, Weight]) -> str:
    """That of the largest weight that a step depends on."""
    sources = [constants[v] for v in _variables([step])]
    return max(sources, key=lambda weight: weight.array.nbytes).name if sources else "constant"


def _number(weights: Sequence[Weight]) -> None:
    """Makes the names of arrays different that were computed from one weight."""
    count: dict[str, int] = {}
    for weight in weights:
        count[weight.name] = number = count.get(weight.name, -1) + 1
        if number:
            weight.name = f"{weight.name}.{number}"
