"""What becomes a few chosen ONNX nodes: operations that stand for parts of a model while it is exported.

They exist between tracing and conversion. They have shapes and a form in ONNX (`onnx_plugins`); JAX never computes
them. All are of float32, except for masks.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.extend import core

PREFIX = "polaformer_"


class Weight:
    """An array to store in the file. Equal only to itself, so that it can be a parameter of an operation."""

    def __init__(self, name: str, array: np.ndarray):
        self.name, self.array = name, array

    def __repr__(self) -> str:
        return self.name


def _operation(name: str, shape: Callable) -> core.Primitive:
    """An operation whose result has the `shape` of its operands and parameters, and the dtype of the first operand."""
    primitive = core.Primitive(PREFIX + name)
    primitive.def_abstract_eval(
        lambda *operands, **params: jax.core.ShapedArray(tuple(shape(*operands, **params)), operands[0].dtype)
    )
    return primitive


def _shape_of_first(first, *others, **params):
    return first.shape


def _linear_shape(x, kernel, *others, start: int, size: int, channels_first: bool, divided: bool):
    return (x.shape[0], size, x.shape[1]) if channels_first else (*x.shape[:-1], size)


def _given_shape(*operands, shape: Sequence, **params):
    return shape


# () -> the array of `weight`
weight_p = core.Primitive(PREFIX + "weight")
weight_p.def_abstract_eval(lambda *, weight: jax.core.ShapedArray(weight.array.shape, weight.array.dtype))

# x (..., in), kernel (in, out), and maybe bias (out,) -> (..., size), the outputs from `start` on.
# With `channels_first`: x (B, N, in) -> (B, size, N); if `divided`, by one more operand, (1, size, 1).
linear_p = _operation("linear", _linear_shape)

# x (..., C), scale (C,), bias (C,) -> (..., C); `epsilon`
layer_norm_p = _operation("layer_norm", _shape_of_first)

# x -> the same shape
gelu_p = _operation("gelu", _shape_of_first)

# x -> the same shape, along the last axis
softmax_p = _operation("softmax", _shape_of_first)

# `polarity_attention` with channels before tokens: q / s (B, C, N), k / s and v (B, C, n), g (B, C, N), table / s
# (1, C, n), p (h, d), kernel (C, 1, *sizes) and bias (C,) of all heads, and maybe a mask (B, N) -> (B, C, N); `grid`.
polarity_p = _operation("polarity_attention", _shape_of_first)

# Operations of `lax` whose form in ONNX is ours.
dot_general_p = _operation("dot_general", _given_shape)
reshape_p = _operation("reshape", _given_shape)

# x -> the block from `starts` to `limits`, by axes that are cut, and without axes of size 1 that `shape` does not have
slice_p = _operation("slice", _given_shape)


def in_our_form(primitive: core.Primitive, params: Mapping, shape: Sequence) -> tuple[core.Primitive, Mapping]:
    """The operation and parameters that stand for an operation with a result of this shape: the same for most."""
    if primitive.name == "reshape" and params["dimensions"] is None:
        return reshape_p, {"shape": shape}
    if primitive.name == "dot_general":
        return dot_general_p, {"shape": shape, "dimension_numbers": params["dimension_numbers"]}
    if primitive.name == "slice" and set(params["strides"] or [1]) == {1}:
        axes = [axis for axis, limit in enumerate(params["limit_indices"]) if isinstance(limit, int)]
        starts, limits = ({axis: params[name][axis] for axis in axes} for name in ("start_indices", "limit_indices"))
        return block(starts, limits, shape)
    return primitive, params


def block(
    starts: Mapping[int, int], limits: Mapping[int, int], shape: Sequence
) -> tuple[core.Primitive, Mapping[str, tuple]]:
    """`slice_p` and its parameters."""
    return slice_p, {"starts": tuple(starts.items()), "limits": tuple(limits.items()), "shape": tuple(shape)}
