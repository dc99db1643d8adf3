"""The dtypes that models compute in."""

import jax.numpy as jnp


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of sums, powers, quotients and softmax where products are in `dtype`: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
