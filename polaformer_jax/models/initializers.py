"""Initial values of parameters: the official ones, drawn with few compilations and placed on their final devices.

An initialiser takes (key, shape, dtype), as those of nnx do, and `place`, which `placed` sets.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BLOCKS = (1 << 16,)  # how many values are drawn at once, ascending
_fold_in = jax.jit(jax.random.fold_in)  # for hundreds of keys: a jitted call takes a twentieth of the time


class Keys:
    """A stream of random keys derived from one: number i is fold_in(key, i).

    It replaces `nnx.Rngs` inside a model. Rngs keeps its count in a Variable, and while a function is traced every
    change of a Variable takes time in proportion to what was traced before: tracing the creation of pola_pvt_b took
    17 s.

    Args:
        place: turns a parameter's initial value, a NumPy array, into an array on its final devices.
    """

    def __init__(self, key: jax.Array, place: Callable[[np.ndarray], jax.Array] = jax.device_put):
        self.key, self.place, self.count = key, place, 0

    @classmethod
    def of(cls, rngs: "nnx.Rngs | Keys") -> "Keys":
        """The keys of a constructor's `rngs`, which is a Keys already if the caller decides where values are placed."""
        return rngs if isinstance(rngs, cls) else cls(rngs.params())

    @classmethod
    def below(cls, rngs: "nnx.Rngs | Keys") -> "Keys":
        """A new stream, derived from the next key of `rngs`, for values that are placed as those of `rngs`."""
        return rngs.child() if isinstance(rngs, cls) else cls(rngs.params())

    def child(self) -> "Keys":
        return Keys(self(), self.place)

    def __call__(self) -> jax.Array:
        self.count += 1
        return _fold_in(self.key, self.count - 1)

    params = __call__  # the method of an Rngs that the layers of nnx call


class AbstractKeys(Keys):
    """In the place of keys where a model's parameters are to be shapes and dtypes only, `jax.ShapeDtypeStruct`.

    The model is the one that `nnx.eval_shape` would give, without tracing what is drawn.
    """

    def __init__(self):
        pass

    def __call__(self) -> None:
        return None

    params = __call__

    def child(self) -> "AbstractKeys":
        return self


def table(shape: tuple[int, ...], *, param_dtype, rngs) -> nnx.Param:
    """A position table with the official initial values, normal(0.02)."""
    return nnx.Param(placed(normal_init, rngs)(rngs.params(), shape, param_dtype))


def zeros(shape: tuple[int, ...], *, param_dtype, rngs) -> nnx.Param:
    """A parameter that starts from zeros."""
    return nnx.Param(placed(zeros_init, rngs)(None, shape, param_dtype))


def constant(value: float, shape: tuple[int, ...], *, param_dtype, rngs) -> nnx.Param:
    """A parameter that starts from one value."""
    return nnx.Param(placed(_constant_init, rngs)(None, shape, param_dtype, value=value))


def placed(init: Callable, rngs: "nnx.Rngs | Keys") -> Callable:
    """The initialiser, with values placed by `rngs`; on the default device if `rngs` is not a Keys."""
    if isinstance(rngs, AbstractKeys):
        return _shape_and_dtype
    return functools.partial(init, place=rngs.place) if isinstance(rngs, Keys) else init


def _shape_and_dtype(key: None, shape: tuple[int, ...], dtype, **_) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _constant_init(key: None, shape: tuple[int, ...], dtype, place=jax.device_put, *, value: float) -> jax.Array:
    return place(np.full(shape, value, dtype))


def zeros_init(key: jax.Array | None, shape: tuple[int, ...], dtype, place=jax.device_put) -> jax.Array:
    # From NumPy, as `jnp.zeros` compiles a program for each shape.
    return place(np.zeros(shape, dtype))


def ones_init(key: jax.Array, shape: tuple[int, ...], dtype, place=jax.device_put) -> jax.Array:
    return place(np.ones(shape, dtype))


def normal_init(key: jax.Array, shape: tuple[int, ...], dtype, place=jax.device_put, *, std: float = 0.02) -> jax.Array:
    """normal(std); the official truncation of normal(0.02) at ±2, a hundred deviations, never takes effect."""
    return _draw(jax.random.normal, std, key, shape, dtype, place)


def kaiming_normal_init(key: jax.Array, shape: tuple[int, ...], dtype, place=jax.device_put) -> jax.Array:
    """normal(√(2 / (height * width * out))) for a kernel (height, width, in, out) that a ReLU follows."""
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return normal_init(key, shape, dtype, place, std=math.sqrt(2 / fan_out))


def xavier_uniform_init(key: jax.Array, shape: tuple[int, ...], dtype, place=jax.device_put) -> jax.Array:
    """Uniform in ±√(6 / (height * width * (in + out))) for a kernel (height, width, in, out)."""
    fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    return uniform_init(key, shape, dtype, place, bound=math.sqrt(6 / fans))


def uniform_init(key: jax.Array, shape: tuple[int, ...], dtype, place=jax.device_put, *, bound: float) -> jax.Array:
    """Uniform in ±bound."""
    return _draw(_symmetric_uniform, bound, key, shape, dtype, place)


def _symmetric_uniform(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)


def _draw(sample, scale: float, key: jax.Array, shape: tuple[int, ...], dtype, place) -> jax.Array:
    """Draws random values in blocks of one size, since each further size would take a third of a second to compile.

    A model has about fifty shapes: the difference is ten seconds before the first step. Inside a traced function the
    same blocks are drawn at once, and that saving is lost. More sizes in `BLOCKS` give the same values, since number i
    of a draw depends on the key and i alone (`jax_threefry_partitionable`, the default of jax): then a small array
    takes the beginning of a small block.
    """
    size = math.prod(shape)
    largest = BLOCKS[-1]
    blocks = -(-size // largest)
    if isinstance(key, jax.core.Tracer):
        drawn = jax.vmap(lambda i: _draw_block(sample, largest, key, i))(jnp.arange(blocks))
        return (scale * drawn.reshape(-1)[:size]).reshape(shape).astype(dtype)
    drawn = np.empty(size, dtype)
    for i in range(blocks):
        part = drawn[i * largest : (i + 1) * largest]
        block = next(count for count in BLOCKS if count >= part.size)
        part[:] = np.float32(scale) * np.asarray(_draw_block(sample, block, key, i))[: part.size]
    return place(drawn.reshape(shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_block(sample, size: int, key: jax.Array, index: int) -> jax.Array:
    return sample(jax.random.fold_in(key, index), (size,), jnp.float32)
