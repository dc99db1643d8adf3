"""Building blocks of the models: patch embedding, MLP, pre-norm block, dropout, stochastic depth.

Attribute names are those of the official PyTorch code (https://github.com/ZacharyMeng/PolaFormer), so that a path in
the parameter tree reads like a key of its `state_dict`. Tokens are (batch, tokens, channels).

Modules take `key=None`: None means evaluation, a key means training with dropout and stochastic depth.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from polaformer_jax.config import ATTENTION_IMPLEMENTATIONS
from polaformer_jax.models.dtypes import accumulation_dtype
from polaformer_jax.models.initializers import normal_init, ones_init, placed, uniform_init, zeros_init
from polaformer_jax.models.kernels import mlp, placement

Grid = tuple[int, int]  # height and width of a map, in tokens


def check_implementation(implementation: str) -> None:
    """Raises a ValueError if it is none of those that attention and MLPs have."""
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r}: expected one of {', '.join(ATTENTION_IMPLEMENTATIONS)}")


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` that accumulates and returns at least float32, whatever the dtype of the operands."""
    full = accumulation_dtype(a.dtype)

    def accumulate(a, b):
        return jnp.einsum(subscripts, a, b, preferred_element_type=full)

    if a.dtype == full:
        return accumulate(a, b)
    # XLA's CPU back end has no batched products of bfloat16 with a float32 result; converted operands give the same.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: accumulate(a.astype(full), b.astype(full)), default=accumulate
    )


def keeping_arguments(function: Callable) -> Callable:
    """`function`, whose arguments are all that its backward pass keeps: the rest is computed again from them.

    Elementwise functions cost little to compute, and what automatic differentiation would keep instead are arrays as
    large as the arguments, in float32. Unlike a `custom_vjp` this leaves forward mode and derivatives of every order.
    As a program of its own it is traced and differentiated once, not once for each block.
    """
    return jax.jit(jax.checkpoint(function, prevent_cse=False))


@keeping_arguments
def apply_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., in) by (in, out) -> (..., out).

    On a CPU all axes but the last are flattened, so that the kernel's gradient is a sum over one axis. For sums over
    several axes XLA's CPU back end transposes first, which made an MLP and its gradients take 1.2 to 1.4 times as long.
    On other devices arrays are not flattened: TPU programs would move more bytes.
    """

    def unflattened(x, kernel):
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    def flattened(x, kernel):
        return unflattened(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])

    return jax.lax.platform_dependent(x, kernel, cpu=flattened, default=unflattened)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions, **options) -> jax.Array:
    """`dot_general` for `nnx.Linear`: contracts the last axis with the first; `linear` leaves `options` unset."""
    return apply_kernel(x, kernel)


def linear(
    features_in: int, features_out: int, *, use_bias: bool = True, uniform: bool = False, dtype, param_dtype, rngs
) -> nnx.Linear:
    """A linear layer with initial values normal(0.02), bias 0; or PyTorch's, `uniform` in ±1/sqrt(features_in)."""
    draw = functools.partial(placed(uniform_init, rngs), bound=features_in**-0.5) if uniform else None
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        dot_general=_dot_general,
        kernel_init=draw or placed(normal_init, rngs),
        bias_init=draw or placed(zeros_init, rngs),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def without_bias(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """The product of a layer that `linear` made, (..., in) -> (..., out), for a kernel that adds the bias."""
    return apply_kernel(x.astype(layer.dtype), layer.kernel[...].astype(layer.dtype))


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` under a name of its own in compiled programs."""

    @jax.named_scope("layer_norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x)


def layer_norm(features: int, *, epsilon: float, dtype, param_dtype, rngs) -> LayerNorm:
    """LayerNorm with statistics in at least float32; in two passes, since E[x²] - E[x]² cancels."""
    return LayerNorm(
        features,
        epsilon=epsilon,
        use_fast_variance=False,
        scale_init=placed(ones_init, rngs),
        bias_init=placed(zeros_init, rngs),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class ConvParams(nnx.Module):
    """Kernel (height, width, in, out) and bias (out,) of a convolution. The owner decides how they are applied.

    Initial values: the kernel's by `init`, the bias 0; without `init` those of PyTorch, both uniform within
    ±1/sqrt(fan_in), fan_in = height * width * in. Without `use_bias` the bias is None. A convolution along a sequence
    has one size, (width,).
    """

    def __init__(
        self,
        size: tuple[int, ...],
        features_in: int,
        features_out: int,
        *,
        init: Callable | None = None,
        use_bias: bool = True,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        uniform = functools.partial(uniform_init, bound=float(np.prod(size) * features_in) ** -0.5)
        kernel_init, bias_init = (init, zeros_init) if init else (uniform, uniform)
        shape = (*size, features_in, features_out)
        self.kernel = nnx.Param(placed(kernel_init, rngs)(rngs.params(), shape, param_dtype))
        if not use_bias:
            self.bias = None
            return
        key = rngs.params() if bias_init is uniform else None
        self.bias = nnx.Param(placed(bias_init, rngs)(key, shape[-1:], param_dtype))


class PatchConv(ConvParams):
    """Convolution whose stride is its kernel size, computed as one matrix product of patches.

    Rows and columns at the end of a map that fill no whole patch are left out.
    """

    def __init__(self, size: int, features_in: int, features_out: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        super().__init__((size, size), features_in, features_out, param_dtype=param_dtype, rngs=rngs)
        self.size, self.dtype = size, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, in) -> (B, H/size * W/size, out)"""
        batch, height, width, channels = x.shape
        r = self.size
        rows, columns = height // r, width // r
        if not rows or not columns:
            raise ValueError(f"a map of {height}x{width} tokens is smaller than a patch, {r}x{r}: give larger images")
        if (height % r, width % r) != (0, 0):
            x = x[:, : rows * r, : columns * r]
        x = x.reshape(batch, rows, r, columns, r, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, -1, r * r * channels).astype(self.dtype)  # (B, tokens, size * size * in)
        kernel = self.kernel[...].reshape(r * r * channels, -1).astype(self.dtype)
        return apply_kernel(x, kernel) + self.bias[...].astype(self.dtype).reshape(1, 1, -1)


class PatchEmbed(nnx.Module):
    """Turns non-overlapping patches into tokens, with LayerNorm (eps 1e-5 in both families) if `patch_norm`."""

    def __init__(self, size: int, features_in: int, features_out: int, *, patch_norm: bool = True, **types):
        self.proj = PatchConv(size, features_in, features_out, **types)
        self.norm = layer_norm(features_out, epsilon=1e-5, **types) if patch_norm else None

    @jax.named_scope("patch_embedding")
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, in) -> (B, H/size * W/size, out)"""
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


@keeping_arguments
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x (1 + erf(x / √2)) / 2, computed in at least float32."""
    x_full = x.astype(accumulation_dtype(x.dtype))
    return (x_full * (0.5 * (1 + jax.lax.erf(x_full * math.sqrt(0.5))))).astype(x.dtype)


class Mlp(nnx.Module):
    """fc1, exact GELU, dropout, fc2, dropout."""

    def __init__(self, dim: int, hidden: int, *, drop_rate: float, **types):
        self.fc1 = linear(dim, hidden, **types)
        self.fc2 = linear(hidden, dim, **types)
        self.drop_rate = drop_rate

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        key1, key2 = split_key(key, 2)
        x = dropout(gelu(self.fc1(x)), self.drop_rate, key1)
        return dropout(self.fc2(x), self.drop_rate, key2)


class ResidualBlock(nnx.Module):
    """A block of a model: (B, N, C) -> (B, N, C) by `block(x, key)`, which `rematerialised` can run."""


class Block(ResidualBlock):
    """Pre-norm residual block: attention, then MLP, with stochastic depth drawn separately for the two branches.

    `implementation` is that of the second half, LayerNorm and MLP: "xla", operations that XLA compiles; "pallas", one
    kernel (`models.kernels.mlp`), which TPUs have, and CUDA GPUs for up to 256 channels, and which is interpreted,
    slowly, on CPUs, otherwise XLA; "auto", the kernel on TPUs where it saves memory traffic, otherwise XLA. Dropout
    within the MLP is always by operations, and so are tokens of another dtype than the block's. The kernel has
    gradients only; forward-mode differentiation and gradients of gradients take "xla".
    """

    def __init__(
        self,
        attn: nnx.Module,
        dim: int,
        *,
        mlp_ratio: float,
        epsilon: float,
        drop_rate: float,
        drop_path: float,
        implementation: str = "auto",
        **types,
    ):
        check_implementation(implementation)
        self.norm1 = layer_norm(dim, epsilon=epsilon, **types)
        self.attn = attn
        self.norm2 = layer_norm(dim, epsilon=epsilon, **types)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate=drop_rate, **types)
        self.drop_path, self.implementation = drop_path, implementation

    @jax.named_scope("block")
    def __call__(self, x: jax.Array, key: jax.Array | None = None, **context) -> jax.Array:
        """(B, N, C) -> (B, N, C); `context` is passed on to the attention: the `grid` of a map, or a mask."""
        key_attn, key_path1, key_mlp, key_path2 = split_key(key, 4)
        x = x + stochastic_depth(self.mix(self.norm1(x), key_attn, **context), self.drop_path, key_path1)
        return self.add_mlp(x, key_mlp, key_path2)

    def add_mlp(self, x: jax.Array, key: jax.Array | None, key_path: jax.Array | None) -> jax.Array:
        """x + mlp(norm2(x)): (B, N, C) -> (B, N, C). `key` draws the dropout, `key_path` the stochastic depth."""

        def by_operations(x):
            return x + stochastic_depth(self.mlp(self.norm2(x), key), self.drop_path, key_path)

        def by_one_kernel(x, *, on_tpu: bool = False):
            fc1, fc2, norm = self.mlp.fc1, self.mlp.fc2, self.norm2
            arrays = {"gamma": norm.scale, "beta": norm.bias}
            arrays |= {"w1": fc1.kernel, "b1": fc1.bias, "w2": fc2.kernel, "b2": fc2.bias}
            arrays = {name: param[...] for name, param in arrays.items()}
            ones = jnp.ones((x.shape[0], 1, 1), accumulation_dtype(x.dtype))
            keep = stochastic_depth(ones, self.drop_path, key_path)
            return mlp.fused_mlp({"x": x, "keep": keep, **arrays}, eps=norm.epsilon, on_tpu=on_tpu)

        if self.implementation == "xla" or x.dtype != self.norm2.dtype or (key is not None and self.mlp.drop_rate > 0):
            return by_operations(x)
        hidden = self.mlp.fc1.out_features
        if self.implementation == "pallas" and mlp.supports(x, hidden):
            return by_one_kernel(x, on_tpu=placement.for_tpu())
        if self.implementation == "auto" and mlp.usable(x, hidden):
            on_tpu = functools.partial(by_one_kernel, on_tpu=True)
            return jax.lax.platform_dependent(x, tpu=on_tpu, default=by_operations)
        return by_operations(x)

    def attention_input(self, x: jax.Array, grid: Grid) -> jax.Array:
        """What the attention takes of the tokens (B, N, C) that enter the block; of Pola-Swin its windows."""
        return self.norm1(x)

    def mix(self, x: jax.Array, key: jax.Array | None, **context) -> jax.Array:
        """Applies the attention, (B, N, C) -> (B, N, C); Pola-Swin does so within windows."""
        return self.attn(x, key, **context)


def rematerialised(
    block: ResidualBlock, x: jax.Array, key: jax.Array | None, *, static: Mapping[str, object] | None = None, **context
) -> jax.Array:
    """`block(x, key, **static, **context)`, whose activations are recomputed in the backward pass instead of stored.

    What is in `static` is no array and not traced.
    Where a mesh is set (`jax.sharding.use_abstract_mesh`), the block's parameters may be sharded: they are gathered
    here, in the forward pass and again in the backward pass, so that a device holds those of few blocks at a time.
    """
    graphdef, params = nnx.split(block)

    def apply(params, x, key, context):
        if not jax.sharding.get_abstract_mesh().empty:
            params = jax.lax.with_sharding_constraint(params, PartitionSpec())
        return nnx.merge(graphdef, params)(x, key, **(static or {}), **context)

    return jax.checkpoint(apply)(params, x, key, context)


def gathering_blocks(model: nnx.Module) -> list[tuple]:
    """The paths of the blocks that `rematerialised` runs, which gather their parameters: none unless `model.remat`."""
    if not model.remat:
        return []
    return [path for path, module in nnx.iter_modules(model) if isinstance(module, ResidualBlock)]


def split_key(key: jax.Array | None, count: int) -> list:
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


@jax.named_scope("stochastic_depth")
def stochastic_depth(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops the whole branch x for each sample with probability `rate`; kept ones are scaled by 1 / (1 - rate)."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], *(1 for _ in x.shape[1:])))
    return jnp.where(kept, x / (1 - rate), 0)


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly from 0 to `rate` over all blocks of all stages, as one list per stage."""
    rates = iter(np.linspace(0, rate, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]
