"""What becomes a few chosen ONNX nodes: operations that stand for the models' functions while a model is exported.

They exist between tracing and conversion only. They have a shape and a lowering to ONNX (`onnx_plugins`), and are never
computed by JAX.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.extend import core

PREFIX = "polaformer_"


def _operation(name: str, shape: Callable) -> core.Primitive:
    primitive = core.Primitive(PREFIX + name)
    primitive.def_abstract_eval(shape)
    return primitive


def _like_first(first, *others, **params):
    return jax.core.ShapedArray(first.shape, first.dtype)


def _weight_shape(*, weight: "Weight"):
    return jax.core.ShapedArray(weight.array.shape, weight.array.dtype)


class Weight:
    """An array to store in the file under a name. Equal only to itself, so that it can be a parameter."""

    def __init__(self, name: str, array: np.ndarray):
        self.name, self.array = name, array

    def __repr__(self) -> str:
        return self.name


# () -> the array.
weight_p = _operation("weight", _weight_shape)

# x (..., C), scale (C,), bias (C,) -> (..., C); epsilon.
layer_norm_p = _operation("layer_norm", _like_first)


def _linear_shape(x, kernel, bias=None, *, start, size, channels_first):
    return jax.core.ShapedArray((x.shape[0], size, x.shape[1]) if channels_first else (*x.shape[:-1], size), x.dtype)


# x (..., in), kernel (in, out), maybe a bias (out,) -> (..., size), the outputs from `start` on;
# (B, N, in) -> (B, size, N) with `channels_first`.
linear_p = _operation("linear", _linear_shape)

# x -> the exact GELU of x.
gelu_p = _operation("gelu", _like_first)

# x -> softmax along the last axis.
softmax_p = _operation("softmax", _like_first)

# q (B, C, N), k and v (B, C, n), g (B, C, N), table (1, C, n), s and p (h, d), kernel (C, 1, *sizes), bias (C,), and
# maybe a mask (B, N) -> (B, C, N). `polarity_attention` with channels before tokens, s and p computed, and the
# convolution's kernel repeated for all heads; grid.
polarity_p = _operation("polarity_attention", _like_first)


def _given_shape(*operands, shape, **params):
    return jax.core.ShapedArray(shape, operands[0].dtype)


# Operations of `lax` with a lowering of our own, by their names.
_OWN = {name: _operation(name, _given_shape) for name in ("dot_general", "reshape", "slice")}


def own_form(primitive: core.Primitive, params: dict, outputs: list) -> tuple[core.Primitive, dict]:
    """The operation and its parameters with which one of `lax` is exported."""
    if (own := _OWN.get(primitive.name)) is None:
        return primitive, params
    shape = outputs[0].aval.shape
    if primitive.name == "reshape":
        return own, {"shape": shape}
    return own, {**params, "shape": shape}
