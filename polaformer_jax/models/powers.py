"""The signed powers of polarity-aware attention, element by element, for whole arrays and for blocks of a kernel.

Every comparison has NaN on the side of the power, so that a NaN among the arguments is a NaN in the results, forward
and backward, as it is in PyTorch: `where(z > 0, power, 0)` would hide it.
"""

import jax
import jax.numpy as jnp


def signed_powers(z: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """relu(z)^p and relu(-z)^p. Both are 0 where z is 0, and NaN where z is."""
    magnitude = _magnitude(z, p)
    return jnp.where(z <= 0, 0, magnitude), jnp.where(z >= 0, 0, magnitude)


def signed_powers_gradients(
    z: jax.Array, s: jax.Array, p: jax.Array, plus: jax.Array, minus: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, s and p, where z = x / s, from the cotangents `plus` and `minus` of `signed_powers`.

    All are 0 where z is 0, as p >= 1, and NaN where z is. Those of s and p are sums over `axes`, in which s and p have
    size 1.
    """
    gradient = jnp.where(z == 0, 0, jnp.where(z < 0, minus, plus))
    # With y = |z|^p: dy/dp = y log|z|, dy/d|z| = p y / |z|, and so z dy/dz = p y.
    weighted = gradient * _magnitude(z, p)
    base = jnp.where(z == 0, 1, z)
    p_gradient = jnp.sum(weighted * jnp.log(jnp.abs(base)), axis=axes, keepdims=True)
    s_gradient = -p / s * jnp.sum(weighted, axis=axes, keepdims=True)
    return p / s * weighted / base, s_gradient, p_gradient


def _magnitude(z: jax.Array, p: jax.Array) -> jax.Array:
    """|z|^p, 1 at z = 0. Not by `power`, which handles negative bases too and takes four times as long on a CPU."""
    return jnp.exp(p * jnp.log(jnp.where(z == 0, 1, jnp.abs(z))))
