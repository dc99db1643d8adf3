"""The operations of `onnx_operations` as ONNX nodes: plugins for jax2onnx.

Which nodes, and in which order, was chosen by what ONNX Runtime takes least time for on a CPU.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from polaformer_jax.export.onnx_operations import PREFIX
from polaformer_jax.models.attention import NORMALISER_EPS

_TINY = np.float32(np.finfo(np.float32).tiny)
_LEAST_WEIGHT = 1e-30  # of softmax attention; smaller ones become zero


def register() -> None:
    """Adds the plugins to jax2onnx's registry; may be called again."""
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    def plugin(nodes: Callable) -> type:
        class Plugin(PrimitiveLeafPlugin):
            def lower(self, ctx, eqn):
                expected = ctx.get_value_for_var(eqn.outvars[0])
                result = nodes(_Graph(ctx), eqn, *(ctx.get_value_for_var(v) for v in eqn.invars))
                result.type, result.shape = expected.type, expected.shape
                ctx.bind_value_for_var(eqn.outvars[0], result)

        return Plugin

    for name, nodes in _NODES.items():
        register_primitive(jaxpr_primitive=PREFIX + name, context="polaformer_jax", component=name)(plugin(nodes))


class _Graph:
    """Adds nodes: `graph.Mul(a, b)`. Arrays of NumPy and lists of integers among the inputs become initializers."""

    def __init__(self, ctx):
        self._ctx = ctx

    def __getattr__(self, kind: str) -> Callable:
        def add(*inputs, outputs: int = 1, **attributes):
            inputs = [self._constant(x) if isinstance(x, (np.ndarray, np.generic, list)) else x for x in inputs]
            names = [self._ctx.fresh_name(kind.lower()) for _ in range(outputs)]
            made = getattr(self._ctx.builder, kind)(*inputs, _outputs=names, **attributes)
            if kind != "Cast":
                for value in made if outputs > 1 else [made]:
                    value.type = inputs[0].type
            return made

        return add

    def _constant(self, value):
        if isinstance(value, list):
            return self.initializer(self._ctx.fresh_name("integers"), np.array(value, np.int64))
        return self.initializer(self._ctx.fresh_name("number"), np.asarray(value))

    def initializer(self, name: str, array: np.ndarray):
        return self._ctx.builder.add_initializer_from_array(name=name, array=array)

    def reshaped(self, x, *sizes):
        """Reshape. One of the sizes may depend on the batch: it is left to the runtime."""
        return self.Reshape(x, [-1 if _depends_on_batch(size) else int(size) for size in sizes])


def _depends_on_batch(size) -> bool:
    return not isinstance(size, (int, np.integer))


def _weight(graph, eqn):
    return graph.initializer(eqn.params["weight"].name, eqn.params["weight"].array)


def _linear(graph, eqn, x, kernel, *others):
    *leading, features = eqn.invars[0].aval.shape
    start, size, divided = (eqn.params[name] for name in ("start", "size", "divided"))
    bias = others[: len(others) - divided]
    if size != eqn.invars[1].aval.shape[1]:  # the part of a constant is a constant to runtimes
        kernel, *bias = (graph.Slice(array, [start], [start + size], [-1]) for array in (kernel, *bias))
    # A Transpose before MatMul becomes part of it in ONNX Runtime, but not one before Gemm.
    if eqn.params["channels_first"]:
        constants = [graph.Transpose(kernel, perm=[1, 0]), *(graph.Unsqueeze(array, [1]) for array in bias)]
        if divided:
            divisor = graph.reshaped(others[-1], size, 1)
            constants = [graph.Div(array, divisor) for array in constants]
        kernel, *bias = constants  # (size, in), (size, 1)
        y = graph.MatMul(kernel, graph.Transpose(x, perm=[0, 2, 1]))
        return graph.Add(y, bias[0]) if bias else y
    producer = x.producer()
    if producer is not None and producer.op_type == "Transpose" and len(leading) == 2:
        y = graph.MatMul(x, kernel)
        return graph.Add(y, bias[0]) if bias else y
    if len(leading) == 1:
        return graph.Gemm(x, kernel, *bias)
    return graph.reshaped(graph.Gemm(graph.reshaped(x, -1, features), kernel, *bias), *leading, size)


def _layer_norm(graph, eqn, x, scale, bias):
    return graph.LayerNormalization(x, scale, bias, axis=-1, epsilon=eqn.params["epsilon"])


def _gelu(graph, eqn, x):
    return graph.Gelu(x)


def _softmax(graph, eqn, x):
    y = graph.Softmax(x, axis=-1)
    if eqn.outvars[0].aval.ndim == 2:
        return y
    # Attention weights at pairs that a mask excludes are about e^-88 in ONNX Runtime: numbers so small that products
    # with them take ten times as long. XLA computes with zeros in their place.
    return graph.ThresholdedRelu(y, alpha=_LEAST_WEIGHT)


def _reshape(graph, eqn, x):
    return graph.reshaped(x, *eqn.params["shape"])


def _slice(graph, eqn, x):
    starts, limits, shape = dict(eqn.params["starts"]), dict(eqn.params["limits"]), eqn.invars[0].aval.shape
    cut = [axis for axis in starts if (starts[axis], limits[axis]) != (0, shape[axis])]
    if cut:
        x = graph.Slice(x, [starts[axis] for axis in cut], [limits[axis] for axis in cut], cut)
    return x if len(shape) == len(eqn.params["shape"]) else graph.reshaped(x, *eqn.params["shape"])


def _dot_general(graph, eqn, a, b):
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    a, b = (_Operand(value, variable.aval.shape) for value, variable in zip((a, b), eqn.invars, strict=True))
    free_a, free_b = a.others(contract_a, batch_a), b.others(contract_b, batch_b)
    if a.columns_first(free_a, contract_a) and b.columns_first(contract_b, free_b):
        # (A^T B^T) as (B A)^T: no matrix is transposed before the product, and the result is smaller.
        product = graph.MatMul(
            b.matrices(graph, batch_b, free_b, contract_b), a.matrices(graph, batch_a, contract_a, free_a)
        )
        axes = len(batch_a)
        product = graph.Transpose(product, perm=[*range(axes), axes + 1, axes])
    else:
        product = graph.MatMul(
            a.matrices(graph, batch_a, free_a, contract_a), b.matrices(graph, batch_b, contract_b, free_b)
        )
    return product if len(free_a) == len(free_b) == 1 else graph.reshaped(product, *eqn.params["shape"])


class _Operand:
    """An operand of a product, whose axes are those of the batch, of rows and of columns."""

    def __init__(self, value, shape: Sequence):
        self.value, self.shape = value, shape

    def others(self, *axes: Sequence[int]) -> list[int]:
        return [i for i in range(len(self.shape)) if not any(i in group for group in axes)]

    def columns_first(self, rows: Sequence[int], columns: Sequence[int]) -> bool:
        return max(columns, default=-1) < min(rows, default=-1)

    def matrices(self, graph, batch: Sequence[int], rows: Sequence[int], columns: Sequence[int]):
        """(*batch, rows, columns)"""
        order, x = [*batch, *rows, *columns], self.value
        if order != list(range(len(self.shape))):
            x = graph.Transpose(x, perm=order)
        if len(rows) == len(columns) == 1:
            return x
        sizes = [math.prod(self.shape[i] for i in axes) for axes in (rows, columns)]
        return graph.reshaped(x, *(self.shape[i] for i in batch), *sizes)


def _polarity_attention(graph, eqn, q, k, v, g, table, p, kernel, bias, mask=None):
    """`polarity_attention` with channels before tokens: heads are adjacent rows, and no axes have to be moved."""
    (_, channels, tokens), (_, _, keys) = (variable.aval.shape for variable in eqn.invars[:2])
    heads, width = eqn.invars[5].aval.shape
    half = width // 2
    if mask is not None:
        mask = graph.Cast(graph.Unsqueeze(mask, [1]), to=1)  # (B, 1, n), float32
        v = graph.Mul(v, mask)
    p = graph.reshaped(p, 1, heads, 1, width, 1)

    q_signed = _signed_powers(graph, graph.reshaped(q, -1, heads, 1, width, tokens), p)
    q_signed = graph.reshaped(q_signed, -1, heads, 2 * width, tokens)  # (B, h, 2d, N)
    k_signed = _signed_powers(graph, graph.reshaped(graph.Add(k, table), -1, heads, 1, width, keys), p)
    k_signed = graph.reshaped(k_signed, -1, heads, 2 * width, keys)  # (B, h, 2d, n)
    count = np.float32(keys)
    if mask is not None:
        k_signed = graph.Mul(k_signed, graph.Unsqueeze(mask, [1]))
        count = graph.Unsqueeze(graph.Max(graph.ReduceSum(mask, [2], keepdims=1), np.float32(1)), [1])  # (B, 1, 1, 1)
    mean = graph.Div(graph.ReduceSum(k_signed, [3], keepdims=1), count)  # (B, h, 2d, 1)
    mean = graph.reshaped(mean, -1, heads, 1, 2 * width)
    values = graph.reshaped(v, -1, heads, width, keys)
    vk = graph.Div(graph.MatMul(values, graph.Transpose(k_signed, perm=[0, 1, 3, 2])), count)  # (B, h, d, 2d)
    first, second = graph.Split(vk, [half, half], axis=2, outputs=2)
    same = graph.Concat(first, mean, axis=2)  # (B, h, d/2 + 1, 2d)
    opposite = graph.reshaped(graph.Concat(second, mean, axis=2), -1, heads, half + 1, 2, width)
    opposite = graph.reshaped(graph.Gather(opposite, [1, 0], axis=3), -1, heads, half + 1, 2 * width)  # halves swapped

    def stream(m):
        numerator, denominator = graph.Split(graph.MatMul(m, q_signed), [half, 1], axis=2, outputs=2)
        return graph.Div(numerator, graph.Add(denominator, np.float32(NORMALISER_EPS)))

    o = graph.reshaped(graph.Concat(stream(same), stream(opposite), axis=2), -1, channels, tokens)
    u = _convolution(graph, _upsampled(graph, v, channels, keys, tokens), kernel, bias, channels, eqn.params["grid"])
    return graph.Mul(graph.Add(o, u), g)


def _signed_powers(graph, z, p):
    """[relu(z)^p, relu(-z)^p], (B, h, 1, d, N) -> (B, h, 2, d, N); p is (1, h, 1, d, 1)."""
    size = graph.Max(graph.Abs(z), _TINY)  # not 0, whose logarithm is infinite
    signed = graph.Mul(graph.Exp(graph.Mul(graph.Log(size), p)), graph.Div(z, size))  # sign(z) |z|^p, and 0 at 0
    signs = np.array([1, -1], np.float32).reshape(1, 1, 2, 1, 1)
    return graph.Relu(graph.Mul(signed, signs))


def _upsampled(graph, v, channels: int, keys: int, tokens: int):
    """Linear interpolation along the tokens, (B, C, n) -> (B, C, N); see `depthwise.upsample_tokens`."""
    if keys == tokens:
        return v
    scales = np.array([1, 1, 1, tokens // keys], np.float32)
    v = graph.Resize(graph.reshaped(v, -1, channels, 1, keys), None, scales, mode="linear")
    return graph.reshaped(v, -1, channels, tokens)


def _convolution(graph, v, kernel, bias, channels: int, grid: tuple[int, ...]):
    """The depthwise convolution, (B, C, N) -> (B, C, N)."""
    pads = [size // 2 for size in kernel.shape[2:]]
    u = graph.Conv(graph.reshaped(v, -1, channels, *grid), kernel, bias, group=channels, pads=pads + pads)
    return graph.reshaped(u, -1, channels, math.prod(grid))


_NODES = {
    "weight": _weight,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "softmax": _softmax,
    "reshape": _reshape,
    "slice": _slice,
    "dot_general": _dot_general,
    "polarity_attention": _polarity_attention,
}
