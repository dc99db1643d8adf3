"""The sequence classifier of the Long Range Arena, with polarity-aware attention or one of two to compare it with.

Model, sizes and initial values are those of the Skyformer code (Chen et al., NeurIPS 2021, arXiv 2111.00035;
https://github.com/pkuzengqi/Skyformer), in whose range the figures of the PolaFormer paper lie; the authors of
PolaFormer published no code for sequences. Two habits of that code are left out: here a mean over tokens divides by the
real length, and padding is what lies beyond an example's length, not whatever token has the id 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.attention import NORMALISER_EPS, PolarityAttention
from polaformer_jax.models.backbone import Arguments
from polaformer_jax.models.initializers import Keys, table
from polaformer_jax.models.layers import (
    Block,
    dropout,
    layer_norm,
    linear,
    placed,
    product,
    rematerialised,
    uniform_init,
    wide,
)

EPSILON = 1e-5  # of every LayerNorm
ATTENTIONS = ("polarity", "softmax", "relu")


class Sequences(NamedTuple):
    """A batch of padded sequences.

    Attributes:
        tokens: (B, N) token ids; (B, 2, N) where an example is a pair.
        length: (B,) or (B, 2): how many of them are there; what follows is padding, whatever it is.
    """

    tokens: jax.Array
    length: jax.Array


class PlainAttention(nnx.Module):
    """What polarity-aware attention is compared with: "softmax", or "relu", linear attention by one feature map.

    With relu, queries attend by o = relu(q) (relu(k)^T v / n) / (relu(q) mean(relu(k))^T + 1e-6): no polarity, power,
    gate or convolution.
    """

    def __init__(self, dim: int, num_heads: int, *, kind: str, drop_rate: float, **types):
        self.qkv = linear(dim, 3 * dim, **types)
        self.proj = linear(dim, dim, **types)
        self.kind, self.num_heads, self.drop_rate = kind, num_heads, drop_rate

    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, mask: jax.Array) -> jax.Array:
        """(B, N, C) -> (B, N, C); `mask` (B, N) is True at the tokens that are there."""
        q, k, v = self.project(x)
        if self.kind == "softmax":
            y = softmax_attention(q, k, v, mask=mask)
        else:
            y = relu_attention(q, k, v, mask=mask)
        return dropout(self.proj(y.reshape(x.shape)), self.drop_rate, key)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, N, C) -> queries, keys and values, (B, N, h, d) each."""
        q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return q, k, v


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Softmax attention, (B, N, h, d) each; `mask` (B, N) is True at the keys that are there."""
    mask = mask[:, None, None, :]
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    # That one rounds to float32.
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, jnp.finfo(q.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def relu_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Linear attention by the feature map relu, (B, N, h, d) each; `mask` (B, N) is True at the keys that are there."""
    full = wide(q.dtype)
    q, k = jax.nn.relu(q), jnp.where(mask[:, :, None, None], jax.nn.relu(k), 0)
    n = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(full).reshape(-1, 1, 1, 1)
    k_mean = jnp.sum(k, axis=1, dtype=full)[..., None] / n  # (B, h, d, 1)
    kv = product("bnhk,bnhe->bhke", k, v) / n  # (B, h, d, d)
    m = jnp.concatenate([kv, k_mean], axis=-1).astype(q.dtype)
    qm = product("bnhk,bhke->bnhe", q, m)  # (B, N, h, d + 1)
    return (qm[..., :-1] / (qm[..., -1:] + NORMALISER_EPS)).astype(q.dtype)


class Head(nnx.Module):
    """Linear, ReLU, Linear, in at least float32."""

    def __init__(self, features: int, hidden: int, num_classes: int, *, dtype, **types):
        self.fc1 = linear(features, hidden, dtype=wide(dtype), **types)
        self.fc2 = linear(hidden, num_classes, dtype=wide(dtype), **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.relu(self.fc1(x)))


class PolaSequence(nnx.Module):
    """Classifies sequences of tokens, or pairs of them. The defaults are the sizes of the Long Range Arena.

    Token and position embeddings, pre-norm blocks, LayerNorm, the mean over an example's own tokens, and a head of two
    layers. Of a pair a, b, both encoded alike, the head sees [a, b, a * b, a - b].

    Args:
        num_classes: of the head. vocabulary: number of token ids, 0 to vocabulary - 1.
        max_length: the longest sequence, padding included: rows of the position tables.
        texts: sequences in an example, 1 or 2.
        attention: "polarity", "softmax" or "relu" (see `PlainAttention`); all else is equal.
        alpha, kernel_size: of the polarity-aware attention. attention_impl: how to compute it: "auto", "xla", "pallas"
            (see `polarity_attention`).
        dim, depth, num_heads, mlp_dim: channels, blocks, heads, and hidden channels of the MLPs.
        head_dim: hidden channels of the head.
        drop_rate: dropout of the embeddings, after each attention and in the MLPs.
        dtype: of the computation: bfloat16, float32, float64. param_dtype: of the stored parameters.

    Raises:
        ValueError: with everything that does not fit.
    """

    remat: bool = False  # compute each block's activations anew in the backward pass rather than keep them

    def __init__(
        self,
        num_classes: int = 10,
        *,
        vocabulary: int = 512,
        max_length: int = 4096,
        texts: int = 1,
        attention: str = "polarity",
        alpha: float = 3,
        kernel_size: int = 5,
        attention_impl: str = "auto",
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        mlp_dim: int = 128,
        head_dim: int = 128,
        drop_rate: float = 0.1,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        given = Arguments("PolaSequence", locals())
        num_classes, vocabulary, max_length, texts, dim, depth, num_heads, mlp_dim, head_dim = (
            given.integer(name, value)
            for name, value in (
                ("num_classes", num_classes),
                ("vocabulary", vocabulary),
                ("max_length", max_length),
                ("texts", texts),
                ("dim", dim),
                ("depth", depth),
                ("num_heads", num_heads),
                ("mlp_dim", mlp_dim),
                ("head_dim", head_dim),
            )
        )
        drop_rate = given.number("drop_rate", drop_rate, least=0, below=1)
        alpha, kernel_size = given.attention(alpha, kernel_size, attention_impl)
        if attention not in ATTENTIONS:
            given.problems.append(f"attention={attention!r}: expected one of {', '.join(ATTENTIONS)}")
        if texts > 2:
            given.problems.append(f"texts={texts}: expected 1, or 2 for pairs")
        if dim % num_heads or (attention == "polarity" and dim // num_heads % 2):
            given.problems.append(
                f"dim={dim} over num_heads={num_heads}: the heads must divide it, for polarity into even widths"
            )
        dtype, param_dtype = given.types(dtype, param_dtype)
        given.check()
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys(rngs.params())}

        def mixer():
            if attention != "polarity":
                return PlainAttention(dim, num_heads, kind=attention, drop_rate=drop_rate, **types)
            return PolarityAttention(
                dim,
                num_heads,
                grid=(max_length,),
                projections="qkvg",
                alpha=alpha,
                kernel_size=kernel_size,
                attention_impl=attention_impl,
                drop_rate=drop_rate,
                **types,
            )

        shape = {"param_dtype": param_dtype, "rngs": types["rngs"]}
        self.token_embed = table((vocabulary, dim), **shape)
        self.pos_embed = table((1, max_length, dim), **shape)
        self.blocks = nnx.List(
            Block(mixer(), dim, mlp_ratio=mlp_dim / dim, epsilon=EPSILON, drop_rate=drop_rate, drop_path=0.0, **types)
            for _ in range(depth)
        )
        self.norm = layer_norm(dim, epsilon=EPSILON, **types)
        self.head = Head(dim if texts == 1 else 4 * dim, head_dim, num_classes, **types)
        _draw_as_pytorch(self, types["rngs"])
        self.vocabulary, self.max_length, self.texts = vocabulary, max_length, texts
        self.drop_rate, self.dtype = drop_rate, dtype
        self.arguments = given.record()

    def __call__(self, sequences: Sequences, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits (B, num_classes), at least float32.

        Args:
            sequences: tokens and lengths; N may be anything up to `max_length`, and changes no result.
            train: with dropout. rngs: where `train` draws its keys, by `rngs.dropout()`.

        Raises:
            ValueError: shapes or types do not fit, or random numbers are needed and rngs is None.
        """
        pooled = self.pooled(sequences, train=train, rngs=rngs)  # (B, texts, C)
        if self.texts == 1:
            return self.head(pooled[:, 0])
        a, b = pooled[:, 0], pooled[:, 1]
        return self.head(jnp.concatenate([a, b, a * b, a - b], axis=-1))

    def pooled(self, sequences: Sequences, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The mean of each sequence's own tokens, (B, texts, C), at least float32; zero for an empty one."""
        tokens, length = self._flat(sequences)
        x, mask = self._embed(tokens, length)  # (B * texts, N, C), (B * texts, N)
        next_key = self._key_source(train, rngs)
        x = dropout(x, self.drop_rate, next_key())
        for block in self.blocks:
            apply = rematerialised if self.remat else type(block).__call__
            x = apply(block, x, next_key(), mask=mask)
        x = jnp.where(mask[:, :, None], self.norm(x), 0)
        total = jnp.sum(x, axis=1, dtype=wide(x.dtype))
        mean = total / jnp.maximum(length, 1).astype(total.dtype).reshape(-1, 1)
        return mean.reshape(-1, self.texts, mean.shape[-1])

    def tokens_before(self, sequences: Sequences, *, block: int) -> tuple[jax.Array, jax.Array]:
        """What enters a block, counted from 0, in evaluation: tokens (B * texts, N, C) and mask (B * texts, N)."""
        x, mask = self._embed(*self._flat(sequences))
        for earlier in self.blocks[:block]:
            x = earlier(x, mask=mask)
        return x, mask

    def _flat(self, sequences: Sequences) -> tuple[jax.Array, jax.Array]:
        """Tokens (B * texts, N) and lengths (B * texts,), checked."""
        tokens, length = sequences
        inner = () if self.texts == 1 else (self.texts,)
        if tokens.ndim != 2 + len(inner) or tokens.shape[1:-1] != inner or length.shape != tokens.shape[:-1]:
            expected = "(batch, tokens) and (batch,)" if self.texts == 1 else "(batch, 2, tokens) and (batch, 2)"
            raise ValueError(
                f"tokens and lengths have shapes {tuple(tokens.shape)} and {tuple(length.shape)}, expected {expected}"
            )
        if tokens.shape[-1] > self.max_length:
            raise ValueError(
                f"sequences are {tokens.shape[-1]} tokens long, expected at most {self.max_length}: cut them, or "
                "create the model with another max_length"
            )
        for name, array in (("tokens", tokens), ("lengths", length)):
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name} have type {array.dtype}, expected integers")
        return tokens.reshape(-1, tokens.shape[-1]), length.reshape(-1)

    def _embed(self, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.arange(tokens.shape[1])
        mask = positions.reshape(1, -1) < length.reshape(-1, 1)
        embedded = jnp.take(self.token_embed[...], tokens, axis=0, mode="clip")  # the default would give NaN
        x = embedded + self.pos_embed[...][:, : tokens.shape[1]]
        return x.astype(self.dtype), mask

    def _key_source(self, train: bool, rngs: nnx.Rngs | None):
        if not train or not self.drop_rate:
            return lambda: None
        if rngs is None:
            raise ValueError(
                f"train=True with drop_rate={self.drop_rate} draws random numbers, and rngs is None: pass "
                "rngs=nnx.Rngs(dropout=key)"
            )
        return Keys(rngs.dropout())


def _draw_as_pytorch(model: nnx.Module, rngs: Keys) -> None:
    """Linear layers begin uniform within ±1/sqrt(fan_in), PyTorch's default, as where the figures were measured."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Linear):
            bound = layer.in_features**-0.5
            for param in (layer.kernel, layer.bias):
                param[...] = placed(uniform_init, rngs)(rngs(), param.shape, param.dtype, bound=bound)
