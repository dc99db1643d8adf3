"""Polarity-aware linear attention, the core of the paper.

`polarity_attention` is the pure function, `PolarityAttention` the module that owns its parameters and the linear layers
around it. Source: Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025,
arXiv 2501.15061; parameter names as in the authors' PyTorch code, https://github.com/ZacharyMeng/PolaFormer.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.config import ATTENTION_IMPLEMENTATIONS
from polaformer_jax.models.depthwise import depthwise_conv, upsample_tokens
from polaformer_jax.models.initializers import zeros
from polaformer_jax.models.interpolation import table_on
from polaformer_jax.models.kernels import placement, polarity
from polaformer_jax.models.kernels.polarity import packed, projected
from polaformer_jax.models.layers import (
    ConvParams,
    PatchConv,
    accumulation_dtype,
    check_implementation,
    dropout,
    layer_norm,
    linear,
    product,
)
from polaformer_jax.models.model_config import Checks
from polaformer_jax.models.signed_features import rescaling, signed_feature_map, split_heads

NORMALISER_EPS = 1e-6


@functools.partial(
    jax.jit, static_argnames=("grid", "alpha", "implementation")
)  # traced once for all blocks of one shape
def polarity_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    *,
    power: jax.Array,
    scale: jax.Array,
    positional_encoding: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    grid: tuple[int, ...],
    alpha: float = 4.0,
    mask: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of N query tokens to n key tokens in time O(N + n), with signs kept apart.

    With h heads of width d = C/h (channel c belongs to head c // d), per head and with s = softplus(scale)::

        p   = 1 + alpha * sigmoid(power)                            the learnable power, one per head and channel
        q± = relu(±q / s)^p        k± = relu(±(k + E) / s)^p        E = positional_encoding
        same-signed stream:      o1 = [q+, q-] ([k+, k-]^T v1 / n) / ([q+, q-] mean_n([k+, k-])^T + 1e-6)
        opposite-signed stream:  o2 = [q-, q+] ([k+, k-]^T v2 / n) / ([q-, q+] mean_n([k+, k-])^T + 1e-6)
        y   = ([o1, o2] + conv(v)) * g                              v1, v2: first and last d/2 channels of v

    ====  =======================================  =====================  ==============
    here  paper                                    official name          shape
    ====  =======================================  =====================  ==============
    p     the power p of the rescaling g(x; w, b)  `power`                (1, h, 1, d)
    s     learnable scale of queries and keys      `scale`                (1, 1, C)
    E     position table of the keys               `positional_encoding`  (1, n, C)
    g     learnable polarity coefficients G        part of `qg` / `qkvg`  (B, N, C)
    conv  depth-wise convolution on the values     `dwc`                  kernel_size, d
    ====  =======================================  =====================  ==============

    Both streams share [k+, k-] and its mean, so one product K^T [v1, v2] and one product Q M replace four: M is
    (2d, d + 2), the numerators of both streams and their two denominators, and swapping the two d-row halves of the
    second stream's columns has the effect of exchanging q+ and q-. `|x|^p` is computed once and masked by sign.

    Args:
        q, g: (B, N, C). Their dtype, and that of k and v, is that of the matrix products; power, normaliser and
            accumulation are at least float32.
        k, v: (B, n, C), n <= N.
        kernel, bias: of the depthwise convolution, (size, size, 1, d), size odd, and (d,); one kernel serves all heads.
            A kernel with one spatial axis belongs to a grid with one axis.
        grid: how the N tokens are arranged: (height, width) of an image or a window, (N,) of a sequence.
        alpha: largest power minus one, >= 0. Gradients are finite at exact zeros for all such values. NaN in an
            argument goes through to what depends on it, forward and backward.
        mask: (B, N) bool, True at valid tokens; None: all are valid. Only where N = n. Masked tokens add nothing to
            [k+, k-]^T v or the mean, n does not count them, and the convolution sees zeros in their place, so that
            padding an example does not change the results at its valid tokens. (Those at masked tokens are to be
            ignored.)
        implementation: "xla", operations that XLA compiles; "pallas", one kernel (`models.kernels`), which TPUs have,
            and CUDA GPUs for heads of 16, 32 or 64 channels, and which is interpreted, slowly, on CPUs, otherwise
            XLA; "auto", the kernel on TPUs, otherwise XLA. The kernel has gradients only; forward-mode differentiation
            (`jax.jvp`, `jax.linearize`, `jax.hessian`) and gradients of gradients take "xla".

    Returns:
        (B, N, C) in the dtype of `q`.
    """
    if mask is not None and mask.shape != k.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape}, expected one value for each key, {k.shape[:2]}")
    check_implementation(implementation)
    if not all(size % 2 for size in kernel.shape[:-2]):
        raise ValueError(f"kernel has shape {kernel.shape}, expected odd sizes along the axes of the grid")
    if mask is not None:
        v = jnp.where(mask[:, :, None], v, 0)
    arrays = {"q": q, "k": k, "v": v, "g": g, "kernel": kernel, "bias": bias}
    arrays |= {"table": positional_encoding, "mask": mask}
    arrays["s"], arrays["p"] = rescaling(power, scale, alpha, accumulation_dtype(q.dtype))
    by_operations = functools.partial(_by_operations, grid)
    if not polarity.chosen(implementation, q, power.shape[3]):
        return by_operations(arrays)
    if implementation == "pallas":
        return _by_one_kernel(grid, arrays, on_tpu=placement.for_tpu())
    by_tpu = functools.partial(_by_one_kernel, grid, on_tpu=True)
    return jax.lax.platform_dependent(arrays, tpu=by_tpu, default=by_operations)


def _by_one_kernel(grid: tuple[int, ...], arrays: dict[str, jax.Array], *, on_tpu: bool = False) -> jax.Array:
    """The result of `polarity_attention` by one kernel, from prepared arrays; s and p are (h, d).

    `on_tpu`: only a TPU will run it.
    """
    arrays, mask = dict(arrays), arrays["mask"]
    width, full = arrays["s"].shape[1], arrays["s"].dtype
    batch, keys, _ = arrays["k"].shape
    arrays["s"], arrays["p"] = arrays["s"].reshape(1, -1), arrays["p"].reshape(1, -1)
    if mask is None:
        del arrays["mask"]
        arrays["count"] = jnp.full((batch, 1, 1), keys, full)
    else:
        arrays["mask"] = mask[:, None].astype(arrays["q"].dtype)
        arrays["count"] = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(full).reshape(-1, 1, 1)
    return polarity.fused_attention(arrays, grid=grid, width=width, eps=NORMALISER_EPS, on_tpu=on_tpu)


def _by_operations(grid: tuple[int, ...], arrays: dict[str, jax.Array]) -> jax.Array:
    """The same, computed by operations on whole arrays."""
    q, k, v, g, mask, s, p = (arrays[name] for name in ("q", "k", "v", "g", "mask", "s", "p"))
    _, tokens, channels = q.shape
    keys, (heads, width) = k.shape[1], s.shape
    half, narrow, full = width // 2, q.dtype, s.dtype

    u = depthwise_conv(upsample_tokens(v, tokens), arrays["kernel"], arrays["bias"], grid=grid)
    q_signed = signed_feature_map(q, None, s, p)  # (B, N, h, 2d)
    k_signed = signed_feature_map(k, arrays["table"], s, p)  # (B, n, h, 2d)
    if mask is None:
        k_mean = jnp.mean(k_signed, axis=1, dtype=full)[..., None]  # (B, h, 2d, 1)
    else:
        k_signed = jnp.where(mask[:, :, None, None], k_signed, 0)
        keys = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(full).reshape(-1, 1, 1, 1)  # (B, 1, 1, 1)
        k_mean = jnp.sum(k_signed, axis=1, dtype=full)[..., None] / keys
    kv = product("bnhk,bnhe->bhke", k_signed, split_heads(v, heads)) / keys  # (B, h, 2d, d)
    same = jnp.concatenate([kv[..., :half], k_mean], axis=-1)
    opposite = jnp.roll(jnp.concatenate([kv[..., half:], k_mean], axis=-1), width, axis=-2)  # the halves swapped
    m = jnp.concatenate([same, opposite], axis=-1).astype(narrow)  # (B, h, 2d, d + 2)
    qm = product("bnhk,bhke->bnhe", q_signed, m)  # (B, N, h, d + 2)
    o_same = qm[..., :half] / (qm[..., half : half + 1] + NORMALISER_EPS)
    o_opposite = qm[..., half + 1 : width + 1] / (qm[..., width + 1 :] + NORMALISER_EPS)
    o = jnp.concatenate([o_same, o_opposite], axis=-1).reshape(-1, tokens, channels)
    return ((o + u) * g).astype(narrow)


class PolarityAttention(nnx.Module):
    """The linear layers, tables and kernel around `polarity_attention`, and the output projection.

    Args:
        dim: channels C.
        num_heads: h; C/h must be even, since each stream takes half of a head's value channels.
        grid: (height, width) of the query tokens; (length,) of sequences, which may be shorter.
        projections: "qkvg", one layer whose output is q, k, v, g in this order (Pola-Swin), or "qg_kv", two layers with
            outputs q, g and k, v (Pola-PVT).
        sr_ratio: spatial reduction of keys and values by `sr` and `norm`, only with "qg_kv"; 1 is none.
            It must divide the grid.
        kernel_size: of the depthwise convolution, odd.
        attention_impl: the `implementation` of `polarity_attention`; without masks the kernel is one that computes the
            gradients of the linear layers, or part of them, as well (`kernels.polarity.projected` and, on GPUs if there
            are as many keys as queries, `packed`).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: tuple[int, ...],
        projections: str,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        alpha: float = 4.0,
        kernel_size: int = 5,
        attention_impl: str = "auto",
        drop_rate: float = 0.0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks = Checks("PolarityAttention cannot be built")
        alpha, kernel_size = checks.alpha(alpha), checks.kernel_size(kernel_size)
        checks.choice("attention_impl", attention_impl, ATTENTION_IMPLEMENTATIONS)
        problems = checks.problems
        if dim % num_heads or dim // num_heads % 2:
            problems.append(f"dim {dim} over {num_heads} heads: heads must divide it into even widths")
        if projections not in ("qkvg", "qg_kv"):
            problems.append(f"projections {projections!r}: expected 'qkvg' or 'qg_kv'")
        elif projections == "qkvg" and sr_ratio != 1:
            problems.append(f"sr_ratio {sr_ratio} with projections 'qkvg': keys can be reduced with 'qg_kv' only")
        if len(grid) == 1 and sr_ratio != 1:
            problems.append(f"sr_ratio {sr_ratio} with the grid {grid} of a sequence: only images allow it")
        if any(side % sr_ratio for side in grid):
            problems.append(f"sr_ratio {sr_ratio} does not divide the grid {grid}")
        checks.raise_problems()

        width = dim // num_heads
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if projections == "qkvg":
            self.qkvg = linear(dim, 4 * dim, use_bias=qkv_bias, **types)
        else:
            self.qg = linear(dim, 2 * dim, use_bias=qkv_bias, **types)
            self.kv = linear(dim, 2 * dim, use_bias=qkv_bias, **types)
        if sr_ratio > 1:
            self.sr = PatchConv(sr_ratio, dim, dim, **types)
            self.norm = layer_norm(dim, epsilon=1e-5, **types)  # independent of the model's own epsilon
        self.proj = linear(dim, dim, **types)
        self.dwc = ConvParams((kernel_size,) * len(grid), 1, width, param_dtype=param_dtype, rngs=rngs)
        self.power = zeros((1, num_heads, 1, width), param_dtype=param_dtype, rngs=rngs)
        self.scale = zeros((1, 1, dim), param_dtype=param_dtype, rngs=rngs)
        keys = math.prod(grid) // sr_ratio**2
        self.positional_encoding = zeros((1, keys, dim), param_dtype=param_dtype, rngs=rngs)
        self.grid, self.sr_ratio, self.alpha = tuple(grid), sr_ratio, alpha
        self.projections, self.drop_rate, self.attention_impl = projections, drop_rate, attention_impl

    @jax.named_scope("attention")
    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """(B, N, C) -> (B, N, C)

        Args:
            key: draws the dropout after the output projection; None means evaluation.
            grid: (height, width) of the tokens; None: the module's own. On another grid the table of the keys is
                interpolated, bicubically. Not for sequences, which may be shorter than the table.
            mask: (B, N), see `polarity_attention`.
        """
        grid = grid or self.grid
        if len(grid) == 1:
            grid, table = x.shape[1:2], self.positional_encoding[:, : x.shape[1]]
        else:
            own, of_keys = (tuple(side // self.sr_ratio for side in sides) for sides in (self.grid, grid))
            table = table_on(self.positional_encoding[...], own, of_keys, "bicubic")
        y = self._attend(x, table, grid, mask)
        return dropout(self.proj(y), self.drop_rate, key)

    def _attend(self, x: jax.Array, table: jax.Array, grid: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
        """y of `polarity_attention` for tokens (B, N, C)."""

        def by_parts(x, implementation):
            return polarity_attention(
                *self.project(x, grid),
                power=self.power[...],
                scale=self.scale[...],
                positional_encoding=table,
                kernel=self.dwc.kernel[...],
                bias=self.dwc.bias[...],
                grid=grid,
                alpha=self.alpha,
                mask=mask,
                implementation=implementation,
            )

        def together(x, kernel, **options):
            """By a kernel that also computes the gradients of the linear layers, or part of them."""
            s, p = rescaling(self.power[...], self.scale[...], self.alpha, accumulation_dtype(self.proj.dtype))
            layers = {name: getattr(self, name) for name in ("qkvg", "qg", "kv") if hasattr(self, name)}
            tokens = {name: self._reduced(x, grid) if name == "kv" else x for name in layers}
            arrays = {"s": s, "p": p, "table": table, "grid": grid, "eps": NORMALISER_EPS}
            return kernel(tokens, layers, self.dwc, **arrays, **options)

        implementation, width = self.attention_impl, self.power.shape[3]
        if mask is None and self.sr_ratio == 1 and packed.usable(implementation, x, width):
            return together(x, packed.attention)
        if mask is not None or not polarity.chosen(implementation, x, width):
            return by_parts(x, implementation)
        if implementation == "pallas":
            return together(x, projected.attention, on_tpu=placement.for_tpu())
        on_tpu = functools.partial(together, kernel=projected.attention, on_tpu=True)
        return jax.lax.platform_dependent(x, tpu=on_tpu, default=lambda x: by_parts(x, "xla"))

    def project(
        self, x: jax.Array, grid: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Tokens (B, N, C) -> q, k, v, g: queries and gates (B, N, C), keys and values (B, n, C)."""
        if self.projections == "qkvg":
            q, k, v, g = jnp.split(self.qkvg(x), 4, axis=-1)
        else:
            q, g = jnp.split(self.qg(x), 2, axis=-1)
            k, v = jnp.split(self.kv(self._reduced(x, grid or self.grid)), 2, axis=-1)
        return q, k, v, g

    def _reduced(self, x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        if self.sr_ratio == 1:
            return x
        return self.norm(self.sr(x.reshape(x.shape[0], *grid, -1)))  # (B, N / sr_ratio², C)
