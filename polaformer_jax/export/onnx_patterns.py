"""Recognises functions of the models in what they were traced to, and replaces them by operations of `onnx_operations`.

A function is recognised by its whole computation: it is traced again for the shapes at hand, and every operation of
this reference must be found, with equal parameters and in the same places. The name of a call only says what to try.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from polaformer_jax.export import flat, onnx_operations
from polaformer_jax.models.attention import polarity_attention, rescaling
from polaformer_jax.models.layers import gelu, layer_norm

_ANY = 0.8125  # stands in a reference for a number that is to be found




def match(pattern: core.Jaxpr, target: Sequence, producers: Mapping) -> tuple[list, list] | None:
    """Finds a flat program in another.

    Args:
        pattern: without constants.
        target: the variables that the pattern's results should be.
        producers: the equations of the searched program, by the variables that they compute.

    Returns:
        What stands for each argument of the pattern, and the numbers that stand for `_ANY`; None: it is not there.
    """
    made = {v: e for e in pattern.eqns for v in e.outvars}
    bound: dict[core.Var, object] = dict.fromkeys(pattern.invars)
    numbers: list[float] = []
    todo = list(zip(pattern.outvars, target, strict=True))
    while todo:
        ours, theirs = todo.pop()
        if isinstance(ours, core.Literal):
            if not isinstance(theirs, core.Literal) or np.shape(ours.val) != np.shape(theirs.val):
                return None
            if ours.val == np.float32(_ANY):
                numbers.append(float(theirs.val))
            elif not np.array_equal(ours.val, theirs.val, equal_nan=True):
                return None
        elif bound.get(ours) is not None:
            if bound[ours] is not theirs:
                return None
        elif ours in made:
            mine = made[ours]
            if isinstance(theirs, core.Literal) or (found := producers.get(theirs)) is None:
                return None
            if mine.primitive is not found.primitive or mine.params != found.params:
                return None
            for a, b in zip(mine.outvars, found.outvars, strict=True):
                if bound.setdefault(a, b) is not b:
                    return None
            todo += zip(mine.invars, found.invars, strict=True)
        else:
            if isinstance(theirs, core.Literal) or ours.aval.shape != theirs.aval.shape:
                return None
            bound[ours] = theirs
    return [bound[v] for v in pattern.invars], numbers


def rules() -> dict[str, flat.Rule]:
    """For `flat.flattened`: the calls that are replaced."""
    return {"gelu": _gelu, "polarity_attention": _polarity_attention}


def _matches(call: flat.Call, reference: Callable) -> tuple[list, list] | None:
    pattern, found = flat.flattened(reference, call.shapes, {}).jaxpr, flat.inlined(call.program, {}).jaxpr
    producers = {v: e for e in found.eqns for v in e.outvars}
    if (match_ := match(pattern, found.outvars, producers)) is None or match_[0] != list(found.invars):
        return None
    return match_


def _gelu(call: flat.Call) -> list[jax.Array] | None:
    return None if _matches(call, gelu) is None else [onnx_operations.gelu_p.bind(*call.values)]


def _polarity_attention(call: flat.Call) -> list[jax.Array] | None:
    names = ["q", "k", "v", "g", "bias", "kernel", "mask", "positional_encoding", "power", "scale"]
    if len(call.values) == len(names) - 1:
        names.remove("mask")
    if len(call.values) != len(names):
        return None
    shapes = {name: shape.shape for name, shape in zip(names, call.shapes, strict=True)}

    for grid in _grids(shapes["q"][1], len(shapes["kernel"]) - 2):

        def reference(*values, grid=grid):
            arrays = dict(zip(names, values, strict=True))
            return polarity_attention(**arrays, grid=grid, alpha=_ANY, implementation="xla")

        if (found := _matches(call, reference)) is not None:
            break
    else:
        return None
    arrays = dict(zip(names, call.values, strict=True))
    s, p = rescaling(arrays["power"], arrays["scale"], found[1][0], jnp.float32)
    channels = shapes["q"][2]
    kernel = arrays["kernel"].reshape(-1, arrays["kernel"].shape[-1]).T  # (d, taps)
    kernel = jnp.tile(kernel, (s.shape[0], 1)).reshape(channels, 1, *shapes["kernel"][: len(grid)])
    operands = [jnp.swapaxes(arrays[name], 1, 2) for name in ("q", "k", "v", "g", "positional_encoding")]
    operands += [s, p, kernel, jnp.tile(arrays["bias"], s.shape[0]), *([arrays["mask"]] if "mask" in arrays else [])]
    return [jnp.swapaxes(onnx_operations.polarity_p.bind(*operands, grid=grid), 1, 2)]


def _grids(tokens: int, axes: int):
    """The grids of this many tokens, the squarest first."""
    if axes == 1:
        return [(tokens,)]
    sides = [(side, tokens // side) for side in range(1, tokens + 1) if tokens % side == 0]
    return sorted(sides, key=lambda sides: abs(sides[0] - sides[1]))


class Replaced(NamedTuple):
    """An operation in place of those that computed a variable.

    Attributes:
        primitive, params: of the operation.
        inputs: variables of the program.
    """

    primitive: core.Primitive
    inputs: list[core.Var]
    params: dict


def replacements(jaxpr: core.Jaxpr) -> dict[core.Var, Replaced]:
    """The layer normalisations and softmaxes of a flat program, by the variables that they compute."""
    producers = {v: e for e in jaxpr.eqns for v in e.outvars}
    found = {}
    for equation in jaxpr.eqns:
        if (linear := _linear(equation, producers)) is not None:
            found[equation.outvars[0]] = linear
    for equation in jaxpr.eqns:
        whole = found.get(equation.invars[0]) if equation.primitive.name == "split" else None
        if whole is not None and equation.params["axis"] == equation.invars[0].aval.ndim - 1:
            sizes = [int(size) for size in equation.params["sizes"]]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            for variable, start, size in zip(equation.outvars, starts, sizes, strict=True):
                found[variable] = whole._replace(params={**whole.params, "start": start, "size": size})
    for equation in jaxpr.eqns:
        if equation.primitive.name == "transpose" and equation.params["permutation"] == (0, 2, 1):
            if (linear := found.get(equation.invars[0])) is not None:
                found[equation.outvars[0]] = linear._replace(params={**linear.params, "channels_first": True})
    for equation in jaxpr.eqns:
        kind = _ROOTS.get(equation.primitive.name)
        out = equation.outvars[0]
        if kind is None or out.aval.ndim < 2 or out.aval.dtype != jnp.float32:
            continue
        if (matched := match(kind.reference(out.aval.shape), [out], producers)) is not None:
            found[out] = Replaced(kind.primitive, matched[0], dict(zip(kind.params, matched[1], strict=True)))
    return found


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
    return Replaced(onnx_operations.linear_p, [x, kernel, *bias], {"start": 0, "size": kernel.aval.shape[1], "channels_first": False})


class _Kind(NamedTuple):
    primitive: core.Primitive
    reference: Callable  # of a shape: its flat program
    params: tuple[str, ...]  # the names of the numbers to find


@functools.cache
def _layer_norm(shape: tuple) -> core.Jaxpr:
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    graphdef, state = nnx.split(layer_norm(shape[-1], epsilon=_ANY, **types))

    def reference(x, scale, bias):
        return nnx.merge(graphdef, nnx.State({"scale": state["scale"].replace(scale), "bias": state["bias"].replace(bias)}))(x)

    channels = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    return flat.flattened(reference, [jax.ShapeDtypeStruct(shape, jnp.float32), channels, channels], {}).jaxpr


@functools.cache
def _softmax(shape: tuple) -> core.Jaxpr:
    def reference(x):
        return jax.nn.softmax(x, axis=-1)

    return flat.flattened(reference, [jax.ShapeDtypeStruct(shape, jnp.float32)], {}).jaxpr


# By the operation that ends them.
_ROOTS = {
    "add": _Kind(onnx_operations.layer_norm_p, _layer_norm, ("epsilon",)),
    "div": _Kind(onnx_operations.softmax_p, _softmax, ()),
}
