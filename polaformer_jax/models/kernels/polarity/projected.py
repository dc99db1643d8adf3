"""Polarity attention from the tokens that its linear layers take, for TPUs: the layers' gradients from the kernel's.

Queries, keys, values and gates are products of their own, each written once to where the kernel takes it. Their
gradients stay together in the array that the kernel writes, and the gradients of the layers are products with it as it
is. Were they separate arrays in between, XLA would split it and put it together again in another layout.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.dtypes import accumulation_dtype
from polaformer_jax.models.kernels import polarity
from polaformer_jax.models.kernels.polarity import Setting
from polaformer_jax.models.layers import ConvParams, apply_kernel


def attention(
    tokens: dict[str, jax.Array],
    layers: dict[str, nnx.Linear],
    convolution: ConvParams,
    *,
    s: jax.Array,
    p: jax.Array,
    table: jax.Array,
    grid: tuple[int, ...],
    eps: float,
    on_tpu: bool = False,
) -> jax.Array:
    """y of `models.attention.polarity_attention`, all of whose keys are valid.

    Args:
        tokens: what each layer takes, (B, N, in): N tokens for queries and gates, n for keys and values.
        layers: those that compute q, k, v and g, by the letters of their results: "qkvg", or "qg" and "kv".
        convolution: that of the values.
        s, p: (h, d), at least float32.
        table: (1, n, C), added to the keys.
        grid: how the N tokens are arranged.
        eps: added to the denominators.
        on_tpu: whether only a TPU will run it, which makes it faster to trace.

    Returns:
        (B, N, C) in the dtype of the layers. Where a mesh is set, the batch is sharded over its devices if it divides
        evenly.
    """
    (heads, width), full = s.shape, s.dtype
    batch, keys, _ = next(x for letters, x in tokens.items() if "k" in letters).shape
    arrays = {
        "table": table,
        "s": s.reshape(1, -1),
        "p": p.reshape(1, -1),
        "count": jnp.full((batch, 1, 1), keys, full),
        "kernel": convolution.kernel[...],
        "bias": convolution.bias[...],
    }
    inputs, kernels, biases = {}, {}, {}
    for letters, layer in layers.items():
        shape = (len(letters), heads * width)
        inputs[letters] = tokens[letters].astype(layer.dtype)
        kernels[letters] = layer.kernel[...].astype(layer.dtype).reshape(-1, *shape)
        bias = jnp.zeros(shape, layer.dtype) if layer.bias is None else layer.bias[...].astype(layer.dtype)
        biases[letters] = bias.reshape(shape)
    return projected_attention(inputs, kernels, biases, arrays, grid=grid, width=width, eps=eps, on_tpu=on_tpu)


@functools.partial(jax.jit, static_argnames=("grid", "width", "eps", "on_tpu"))
def projected_attention(inputs, kernels, biases, arrays, **static) -> jax.Array:
    """Traced once for all blocks of one shape. kernels: (in, parts, C), biases: (parts, C)."""
    return _attention(Setting.of(arrays, packs=tuple(inputs), **static), inputs, kernels, biases, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setting: Setting, inputs, kernels, biases, arrays) -> jax.Array:
    return _fwd(setting, inputs, kernels, biases, arrays)[0]


def _fwd(setting, inputs, kernels, biases, arrays):
    parts = {}
    with jax.named_scope("attention"):
        for letters, x in inputs.items():
            for i, name in enumerate(letters):
                parts[name] = apply_kernel(x, kernels[letters][:, i]) + biases[letters][i].reshape(1, 1, -1)
    with jax.named_scope("polarity_attention"):
        y, residuals = polarity.forward(setting, arrays | parts)
    return y, (inputs, kernels, residuals)


def _bwd(setting, residuals, y_bar):
    inputs, kernels, of_kernel = residuals
    with jax.named_scope("polarity_attention"):
        bars, others = polarity.backward(setting, of_kernel, y_bar)
    others["count"] = jnp.zeros_like(of_kernel[0]["count"])
    sums = others.pop("sums", None)
    x_bars, kernel_bars, bias_bars = {}, {}, {}
    with jax.named_scope("attention"):
        for letters, x in inputs.items():
            *found, bias_bar = _layer_bars(x, kernels[letters], *_together(bars, letters))
            x_bars[letters], kernel_bars[letters] = found
            if sums is not None:
                bias_bar = jnp.stack([sums[name] for name in letters])
            bias_bars[letters] = bias_bar.astype(x.dtype)
    return x_bars, kernel_bars, bias_bars, others


_attention.defvjp(_fwd, _bwd)


def _together(bars: dict[str, jax.Array], letters: str) -> tuple[jax.Array, bool]:
    """The gradients of a layer's results, and whether tokens are on the last axis.

    Then the array is (B, parts, C, N), as the kernel leaves it, and otherwise (B, N, parts, C).
    """
    if letters in bars and len(letters) > 1:
        return bars[letters], True
    return jnp.stack([polarity.part(bars, name) for name in letters], axis=2), False


def _layer_bars(
    x: jax.Array, kernel: jax.Array, bars: jax.Array, tokens_last: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of a layer's input, kernel (in, parts, C) and bias from those of its results, see `_together`."""
    _, parts, channels = kernel.shape
    full = accumulation_dtype(x.dtype)
    if tokens_last:
        bars = bars.reshape(bars.shape[0], parts * channels, -1)  # (B, parts * C, N)
        of_x, of_kernel, tokens = "bkn,ik->bni", "bni,bkn->ik", (0, 2)
    else:
        bars = bars.reshape(*bars.shape[:2], parts * channels)  # (B, N, parts * C)
        of_x, of_kernel, tokens = "bnk,ik->bni", "bni,bnk->ik", (0, 1)
    x_bar = jnp.einsum(of_x, bars, kernel.reshape(-1, parts * channels))
    kernel_bar = jnp.einsum(of_kernel, x, bars).reshape(kernel.shape)
    return x_bar, kernel_bar, jnp.sum(bars, axis=tokens, dtype=full).reshape(parts, channels)
