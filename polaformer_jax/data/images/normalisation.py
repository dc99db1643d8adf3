"""Normalisation of images, on the device, as the official weights expect it."""

import jax
import jax.numpy as jnp

# Mean and standard deviation of ImageNet's pixels, RGB in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: jax.Array) -> jax.Array:
    """Converts uint8 RGB images (..., 3) to float32 of about zero mean and unit variance."""
    shape = (1,) * (images.ndim - 1) + (3,)
    mean = jnp.asarray(IMAGENET_MEAN, jnp.float32).reshape(shape)
    std = jnp.asarray(IMAGENET_STD, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / std
