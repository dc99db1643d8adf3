"""Polarity-aware linear attention, the core of the paper.

`polarity_attention` is the pure function, `PolarityAttention` the module that owns its parameters and the linear layers
around it. Source: Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025,
arXiv 2501.15061; parameter names as in the authors' PyTorch code, https://github.com/ZacharyMeng/PolaFormer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.config import ATTENTION_IMPLEMENTATIONS
from polaformer_jax.models.attention_layers import AttentionLayers, finished
from polaformer_jax.models.head_products import keys_by_values, queries_by_matrices
from polaformer_jax.models.initializers import zeros
from polaformer_jax.models.kernels import placement, polarity
from polaformer_jax.models.kernels.polarity import packed, projected
from polaformer_jax.models.layers import accumulation_dtype, check_implementation
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
    g: jax.Array | None,
    *,
    power: jax.Array,
    scale: jax.Array,
    positional_encoding: jax.Array,
    kernel: jax.Array | None,
    bias: jax.Array | None,
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
            accumulation are at least float32. g None: without the gate, y = [o1, o2] + conv(v).
        k, v: (B, n, C), n <= N.
        kernel, bias: of the depthwise convolution, (size, size, 1, d), size odd, and (d,); one kernel serves all heads.
            A kernel with one spatial axis belongs to a grid with one axis. None: without the convolution.
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
            (`jax.jvp`, `jax.linearize`, `jax.hessian`) and gradients of gradients take "xla". Without the gate or the
            convolution there is no kernel.

    Returns:
        (B, N, C) in the dtype of `q`.
    """
    if mask is not None and mask.shape != k.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape}, expected one value for each key, {k.shape[:2]}")
    check_implementation(implementation)
    if kernel is not None and not all(size % 2 for size in kernel.shape[:-2]):
        raise ValueError(f"kernel has shape {kernel.shape}, expected odd sizes along the axes of the grid")
    if mask is not None:
        v = jnp.where(mask[:, :, None], v, 0)
    arrays = {"q": q, "k": k, "v": v, "g": g, "kernel": kernel, "bias": bias}
    arrays |= {"table": positional_encoding, "mask": mask}
    arrays["s"], arrays["p"] = rescaling(power, scale, alpha, accumulation_dtype(q.dtype))
    by_operations = functools.partial(_by_operations, grid)
    if g is None or kernel is None or not polarity.chosen(implementation, q, power.shape[3]):
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

    q_signed = signed_feature_map(q, None, s, p)  # (B, N, h, 2d)
    k_signed = signed_feature_map(k, arrays["table"], s, p)  # (B, n, h, 2d)
    if mask is None:
        k_mean = jnp.mean(k_signed, axis=1, dtype=full)[..., None]  # (B, h, 2d, 1)
    else:
        k_signed = jnp.where(mask[:, :, None, None], k_signed, 0)
        keys = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(full).reshape(-1, 1, 1, 1)  # (B, 1, 1, 1)
        k_mean = jnp.sum(k_signed, axis=1, dtype=full)[..., None] / keys
    kv = keys_by_values(k_signed, split_heads(v, heads)) / keys  # (B, h, 2d, d)
    same = jnp.concatenate([kv[..., :half], k_mean], axis=-1)
    opposite = jnp.roll(jnp.concatenate([kv[..., half:], k_mean], axis=-1), width, axis=-2)  # the halves swapped
    m = jnp.concatenate([same, opposite], axis=-1).astype(narrow)  # (B, h, 2d, d + 2)
    qm = queries_by_matrices(q_signed, m)  # (B, N, h, d + 2)
    o_same = qm[..., :half] / (qm[..., half : half + 1] + NORMALISER_EPS)
    o_opposite = qm[..., half + 1 : width + 1] / (qm[..., width + 1 :] + NORMALISER_EPS)
    o = jnp.concatenate([o_same, o_opposite], axis=-1).reshape(-1, tokens, channels)
    return finished(o, v, g, kernel=arrays["kernel"], bias=arrays["bias"], grid=grid).astype(narrow)


class PolarityAttention(AttentionLayers):
    """The linear layers, tables and kernel around `polarity_attention`, and the output projection.

    Args:
        dim, num_heads: C and h; C/h must be even, since each stream takes half of a head's value channels.
        alpha: see `polarity_attention`.
        attention_impl: the `implementation` of `polarity_attention`; without masks the kernel is one that computes the
            gradients of the linear layers, or part of them, as well (`kernels.polarity.projected` and, on GPUs if there
            are as many keys as queries, `packed`). Without the gate or the convolution there is no kernel.
        layers: see `AttentionLayers`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        alpha: float = 4.0,
        attention_impl: str = "auto",
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
        **layers,
    ):
        checks = Checks("PolarityAttention cannot be built")
        alpha = checks.alpha(alpha)
        checks.choice("attention_impl", attention_impl, ATTENTION_IMPLEMENTATIONS)
        if dim % num_heads == 0 and dim // num_heads % 2:
            checks.problems.append(f"dim {dim} over {num_heads} heads: heads must divide it into even widths")
        super().__init__(dim, num_heads, checks=checks, param_dtype=param_dtype, rngs=rngs, **layers)
        self.power = zeros((1, num_heads, 1, dim // num_heads), param_dtype=param_dtype, rngs=rngs)
        self.scale = zeros((1, 1, dim), param_dtype=param_dtype, rngs=rngs)
        self.alpha, self.attention_impl = alpha, attention_impl

    def _attend(self, x: jax.Array, table: jax.Array, grid: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
        """y of `polarity_attention` for tokens (B, N, C)."""

        def by_parts(x, implementation):
            q, k, v, g = self.project(x, grid)
            kernel, bias = (None, None) if self.dwc is None else (self.dwc.kernel[...], self.dwc.bias[...])
            return polarity_attention(
                *(q, k, v, g),
                power=self.power[...],
                scale=self.scale[...],
                positional_encoding=table,
                kernel=kernel,
                bias=bias,
                grid=grid,
                alpha=self.alpha,
                mask=mask,
                implementation=implementation,
            )

        def together(x, kernel, **options):
            """By a kernel that also computes the gradients of the linear layers, or part of them."""
            s, p = rescaling(self.power[...], self.scale[...], self.alpha, accumulation_dtype(self.proj.dtype))
            layers = {name: getattr(self, name) for name in self.layers}
            tokens = {name: self._reduced(x, grid) if name == "kv" else x for name in layers}
            arrays = {"s": s, "p": p, "table": table, "grid": grid, "eps": NORMALISER_EPS}
            return kernel(tokens, layers, self.dwc, **arrays, **options)

        implementation, width = self.attention_impl, self.power.shape[3]
        if not self.gate or self.dwc is None:
            return by_parts(x, "xla")
        if mask is None and self.sr_ratio == 1 and packed.usable(implementation, x, width):
            return together(x, packed.attention)
        if mask is not None or not polarity.chosen(implementation, x, width):
            return by_parts(x, implementation)
        if implementation == "pallas":
            return together(x, projected.attention, on_tpu=placement.for_tpu())
        on_tpu = functools.partial(together, kernel=projected.attention, on_tpu=True)
        return jax.lax.platform_dependent(x, tpu=on_tpu, default=lambda x: by_parts(x, "xla"))
