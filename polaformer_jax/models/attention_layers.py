"""What stands around an attention: linear layers, the keys' table of positions, the convolution and the gate.

The polarity-aware attention and those that it is compared with have these in common, with the same names and initial
values. Source and names: the official code of PolaFormer, https://github.com/ZacharyMeng/PolaFormer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.depthwise import depthwise_conv, upsample_tokens
from polaformer_jax.models.initializers import zeros
from polaformer_jax.models.interpolation import table_on
from polaformer_jax.models.layers import ConvParams, PatchConv, dropout, layer_norm, linear
from polaformer_jax.models.model_config import Checks


def finished(
    o: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    *,
    kernel: jax.Array | None,
    bias: jax.Array | None,
    grid: tuple[int, ...],
) -> jax.Array:
    """(o + conv(v)) * g, in the dtype of sums.

    Args:
        o: (B, N, C), the result of an attention.
        v: (B, n, C), its values, n <= N, with zeros at masked tokens.
        g: (B, N, C), the gate; None: without it.
        kernel, bias: of the depthwise convolution, see `depthwise_conv`; None: without it.
        grid: how the N tokens are arranged.
    """
    if kernel is not None:
        o = o + depthwise_conv(upsample_tokens(v, o.shape[1]), kernel, bias, grid=grid)
    return o if g is None else o * g


class AttentionLayers(nnx.Module):
    """The layers around an attention, (B, N, C) -> (B, N, C). An attention implements `_attend`.

    Args:
        dim: channels C.
        num_heads: h, which divides C.
        checks: collects what does not fit, and is raised here.
        grid: (height, width) of the query tokens; (length,) of sequences, which may be shorter.
        projections: "qkvg", one layer whose output is q, k, v, g in this order (Pola-Swin), or "qg_kv", two layers with
            outputs q, g and k, v (Pola-PVT). Without the gate the layers are `qkv`, or `q` and `kv`.
        sr_ratio: spatial reduction of keys and values by `sr` and `norm`, only with "qg_kv"; 1 is none.
            It must divide the grid.
        kernel_size: of the depthwise convolution, odd.
        gate: whether the result is multiplied by g.
        convolution: whether a depthwise convolution of the values is added to the result of the attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        checks: Checks,
        grid: tuple[int, ...],
        projections: str,
        qkv_bias: bool = True,
        sr_ratio: int = 1,
        kernel_size: int = 5,
        gate: bool = True,
        convolution: bool = True,
        drop_rate: float = 0.0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel_size, problems = checks.kernel_size(kernel_size), checks.problems
        if dim % num_heads:
            problems.append(f"dim {dim} over {num_heads} heads: heads must divide it")
        if projections not in ("qkvg", "qg_kv"):
            problems.append(f"projections {projections!r}: expected 'qkvg' or 'qg_kv'")
        elif projections == "qkvg" and sr_ratio != 1:
            problems.append(f"sr_ratio {sr_ratio} with projections 'qkvg': keys can be reduced with 'qg_kv' only")
        if len(grid) == 1 and sr_ratio != 1:
            problems.append(f"sr_ratio {sr_ratio} with the grid {grid} of a sequence: only images allow it")
        if any(side % sr_ratio for side in grid):
            problems.append(f"sr_ratio {sr_ratio} does not divide the grid {grid}")
        checks.raise_problems()

        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layers = ("qkvg",) if projections == "qkvg" else ("qg", "kv")
        if not gate:
            self.layers = tuple(name.replace("g", "") for name in self.layers)
        for name in self.layers:
            setattr(self, name, linear(dim, len(name) * dim, use_bias=qkv_bias, **types))
        if sr_ratio > 1:
            self.sr = PatchConv(sr_ratio, dim, dim, **types)
            self.norm = layer_norm(dim, epsilon=1e-5, **types)  # independent of the model's own epsilon
        self.proj = linear(dim, dim, **types)
        size, width = (kernel_size,) * len(grid), dim // num_heads
        self.dwc = ConvParams(size, 1, width, param_dtype=param_dtype, rngs=rngs) if convolution else None
        keys = math.prod(grid) // sr_ratio**2
        self.positional_encoding = zeros((1, keys, dim), param_dtype=param_dtype, rngs=rngs)
        self.grid, self.sr_ratio, self.gate, self.drop_rate = tuple(grid), sr_ratio, gate, drop_rate

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
        """(o + conv(v)) * g of tokens (B, N, C), with the table of the keys (1, n, C)."""
        raise NotImplementedError

    def project(
        self, x: jax.Array, grid: tuple[int, ...] | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Tokens (B, N, C) -> q, k, v, g: queries and gates (B, N, C), keys and values (B, n, C). g None: no gate."""
        parts = {}
        for name in self.layers:
            tokens = self._reduced(x, grid or self.grid) if name == "kv" else x
            parts |= zip(name, jnp.split(getattr(self, name)(tokens), len(name), axis=-1), strict=True)
        return parts["q"], parts["k"], parts["v"], parts.get("g")

    def _reduced(self, x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        if self.sr_ratio == 1:
            return x
        return self.norm(self.sr(x.reshape(x.shape[0], *grid, -1)))  # (B, N / sr_ratio², C)
