"""Batch normalisation whose running statistics are part of the model's state, and convolutions that it follows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.initializers import normal_init, ones_init, placed, zeros_init
from polaformer_jax.models.layers import ConvParams, accumulation_dtype, apply_kernel

EPSILON = 1e-5
MOMENTUM = 0.1  # the share of a batch in the running statistics


class BatchNorm(nnx.Module):
    """Scale, bias and running statistics of a batch normalisation; `conv_norm` applies it.

    Its statistics are `nnx.BatchStat`: part of a model's state like parameters, but not trained.
    """

    def __init__(self, features: int, *, param_dtype, rngs):
        self.scale = nnx.Param(placed(ones_init, rngs)(None, (features,), param_dtype))
        self.bias = nnx.Param(placed(zeros_init, rngs)(None, (features,), param_dtype))
        self.mean = nnx.BatchStat(placed(zeros_init, rngs)(None, (features,), param_dtype))
        self.var = nnx.BatchStat(placed(ones_init, rngs)(None, (features,), param_dtype))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalises a training batch by its own statistics, which the running ones take up.

        The mean and the biased variance are those of the valid examples of the whole batch, over all devices; the
        running variance takes the unbiased one, as in PyTorch.

        Args:
            x: (B, H, W, C).
            mask: (B,) bool, True for valid examples. Others add nothing to the statistics.

        Returns:
            (B, H, W, C) in the dtype of x; computed in at least float32.
        """
        full = accumulation_dtype(x.dtype)
        valid = mask.reshape(-1, 1, 1, 1)
        count = (jnp.maximum(jnp.sum(mask), 1) * (x.shape[1] * x.shape[2])).astype(full)
        x_full = x.astype(full)
        mean = jnp.sum(jnp.where(valid, x_full, 0), axis=(0, 1, 2)) / count
        centred = x_full - mean.reshape(1, 1, 1, -1)
        variance = jnp.sum(jnp.where(valid, jnp.square(centred), 0), axis=(0, 1, 2)) / count
        self._take_up(*map(jax.lax.stop_gradient, (mean, variance * (count / jnp.maximum(count - 1, 1)))))
        scale = self.scale[...].astype(full) * jax.lax.rsqrt(variance + EPSILON)
        return (centred * scale.reshape(1, 1, 1, -1) + self.bias[...].astype(full).reshape(1, 1, 1, -1)).astype(x.dtype)

    def _take_up(self, mean: jax.Array, variance: jax.Array) -> None:
        for running, new in ((self.mean, mean), (self.var, variance)):
            old = running[...]
            running[...] = ((1 - MOMENTUM) * old + MOMENTUM * new.astype(old.dtype)).astype(old.dtype)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Factor and offset (C,) by which it acts in evaluation."""
        full = accumulation_dtype(self.scale[...].dtype)
        factor = self.scale[...].astype(full) * jax.lax.rsqrt(self.var[...].astype(full) + EPSILON)
        return factor, self.bias[...].astype(full) - self.mean[...].astype(full) * factor


def statistics_of(model: nnx.Module) -> dict | None:
    """Which parts of a model's state are running statistics: a nested dict of bools like it; None if there are none."""
    state = nnx.state(model)
    if not jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat)):
        return None
    is_variable = {"is_leaf": lambda leaf: isinstance(leaf, nnx.Variable)}
    found = jax.tree.map(lambda variable: isinstance(variable, nnx.BatchStat), state, **is_variable)
    return nnx.to_pure_dict(found)


def parameter_count(model: nnx.Module) -> int:
    """The number of trained values of a model, which running statistics are not."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def conv_norm(conv: "Conv", norm: BatchNorm, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """A convolution and the normalisation after it; in evaluation (no mask) one convolution with folded weights."""
    if mask is not None:
        return norm(conv(x), mask)
    factor, offset = norm.affine()
    if conv.bias is not None:
        offset = conv.bias[...].astype(factor.dtype) * factor + offset
    return conv.apply(x, conv.kernel[...].astype(factor.dtype) * factor.reshape(1, 1, 1, -1), offset)


class Conv(ConvParams):
    """A convolution of maps (B, H, W, in), odd kernel, padded by its half."""

    def __init__(
        self,
        size: int,
        features_in: int,
        features_out: int,
        *,
        stride: int = 1,
        init: Callable = normal_init,
        use_bias: bool = True,
        dtype,
        param_dtype,
        rngs,
    ):
        values = {"init": init, "use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__((size, size), features_in, features_out, **values)
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, in) -> (B, H / stride, W / stride, out)"""
        return self.apply(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def apply(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = self._convolved(x.astype(self.dtype), kernel.astype(self.dtype))
        return y if bias is None else y + bias.astype(self.dtype).reshape(1, 1, 1, -1)

    def _convolved(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if kernel.shape[0] == self.stride == 1:  # a matrix product, for which a CPU need not transpose
            return apply_kernel(x, kernel[0, 0])
        pad = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride,) * 2,
            padding=[(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
