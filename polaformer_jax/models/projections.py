"""One linear layer whose result is several arrays, such as the queries, keys, values and gates of an attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from polaformer_jax.models.layers import apply_kernel


def project_apart(layer: nnx.Linear, x: jax.Array, parts: int) -> tuple[jax.Array, ...]:
    """The result of `layer`, in so many equal parts along the last axis, for kernels: it has gradients only.

    Each part is a product of its own, written once to where a kernel takes it. Split after one product, all parts would
    be read and written again. Their gradients are taken together: one product for that of x, one for that of the
    layer's kernel.

    Args:
        x: (..., in).

    Returns:
        Arrays (..., out), where the layer has `parts` * out features.
    """
    kernel = layer.kernel[...].astype(layer.dtype)
    results = _products(x.astype(layer.dtype), kernel.reshape(kernel.shape[0], parts, -1))
    if layer.bias is None:
        return results
    biases = jnp.split(layer.bias[...].astype(layer.dtype), parts)
    return tuple(y + b.reshape(*(1 for _ in y.shape[1:]), -1) for y, b in zip(results, biases, strict=True))


@jax.custom_vjp
def _products(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """x (..., in) by each part of kernel (in, parts, out)."""
    return tuple(apply_kernel(x, kernel[:, part]) for part in range(kernel.shape[1]))


def _products_fwd(x, kernel):
    return _products(x, kernel), (x, kernel)


def _products_bwd(residuals, gradients):
    x, kernel = residuals
    gradient = jnp.stack(
        gradients, axis=-2
    )  # (..., parts, out); XLA reads what are slices of one such array from there
    return jnp.einsum("...po,ipo->...i", gradient, kernel), jnp.einsum("...i,...po->ipo", x, gradient)


_products.defvjp(_products_fwd, _products_bwd)
