"""The frame of Pola-PVT and Pola-Swin: four stages, three ways to call a model, and checks of what it is given."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.errors import UserError
from polaformer_jax.models.attention import IMPLEMENTATIONS
from polaformer_jax.models.initializers import Keys
from polaformer_jax.models.layers import Block, linear, rematerialised, wide

STRIDES = (4, 8, 16, 32)
DTYPES = ("bfloat16", "float32", "float64")
# Arguments of the constructors that do not say which function of its weights a model is.
NO_HYPERPARAMETERS = ("self", "__class__", "attention_impl", "dtype", "param_dtype", "rngs")


class Backbone(nnx.Module):
    """An image classifier of four stages with strides 4, 8, 16 and 32.

    Its only state is parameters: what else the official code stores (relative position indices, attention masks)
    follows from static integers in the forward pass, so that a pure dict of arrays is a whole model.

    A family provides `blocks`, `_enter` and `_pool`.
    """

    img_size: int
    drop_rates: tuple[float, float]  # dropout, stochastic depth
    arguments: tuple[tuple[str, object], ...]  # what the constructor was given, but for types and random numbers
    remat: bool = False  # compute each block's activations anew in the backward pass rather than keep them

    def __call__(self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits of normalised images.

        Args:
            images: (batch, img_size, img_size, 3), a float type.
            train: with dropout and stochastic depth, as far as their rates are not zero.
            rngs: where `train` draws its keys, by `rngs.dropout()`.

        Returns:
            (batch, num_classes), at least float32; without classifier (num_classes 0) what `pooled` returns.

        Raises:
            ValueError: the images' shape or type does not fit, or random numbers are needed and rngs is None.
        """
        pooled = self.pooled(images, train=train, rngs=rngs)
        return pooled if self.head is None else self.head(pooled)

    def pooled(self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """What the classifier sees: (batch, channels of the last stage), at least float32."""
        *_, tokens = self._stages(images, self._key_source(images, train, rngs))
        return self._pool(tokens)

    def features(self, images: jax.Array, train: bool = False, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """The unnormalised output of each stage before patch merging, for detection and segmentation heads.

        Returns:
            Four maps (batch, img_size / s, img_size / s, channels of the stage), s = 4, 8, 16, 32.
        """
        stages = self._stages(images, self._key_source(images, train, rngs))
        return [
            x.reshape(x.shape[0], self.img_size // s, -1, x.shape[-1]) for x, s in zip(stages, STRIDES, strict=True)
        ]

    def tokens_before(self, images: jax.Array, *, stage: int, block: int) -> jax.Array:
        """The tokens (batch, tokens, channels) that enter a block, both counted from 0, in evaluation."""
        next_key = self._key_source(images, False, None)
        x = images
        for i in range(stage + 1):
            x = self._enter(i, x, next_key)
            for earlier in self.blocks(i)[: block if i == stage else None]:
                x = earlier(x)
        return x

    def _stages(self, images: jax.Array, next_key: Callable[[], jax.Array | None]) -> Iterator[jax.Array]:
        """Yields the tokens (batch, tokens, channels) after the blocks of each stage."""
        x = images
        for i in range(len(STRIDES)):
            x = self._enter(i, x, next_key)
            for block in self.blocks(i):
                key = next_key()
                x = rematerialised(block, x, key) if self.remat else block(x, key)
            yield x

    def blocks(self, stage: int) -> Sequence[Block]:
        """The blocks of a stage, counted from 0."""
        raise NotImplementedError

    def _enter(self, stage: int, x: jax.Array, next_key: Callable[[], jax.Array | None]) -> jax.Array:
        """From the images (stage 0), or the tokens of the stage before, to those that enter a stage's first block."""
        raise NotImplementedError

    def _pool(self, tokens: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _key_source(self, images: jax.Array, train: bool, rngs: nnx.Rngs | None) -> Callable[[], jax.Array | None]:
        size = self.img_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (batch, {size}, {size}, 3), channels last; resize "
                "them, or create the model with another img_size"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images have type {images.dtype}, expected a float type: normalise them first")
        if not train or not any(self.drop_rates):
            return lambda: None
        if rngs is None:
            raise ValueError(
                f"train=True with drop_rate, drop_path_rate = {self.drop_rates} draws random numbers, and rngs is "
                "None: pass rngs=nnx.Rngs(dropout=key)"
            )
        return Keys(rngs.dropout())


def classifier(features: int, num_classes: int, *, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.Linear | None:
    """The head, in at least float32: it is small, and the loss wants exact logits."""
    if num_classes == 0:
        return None
    return linear(features, num_classes, dtype=wide(dtype), param_dtype=param_dtype, rngs=rngs)


class Arguments:
    """Normalises a constructor's arguments and collects what is wrong with them, to be raised all at once."""

    def __init__(self, family: str, given: Mapping[str, object]):
        """`given` is the constructor's `locals()`, of which `record` keeps a copy."""
        self.family = family
        self.problems: list[str] = []
        self._given = {key: value for key, value in given.items() if key not in NO_HYPERPARAMETERS}

    def integer(self, name: str, value, *, least: int = 1) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or number < least:
            self.problems.append(f"{name}={value!r}: expected an integer >= {least}")
            return least
        return number

    def integers(self, name: str, value) -> tuple[int, ...]:
        return tuple(self.integer(f"{name}[{i}]", item) for i, item in enumerate(self._four(name, value)))

    def number(self, name: str, value, *, least: float, below: float = math.inf) -> float:
        """A real number in [least, below)."""
        if isinstance(value, bool | str) or value is None or not least <= value < below:
            limits = f"in [{least}, {below})" if below < math.inf else f">= {least}"
            self.problems.append(f"{name}={value!r}: expected a number {limits}")
            return least
        return float(value)

    def numbers(self, name: str, value, *, least: float) -> tuple[float, ...]:
        return tuple(self.number(f"{name}[{i}]", item, least=least) for i, item in enumerate(self._four(name, value)))

    def letters(self, name: str, value, allowed: str, *, suffix: bool) -> str:
        """One letter for each of the four stages; with `suffix` more may follow, which is not looked at."""
        fits = isinstance(value, str) and (len(value) >= 4 if suffix else len(value) == 4)
        if not fits or any(letter not in allowed for letter in value[:4]):
            self.problems.append(
                f"{name}={value!r}: expected one letter of {', '.join(allowed)} for each of the four stages, as in "
                "'LLSS'"
            )
            return allowed[0] * 4
        return value[:4]

    def image_size(self, value) -> int:
        size = self.integer("img_size", value)
        if size % STRIDES[-1]:
            below = size // STRIDES[-1] * STRIDES[-1]
            nearest = " or ".join(str(s) for s in (below, below + STRIDES[-1]) if s)
            self.problems.append(f"img_size={size}: expected a multiple of {STRIDES[-1]}, such as {nearest}")
        return size

    def heads(self, dims: tuple[int, ...], num_heads: tuple[int, ...], types: tuple[str, ...]) -> None:
        """Heads divide the channels; in polarity-aware blocks into even widths, half of it for each stream."""
        for stage, (dim, heads, letters) in enumerate(zip(dims, num_heads, types, strict=True)):
            if dim % heads:
                self.problems.append(f"num_heads[{stage}]={heads} does not divide the {dim} channels of its stage")
            elif "L" in letters and dim // heads % 2:
                self.problems.append(
                    f"num_heads[{stage}]={heads} makes heads of {dim // heads} channels in a stage of type L, where "
                    "half of each head belongs to either stream: choose an even width"
                )

    def attention(self, alpha, kernel_size, attention_impl) -> tuple[float, int]:
        # A negative alpha would make powers below 1, whose slope at 0 is infinite; an even kernel has no centre.
        alpha = self.number("alpha", alpha, least=0)
        size = self.integer("kernel_size", kernel_size)
        if size % 2 == 0:
            self.problems.append(f"kernel_size={size}: expected an odd number, such as {size - 1} or {size + 1}")
        if attention_impl not in IMPLEMENTATIONS:
            self.problems.append(f"attention_impl={attention_impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
        return alpha, size

    def types(self, dtype, param_dtype) -> tuple[jnp.dtype, jnp.dtype]:
        found = []
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            try:
                found.append(jnp.dtype(value))
            except TypeError:
                found.append(None)
            if found[-1] is None or found[-1].name not in DTYPES:
                # float16 among others: the attention's normaliser overflows in it
                self.problems.append(f"{name}={value!r}: expected one of {', '.join(DTYPES)}")
            elif found[-1] == jnp.float64 and not jax.config.jax_enable_x64:
                self.problems.append(f"{name}=float64 needs jax.config.update('jax_enable_x64', True)")
        return tuple(found)

    def record(self) -> tuple[tuple[str, object], ...]:
        """The arguments as given, as pairs that can be hashed and written as JSON."""
        return tuple((name, _plain(value)) for name, value in self._given.items())

    def check(self) -> None:
        """Raises a UserError with everything that was found wrong."""
        if self.problems:
            raise UserError("\n  - ".join([f"{self.family} cannot be built:", *self.problems]))

    def _four(self, name: str, value) -> tuple:
        items = tuple(value) if hasattr(value, "__iter__") and not isinstance(value, str) else ()
        if len(items) != 4:
            self.problems.append(f"{name}={value!r}: expected four values, one a stage")
            return (1, 1, 1, 1)
        return items


def _plain(value):
    if hasattr(value, "__iter__") and not isinstance(value, str):
        return tuple(_plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value
