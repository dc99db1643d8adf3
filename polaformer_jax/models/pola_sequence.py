"""The sequence classifier of the Long Range Arena, with polarity-aware attention or one of two baselines.

Model, sizes and initial values are those of the Skyformer code (Chen et al., NeurIPS 2021, arXiv 2111.00035;
https://github.com/pkuzengqi/Skyformer); the figures of the PolaFormer paper are in the range of its figures, and the
authors of PolaFormer published no code for sequences. Two properties of that code are not reproduced: here a mean over
tokens divides by the actual length, and padding is what follows an example's length, not every token with the id 0.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.config import ATTENTIONS
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.initializers import Keys, table
from polaformer_jax.models.layers import (
    Block,
    accumulation_dtype,
    dropout,
    layer_norm,
    linear,
    placed,
    rematerialised,
    uniform_init,
)
from polaformer_jax.models.model_config import Checks, ModelConfig, check_computation, resolve_config
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.models.plain_attention import PlainAttention

EPSILON = 1e-5  # of every LayerNorm


class Sequences(NamedTuple):
    """A batch of padded sequences.

    Attributes:
        tokens: (B, N) token ids; (B, 2, N) where an example is a pair.
        length: (B,) or (B, 2), the number of valid tokens; the tokens after them are padding, and are ignored.
    """

    tokens: jax.Array
    length: jax.Array


class Head(nnx.Module):
    """Linear, ReLU, Linear, in at least float32."""

    def __init__(self, features: int, hidden: int, num_classes: int, *, dtype, **types):
        self.fc1 = linear(features, hidden, dtype=accumulation_dtype(dtype), **types)
        self.fc2 = linear(hidden, num_classes, dtype=accumulation_dtype(dtype), **types)

    @jax.named_scope("head")
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.relu(self.fc1(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolaSequenceConfig(ModelConfig):
    """Hyper-parameters of a `PolaSequence`. The defaults are the sizes of the Long Range Arena.

    Attributes:
        num_classes: of the head.
        vocabulary: number of token ids, 0 to vocabulary - 1.
        max_length: the longest sequence in tokens, padding included: rows of the position tables.
        texts: sequences in an example, 1 or 2.
        attention: "polarity", "softmax" or "relu" (see `PlainAttention`); everything else is equal.
        alpha, kernel_size: of the polarity-aware attention.
        dim, depth, num_heads, mlp_dim: channels, blocks, heads, and hidden channels of the MLPs.
        head_dim: hidden channels of the head.
        drop_rate: dropout of the embeddings, after each attention and in the MLPs.

    Raises:
        UserError: lists everything that does not fit.
    """

    family: ClassVar[str] = "PolaSequence"

    num_classes: int = 10
    vocabulary: int = 512
    max_length: int = 4096
    texts: int = 1
    attention: str = "polarity"
    alpha: float = 3.0
    kernel_size: int = 5
    dim: int = 64
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 128
    head_dim: int = 128
    drop_rate: float = 0.1

    def _normalised(self, checks: Checks) -> dict[str, object]:
        integers = ("num_classes", "vocabulary", "max_length", "texts", "dim", "depth", "num_heads", "mlp_dim")
        values = {name: checks.integer(name, getattr(self, name)) for name in (*integers, "head_dim")}
        values |= {
            "attention": checks.choice("attention", self.attention, ATTENTIONS),
            "alpha": checks.alpha(self.alpha),
            "kernel_size": checks.kernel_size(self.kernel_size),
            "drop_rate": checks.number("drop_rate", self.drop_rate, least=0, below=1),
        }
        dim, heads = values["dim"], values["num_heads"]
        if values["texts"] > 2:
            checks.problems.append(f"texts={self.texts}: expected 1, or 2 for pairs")
        if dim % heads or (values["attention"] == "polarity" and dim // heads % 2):
            checks.problems.append(
                f"dim={dim} over num_heads={heads}: heads must divide it, with attention='polarity' into even widths"
            )
        return values

    @property
    def num_features(self) -> int:
        """Channels of the classifier's input."""
        return self.dim

    def architecture(self) -> dict[str, object]:
        # Vocabulary, length and number of texts are those of a task; any attention can be trained in the same layers.
        names = ("dim", "depth", "num_heads", "mlp_dim", "head_dim", "kernel_size")
        return {name: getattr(self, name) for name in names}


class PolaSequence(nnx.Module):
    """Classifies sequences of tokens, or pairs of them.

    Token and position embeddings, pre-norm blocks, LayerNorm, the mean over an example's valid tokens, and a head of
    two layers. For a pair a, b, both encoded by the same layers, the head's input is [a, b, a * b, a - b].

    Args:
        config: the hyper-parameters; None: `PolaSequenceConfig(**hyperparameters)`.
        dtype: of activations and matrix products: bfloat16, float32 or float64.
        param_dtype: of the stored parameters: float32 or float64.
        attention_impl: how polarity-aware attention and the MLPs are computed: "auto", "xla" or "pallas" (see
            `polarity_attention` and `Block`).
        rngs: source of the keys for initial parameters, by `rngs.params()`.
        hyperparameters: fields of `PolaSequenceConfig`, if no config is given.

    Raises:
        UserError: lists everything that does not fit.
    """

    Config = PolaSequenceConfig
    remat: bool = False  # recompute each block's activations in the backward pass instead of storing them

    def __init__(
        self,
        config: PolaSequenceConfig | None = None,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention_impl: str = "auto",
        rngs: nnx.Rngs,
        **hyperparameters,
    ):
        config = resolve_config(PolaSequenceConfig, config, hyperparameters)
        dtype, param_dtype = check_computation(
            config.family, dtype=dtype, param_dtype=param_dtype, attention_impl=attention_impl
        )
        dim, drop_rate = config.dim, config.drop_rate
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": Keys.below(rngs)}

        def mixer():
            if config.attention != "polarity":
                return PlainAttention(dim, config.num_heads, kind=config.attention, drop_rate=drop_rate, **types)
            return PolarityAttention(
                dim,
                config.num_heads,
                grid=(config.max_length,),
                projections="qkvg",
                alpha=config.alpha,
                kernel_size=config.kernel_size,
                attention_impl=attention_impl,
                drop_rate=drop_rate,
                **types,
            )

        shape = {"param_dtype": param_dtype, "rngs": types["rngs"]}
        self.token_embed = table((config.vocabulary, dim), **shape)
        self.pos_embed = table((1, config.max_length, dim), **shape)
        self.blocks = nnx.List(
            Block(
                mixer(),
                dim,
                mlp_ratio=config.mlp_dim / dim,
                epsilon=EPSILON,
                drop_rate=drop_rate,
                drop_path=0.0,
                implementation=attention_impl,
                **types,
            )
            for _ in range(config.depth)
        )
        self.norm = layer_norm(dim, epsilon=EPSILON, **types)
        self.head = Head(dim if config.texts == 1 else 4 * dim, config.head_dim, config.num_classes, **types)
        _draw_as_pytorch(self, types["rngs"])
        self.config, self.dtype, self.info = config, dtype, ModelInfo()

    def __call__(self, sequences: Sequences, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits (B, num_classes), at least float32.

        Args:
            sequences: tokens and lengths; N may be anything up to `max_length`, and does not change results.
            train: apply dropout.
            rngs: source of the keys for `train`, by `rngs.dropout()`.

        Raises:
            ValueError: shapes or dtypes do not fit, or random numbers are needed and rngs is None.
        """
        pooled = self.pooled(sequences, train=train, rngs=rngs)  # (B, texts, C)
        if self.config.texts == 1:
            return self.head(pooled[:, 0])
        a, b = pooled[:, 0], pooled[:, 1]
        return self.head(jnp.concatenate([a, b, a * b, a - b], axis=-1))

    def pooled(self, sequences: Sequences, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The mean over each sequence's valid tokens, (B, texts, C), at least float32; zero for an empty one."""
        tokens, length = self._flat(sequences)
        x, mask = self._embed(tokens, length)  # (B * texts, N, C), (B * texts, N)
        next_key = self._key_source(train, rngs)
        with jax.named_scope("patch_embedding"):
            x = dropout(x, self.config.drop_rate, next_key())
        for block in self.blocks:
            apply = rematerialised if self.remat else type(block).__call__
            x = apply(block, x, next_key(), mask=mask)
        with jax.named_scope("head"):
            x = jnp.where(mask[:, :, None], self.norm(x), 0)
            total = jnp.sum(x, axis=1, dtype=accumulation_dtype(x.dtype))
            mean = total / jnp.maximum(length, 1).astype(total.dtype).reshape(-1, 1)
            return mean.reshape(-1, self.config.texts, mean.shape[-1])

    def tokens_before(self, sequences: Sequences, *, block: int) -> tuple[jax.Array, jax.Array]:
        """The input of a block, counted from 0, in evaluation: tokens (B * texts, N, C) and mask (B * texts, N)."""
        x, mask = self._embed(*self._flat(sequences))
        for earlier in self.blocks[:block]:
            x = earlier(x, mask=mask)
        return x, mask

    def _flat(self, sequences: Sequences) -> tuple[jax.Array, jax.Array]:
        """Tokens (B * texts, N) and lengths (B * texts,), checked."""
        tokens, length = sequences
        inner = () if self.config.texts == 1 else (self.config.texts,)
        if tokens.ndim != 2 + len(inner) or tokens.shape[1:-1] != inner or length.shape != tokens.shape[:-1]:
            expected = "(batch, tokens) and (batch,)" if self.config.texts == 1 else "(batch, 2, tokens) and (batch, 2)"
            raise ValueError(
                f"tokens and lengths have shapes {tuple(tokens.shape)} and {tuple(length.shape)}, expected {expected}"
            )
        if tokens.shape[0] == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected at least one sequence")
        if tokens.shape[-1] > self.config.max_length:
            raise ValueError(
                f"sequences are {tokens.shape[-1]} tokens long, expected at most {self.config.max_length}: cut them, "
                "or create the model with another max_length"
            )
        for name, array in (("tokens", tokens), ("lengths", length)):
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name} have type {array.dtype}, expected integers")
        return tokens.reshape(-1, tokens.shape[-1]), length.reshape(-1)

    @jax.named_scope("patch_embedding")
    def _embed(self, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.arange(tokens.shape[1])
        mask = positions.reshape(1, -1) < length.reshape(-1, 1)
        embedded = jnp.take(self.token_embed[...], tokens, axis=0, mode="clip")  # the default mode would return NaN
        x = embedded + self.pos_embed[...][:, : tokens.shape[1]]
        return x.astype(self.dtype), mask

    def _key_source(self, train: bool, rngs: nnx.Rngs | None):
        if not train or not self.config.drop_rate:
            return lambda: None
        if rngs is None:
            raise ValueError(
                f"train=True with drop_rate={self.config.drop_rate} draws random numbers, and rngs is None: pass "
                "rngs=nnx.Rngs(dropout=key)"
            )
        return Keys(rngs.dropout())


def _draw_as_pytorch(model: nnx.Module, rngs: Keys) -> None:
    """Redraws linear layers uniformly within ±1/sqrt(fan_in), PyTorch's default, as in the Skyformer code."""
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Linear):
            bound = layer.in_features**-0.5
            for param in (layer.kernel, layer.bias):
                param.set_value(placed(uniform_init, rngs)(rngs(), param.shape, param.dtype, bound=bound))
