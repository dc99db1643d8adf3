"""The error function of single precision for kernels, where the compiler has none."""

import jax
import jax.numpy as jnp

# erf(x) = x P(x²) / Q(x²) up to |x| = 4, where it is 1 in single precision: the approximation of Eigen and XLA.
_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05)
_P += (-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)
_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03)
_Q += (-1.42647390514189e-02,)


def erf(x: jax.Array) -> jax.Array:
    """erf(x) within 5e-7; in double precision that of `lax`, which kernels for Triton do not have."""
    if x.dtype != jnp.float32:
        return jax.lax.erf(x)
    x = jnp.where(x > 4, 4, jnp.where(x < -4, -4, x))  # NaN stays
    return x * _polynomial(_P, x * x) / _polynomial(_Q, x * x)


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total
