"""The convolutions of PolaFormer++ outside its blocks: the stem, and the layers between stages."""

import jax
from flax import nnx

from polaformer_jax.models.batch_norm import BatchNorm, Conv, conv_norm
from polaformer_jax.models.layers import gelu


class Downsample(nnx.Module):
    """A convolution of stride 2 and its normalisation."""

    def __init__(self, dim: int, out: int, **types):
        self.reduction = Conv(3, dim, out, stride=2, **types)
        self.norm = BatchNorm(out, param_dtype=types["param_dtype"], rngs=types["rngs"])

    @jax.named_scope("patch_merging")
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return conv_norm(self.reduction, self.norm, x, mask)


class Activation(nnx.Module):
    """GELU, in its place among the layers of the stem."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return gelu(x)


class Stem(nnx.Module):
    """Four convolutions, each with its normalisation, three with GELU after it: (B, H, W, 3) -> (B, H/4, W/4, C)."""

    def __init__(self, dim: int, **types):
        half, norm = dim // 2, {"param_dtype": types["param_dtype"], "rngs": types["rngs"]}
        sizes = ((3, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2))
        layers = []
        for features_in, features_out, stride in sizes:
            conv = Conv(3, features_in, features_out, stride=stride, **types)
            layers += [conv, BatchNorm(features_out, **norm), Activation()]
        self.proj = nnx.List(layers[:-1])

    @jax.named_scope("patch_embedding")
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        layers = list(self.proj)
        for i in range(0, len(layers), 3):
            x = conv_norm(layers[i], layers[i + 1], x, mask)
            x = layers[i + 2](x) if i + 2 < len(layers) else x
        return x
