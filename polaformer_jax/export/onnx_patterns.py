"""Recognises parts of the models in what they were traced to, and replaces them by operations of `onnx_operations`.

A function is recognised by its whole computation: it is traced again for the shapes at hand, and each operation of this
reference must be found in its place, with equal parameters. The name of a call only says which function to try.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from polaformer_jax.export import flat_program, onnx_operations
from polaformer_jax.models.attention import polarity_attention
from polaformer_jax.models.layers import gelu, layer_norm
from polaformer_jax.models.signed_features import rescaling

_ANY = 0.8125  # stands in a reference for a number that is to be found


class Match(NamedTuple):
    """Where a pattern was found.

    Attributes:
        arguments: the variables that stand for the pattern's arguments; None for one that it does not use.
        numbers: those that stand for `_ANY`.
    """

    arguments: list[core.Var | None]
    numbers: list[float]


class Replaced(NamedTuple):
    """The operation that computes a variable, in place of those that did.

    Attributes:
        primitive, params: of the operation.
        inputs: its operands, variables of the program.
    """

    primitive: core.Primitive
    inputs: Sequence[core.Var]
    params: Mapping

    def with_params(self, **params) -> "Replaced":
        return self._replace(params={**self.params, **params})


def match(pattern: core.Jaxpr, results: Sequence, producers: Mapping[core.Var, core.JaxprEqn]) -> Match | None:
    """Finds a flat program, which has no constants, in another.

    Args:
        results: the variables of the other program that the pattern's results should be.
        producers: the equations of the other program, by the variables that they compute.
    """
    made = _producers(pattern)
    bound: dict[core.Var, core.Var] = {}
    numbers: list[float] = []
    todo = list(zip(pattern.outvars, results, strict=True))
    while todo:
        ours, theirs = todo.pop()
        if isinstance(ours, core.Literal) or isinstance(theirs, core.Literal):
            if not (isinstance(ours, core.Literal) and isinstance(theirs, core.Literal)):
                return None
            if np.shape(ours.val) == np.shape(theirs.val) == () and ours.val == _ANY:
                numbers.append(float(theirs.val))
            elif not np.array_equal(ours.val, theirs.val):
                return None
        elif ours in bound:
            if bound[ours] is not theirs:
                return None
        elif ours not in made:
            if (ours.aval.shape, ours.aval.dtype) != (theirs.aval.shape, theirs.aval.dtype):
                return None
            bound[ours] = theirs
        else:
            mine, found = made[ours], producers.get(theirs)
            if found is None or mine.primitive is not found.primitive or mine.params != found.params:
                return None
            bound.update(zip(mine.outvars, found.outvars, strict=True))
            if bound[ours] is not theirs:
                return None
            todo += zip(mine.invars, found.invars, strict=True)
    return Match([bound.get(v) for v in pattern.invars], numbers)


def _producers(jaxpr: core.Jaxpr) -> dict[core.Var, core.JaxprEqn]:
    return {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}


def rules() -> dict[str, flat_program.Rule]:
    """For `flat_program.flattened`: the calls that are replaced."""
    return {"gelu": _gelu, "polarity_attention": _polarity_attention}


def _call_of(reference: Callable, call: flat_program.Call) -> Match | None:
    """Whether this is a call of `reference` in float32, with the arguments in the same order."""
    if {shape.dtype.name for shape in call.shapes} - {"float32", "bool"}:
        return None
    try:
        pattern = flat_program.flattened(reference, call.shapes, {}).jaxpr
    except (TypeError, ValueError):  # it does not take such arguments: the call is of another function of its name
        return None
    found = flat_program.inlined(call.program, {}).jaxpr
    matched = match(pattern, found.outvars, _producers(found))
    return matched if matched is not None and matched.arguments == found.invars else None


def _gelu(call: flat_program.Call) -> list[jax.Array] | None:
    return [onnx_operations.gelu_p.bind(*call.values)] if _call_of(gelu, call) else None


def _polarity_attention(call: flat_program.Call) -> list[jax.Array] | None:
    names = ["q", "k", "v", "g", "bias", "kernel", "mask", "positional_encoding", "power", "scale"]
    if len(call.values) == len(names) - 1:
        names.remove("mask")
    if len(call.values) != len(names):
        return None
    shapes = {name: shape.shape for name, shape in zip(names, call.shapes, strict=True)}
    if len(shapes["q"]) != 3 or len(shapes["kernel"]) not in (3, 4):
        return None

    def by(grid):
        def reference(*values):
            arrays = dict(zip(names, values, strict=True))
            return polarity_attention(**arrays, grid=grid, alpha=_ANY, implementation="xla")

        return reference

    grids = _grids(shapes["q"][1], len(shapes["kernel"]) - 2)
    found = next(((grid, matched) for grid in grids if (matched := _call_of(by(grid), call))), None)
    if found is None:
        return None
    grid, matched = found
    arrays = dict(zip(names, call.values, strict=True))
    s, p = rescaling(arrays["power"], arrays["scale"], matched.numbers[0], jnp.float32)
    heads, width = s.shape
    kernel = arrays["kernel"].reshape(-1, width).T  # (d, taps)
    kernel = jnp.tile(kernel, (heads, 1)).reshape(heads * width, 1, *shapes["kernel"][: len(grid)])
    # Queries, keys and the keys' table are divided by s one by one: a linear layer before them does so by its weights.
    q, k, table = (jnp.swapaxes(arrays[name], 1, 2) / s.reshape(1, -1, 1) for name in ("q", "k", "positional_encoding"))
    v, g = (jnp.swapaxes(arrays[name], 1, 2) for name in ("v", "g"))
    operands = [q, k, v, g, table, p, kernel, jnp.tile(arrays["bias"], heads)]
    operands += [arrays["mask"]] if "mask" in arrays else []
    return [jnp.swapaxes(onnx_operations.polarity_p.bind(*operands, grid=grid), 1, 2)]


def _grids(tokens: int, axes: int) -> Iterator[tuple[int, ...]]:
    """The grids of this many tokens, the squarest first."""
    if axes == 1:
        return iter([(tokens,)])
    sides = [(side, tokens // side) for side in range(1, tokens + 1) if tokens % side == 0]
    return iter(sorted(sides, key=lambda sides: abs(sides[0] - sides[1])))


def replacements(jaxpr: core.Jaxpr) -> dict[core.Var, Replaced]:
    """The layers of a flat program that have an operation of their own, by the variables that they compute."""
    producers = _producers(jaxpr)
    kinds = {name: kind._replace(reference=functools.cache(kind.reference)) for name, kind in _KINDS.items()}
    found: dict[core.Var, Replaced] = {}
    for equation in jaxpr.eqns:
        result, operands = equation.outvars[0], [v for v in equation.invars if isinstance(v, core.Var)]
        if (linear := _linear(equation, producers)) is not None:
            found[result] = linear
        elif operands and operands[0] in found and (parts := _parts(equation, found[operands[0]])):
            found.update(parts)
        elif (kind := kinds.get(equation.primitive.name)) is not None:
            found.update(_of_kind(kind, result, producers))
    return found


def _parts(equation: core.JaxprEqn, whole: Replaced) -> dict[core.Var, Replaced]:
    """What splits the outputs of a linear layer, moves them before the tokens, or divides them, is one as well."""
    if whole.primitive is not onnx_operations.linear_p or whole.params["divided"]:
        return {}
    name, params, result = equation.primitive.name, equation.params, equation.outvars[0]
    if whole.params["channels_first"]:
        if name != "div" or equation.invars[1].aval.shape != (1, whole.params["size"], 1):
            return {}
        return {result: whole._replace(inputs=[*whole.inputs, equation.invars[1]]).with_params(divided=True)}
    if name == "transpose" and params["permutation"] == (0, 2, 1):
        return {result: whole.with_params(channels_first=True)}
    if name != "split" or params["axis"] != equation.invars[0].aval.ndim - 1:
        return {}
    parts, start = {}, whole.params["start"]
    for variable in equation.outvars:
        size = variable.aval.shape[-1]
        parts[variable] = whole.with_params(start=start, size=size)
        start += size
    return parts


def _linear(equation: core.JaxprEqn, producers: Mapping) -> Replaced | None:
    """x W, or x W + b, where b was given the axes of x."""
    product, bias = equation, []
    if equation.primitive.name == "add":
        product, reshaped = (producers.get(v) if isinstance(v, core.Var) else None for v in equation.invars)
        if product is None or reshaped is None or reshaped.primitive.name != "reshape":
            return None
        bias = [reshaped.invars[0]]
    if product.primitive.name != "dot_general":
        return None
    x, kernel = product.invars
    axes = ((x.aval.ndim - 1,), (0,)), ((), ())
    if product.params["dimension_numbers"] != axes or kernel.aval.ndim != 2:
        return None
    if bias and bias[0].aval.shape != kernel.aval.shape[1:]:
        return None
    return Replaced(
        onnx_operations.linear_p,
        [x, kernel, *bias],
        {"start": 0, "size": kernel.aval.shape[1], "channels_first": False, "divided": False},
    )


class _Kind(NamedTuple):
    """A layer that is found by the operation that ends it.

    Attributes:
        primitive: of the layer.
        reference: its flat program, for a shape.
        params: the names of the numbers to find.
    """

    primitive: core.Primitive
    reference: Callable[[tuple], core.Jaxpr]
    params: tuple[str, ...]


def _of_kind(kind: _Kind, result: core.Var, producers: Mapping) -> dict[core.Var, Replaced]:
    if result.aval.ndim < 2 or result.aval.dtype != jnp.float32 or not isinstance(result.aval.shape[-1], int):
        return {}
    if (matched := match(kind.reference(result.aval.shape), [result], producers)) is None:
        return {}
    params = dict(zip(kind.params, matched.numbers, strict=True))
    return {result: Replaced(kind.primitive, matched.arguments, params)}


def _layer_norm(shape: tuple) -> core.Jaxpr:
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    graphdef, params = nnx.split(layer_norm(shape[-1], epsilon=_ANY, **types))

    def reference(x, scale, bias):
        nnx.replace_by_pure_dict(params, {"scale": scale, "bias": bias})
        return nnx.merge(graphdef, params)(x)

    channels = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    return flat_program.flattened(reference, [jax.ShapeDtypeStruct(shape, jnp.float32), channels, channels], {}).jaxpr


def _softmax(shape: tuple) -> core.Jaxpr:
    def reference(x):
        return jax.nn.softmax(x, axis=-1)

    return flat_program.flattened(reference, [jax.ShapeDtypeStruct(shape, jnp.float32)], {}).jaxpr


_KINDS = {
    "add": _Kind(onnx_operations.layer_norm_p, _layer_norm, ("epsilon",)),
    "div": _Kind(onnx_operations.softmax_p, _softmax, ()),
}
