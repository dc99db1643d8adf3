"""How the operations of `onnx_operations` become ONNX nodes: plugins that are registered with jax2onnx."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from polaformer_jax.export.onnx_operations import PREFIX
from polaformer_jax.models.attention import NORMALISER_EPS


def register() -> None:
    """Adds the plugins to jax2onnx's registry."""
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    for name, nodes in _NODES.items():

        class Plugin(PrimitiveLeafPlugin):
            def lower(self, ctx, eqn, _nodes=nodes):
                graph = _Graph(ctx)
                operands = [ctx.get_value_for_var(v) for v in eqn.invars]
                result = _nodes(graph, eqn, *operands)
                expected = ctx.get_value_for_var(eqn.outvars[0])
                result.type, result.shape = expected.type, expected.shape
                ctx.bind_value_for_var(eqn.outvars[0], result)

        register_primitive(jaxpr_primitive=PREFIX + name, since="0", context="polaformer_jax", component=name)(Plugin)


class _Graph:
    """Adds nodes: `graph.Mul(a, b)`. NumPy arrays and numbers among the inputs become initializers."""

    def __init__(self, ctx):
        self._ctx = ctx

    def __getattr__(self, kind: str) -> Callable:
        def add(*inputs, outputs: int = 1, **attributes):
            names = [self._ctx.fresh_name(kind.lower()) for _ in range(outputs)]
            values = [self.constant(i) if isinstance(i, (np.ndarray, np.generic, list, float)) else i for i in inputs]
            return getattr(self._ctx.builder, kind)(*values, _outputs=names, **attributes)

        return add

    def constant(self, value):
        array = np.asarray(value, np.int64 if isinstance(value, list) else None)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = self._ctx.fresh_name("size" if array.dtype == np.int64 else "number")
        return self.weight(name, array)

    def weight(self, name: str, array: np.ndarray):
        return self._ctx.builder.add_initializer_from_array(name=name, array=array)

    def reshape(self, x, *sizes):
        """Reshape, where at most one size is not an integer, that of the batch."""
        return self.Reshape(x, [size if isinstance(size, int) else -1 for size in map(_size, sizes)])


def _size(size):
    return int(size) if isinstance(size, (int, np.integer)) else size


def _weight(graph, eqn):
    weight = eqn.params["weight"]
    return graph.weight(weight.name, weight.array)


def _layer_norm(graph, eqn, x, scale, bias):
    return graph.LayerNormalization(x, scale, bias, axis=-1, epsilon=eqn.params["epsilon"])


def _gelu(graph, eqn, x):
    return graph.Gelu(x)


def _softmax(graph, eqn, x):
    y = graph.Softmax(x, axis=-1)
    return graph.ThresholdedRelu(y, alpha=1e-30) if eqn.invars[0].aval.ndim > 2 else y


def _slice(graph, eqn, x):
    starts, limits, strides = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
    axes = [i for i, size in enumerate(eqn.invars[0].aval.shape) if isinstance(size, int)]
    cut = [i for i in axes if (starts[i], limits[i]) != (0, eqn.invars[0].aval.shape[i]) or (strides or {i: 1})[i] != 1]
    steps = [1 if strides is None else int(strides[i]) for i in cut]
    return graph.Slice(x, [int(starts[i]) for i in cut], [int(limits[i]) for i in cut], cut, steps) if cut else x


def _linear(graph, eqn, x, kernel, *bias):
    *leading, features = eqn.invars[0].aval.shape
    start, size = eqn.params["start"], eqn.params["size"]
    if (start, size) != (0, eqn.invars[1].aval.shape[1]):  # a part of the constants, which runtimes take once
        kernel, *bias = (graph.Slice(w, [start], [start + size], [-1]) for w in (kernel, *bias))
    if eqn.params["channels_first"]:
        y = graph.MatMul(graph.Transpose(kernel, perm=[1, 0]), graph.Transpose(x, perm=[0, 2, 1]))
        return graph.Add(y, graph.Unsqueeze(bias[0], [1])) if bias else y
    if x.producer() is not None and x.producer().op_type == "Transpose":  # which runtimes make a part of MatMul
        y = graph.MatMul(x, kernel)
        return graph.Add(y, bias[0]) if bias else y
    if len(leading) > 1:
        x = graph.Reshape(x, [-1, features])
    y = graph.Gemm(x, kernel, *bias)
    return y if len(leading) == 1 else graph.reshape(y, *leading, size)


def _reshape(graph, eqn, x):
    return graph.reshape(x, *eqn.params["shape"])


def _dot_general(graph, eqn, a, b):
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    shape_a, shape_b = (v.aval.shape for v in eqn.invars)
    if not batch_a and len(shape_b) == 2 and tuple(contract_a) == (len(shape_a) - 1,) and tuple(contract_b) == (0,):
        return graph.MatMul(a, b)
    free_a = [i for i in range(len(shape_a)) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(len(shape_b)) if i not in (*contract_b, *batch_b)]
    # MatMul is fastest where neither matrix is transposed: a has its rows before its columns, b too.
    if _transposed(free_a, contract_a) + _transposed(contract_b, free_b) == 2:
        a = _matrices(graph, a, shape_a, batch_a, contract_a, free_a)
        b = _matrices(graph, b, shape_b, batch_b, free_b, contract_b)
        product = graph.MatMul(b, a)
        axes = len(batch_a)
        product = graph.Transpose(product, perm=[*range(axes), axes + 1, axes])
    else:
        a = _matrices(graph, a, shape_a, batch_a, free_a, contract_a)
        b = _matrices(graph, b, shape_b, batch_b, contract_b, free_b)
        product = graph.MatMul(a, b)
    if len(free_a) == len(free_b) == 1:
        return product
    return graph.reshape(product, *eqn.params["shape"])


def _transposed(rows: Sequence[int], columns: Sequence[int]) -> bool:
    """Whether a matrix of these axes is stored with its columns before its rows."""
    return max(columns, default=-1) < min(rows, default=math.inf)


def _matrices(graph, x, shape: Sequence, batch: Sequence[int], rows: Sequence[int], columns: Sequence[int]):
    """(..., rows, columns), the batch axes first."""
    order = [*batch, *rows, *columns]
    if order != list(range(len(shape))):
        x = graph.Transpose(x, perm=order)
    if len(rows) == len(columns) == 1:
        return x
    sizes = [math.prod(shape[i] for i in axes) for axes in (rows, columns)]
    return graph.reshape(x, *(shape[i] for i in batch), *sizes)


def _polarity_attention(graph, eqn, q, k, v, g, table, s, p, kernel, bias, mask=None):
    """Channels come before tokens throughout: heads are then adjacent rows, and no axes of heads are moved."""
    grid = eqn.params["grid"]
    (_, channels, tokens), (_, _, keys) = (x.aval.shape for x in eqn.invars[:2])
    heads, width = eqn.invars[5].aval.shape
    half = width // 2

    if mask is not None:
        mask = graph.Cast(graph.Unsqueeze(mask, [1]), to=1)  # (B, 1, N)
        v = graph.Mul(v, mask)
    s, p = (graph.reshape(x, 1, heads, 1, width, 1) for x in (s, p))

    def features(x, length):
        """(B, C, length) -> [relu(z)^p, relu(-z)^p] of z = x / s, (B, h, 2d, length)."""
        z = graph.Div(graph.reshape(x, -1, heads, 1, width, length), s)
        size = graph.Max(graph.Abs(z), np.float32(np.finfo(np.float32).tiny))
        signed = graph.Mul(graph.Exp(graph.Mul(graph.Log(size), p)), graph.Div(z, size))
        signs = np.array([1, -1], np.float32).reshape(1, 1, 2, 1, 1)
        return graph.reshape(graph.Relu(graph.Mul(signed, signs)), -1, heads, 2 * width, length)

    q_signed, k_signed = features(q, tokens), features(graph.Add(k, table), keys)
    if mask is None:
        count = np.float32(keys)
    else:
        k_signed = graph.Mul(k_signed, graph.Unsqueeze(mask, [1]))
        count = graph.Unsqueeze(graph.Max(graph.ReduceSum(mask, [2], keepdims=1), np.float32(1)), [1])  # (B, 1, 1, 1)
    mean = graph.reshape(graph.Div(graph.ReduceSum(k_signed, [3], keepdims=1), count), -1, heads, 1, 2 * width)
    values = graph.reshape(v, -1, heads, width, keys)
    vk = graph.Div(graph.MatMul(values, graph.Transpose(k_signed, perm=[0, 1, 3, 2])), count)  # (B, h, d, 2d)
    first, second = graph.Split(vk, [half, half], axis=2, outputs=2)
    same = graph.Concat(first, mean, axis=2)
    opposite = graph.reshape(graph.Concat(second, mean, axis=2), -1, heads, half + 1, 2, width)
    opposite = graph.reshape(graph.Gather(opposite, [1, 0], axis=3), -1, heads, half + 1, 2 * width)

    def stream(m):
        numerator, denominator = graph.Split(graph.MatMul(m, q_signed), [half, 1], axis=2, outputs=2)
        return graph.Div(numerator, graph.Add(denominator, np.float32(NORMALISER_EPS)))

    o = graph.reshape(graph.Concat(stream(same), stream(opposite), axis=2), -1, channels, tokens)
    u = _convolution(graph, _upsample(graph, v, channels, keys, tokens), kernel, bias, channels, grid)
    return graph.Mul(graph.Add(o, u), g)


def _upsample(graph, v, channels: int, keys: int, tokens: int):
    """Linear interpolation along the tokens, (B, C, n) -> (B, C, N); see `depthwise.upsample_tokens`."""
    if keys == tokens:
        return v
    v = graph.reshape(v, -1, channels, 1, keys)
    scales = np.array([1, 1, 1, tokens // keys], np.float32)
    return graph.reshape(graph.Resize(v, None, scales, mode="linear"), -1, channels, tokens)


def _convolution(graph, v, kernel, bias, channels: int, grid: tuple[int, ...]):
    """The depthwise convolution, (B, C, N) -> (B, C, N)."""
    size = kernel.shape[2]
    image = graph.reshape(v, -1, channels, *grid)
    u = graph.Conv(image, kernel, bias, group=channels, pads=[size // 2] * (2 * len(grid)), kernel_shape=[size] * len(grid))
    return graph.reshape(u, -1, channels, math.prod(grid))


_NODES = {
    "weight": _weight,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "softmax": _softmax,
    "reshape": _reshape,
    "slice": _slice,
    "linear": _linear,
    "dot_general": _dot_general,
    "polarity_attention": _polarity_attention,
}
