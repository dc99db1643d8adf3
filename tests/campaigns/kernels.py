"""The fused kernels on a real GPU or TPU, beside the same functions as operations, both against float64.

    python -m tests.campaigns.kernels

Values and gradients of the attention's cores, masked ones and lengths that blocks do not divide included, and of whole
blocks of the models: attention with the linear layers before it, LayerNorm and MLP. Errors are relative to the greatest
element of each float64 array, which the CPU computes. The kernels may be up to four times as far from it as the
operations are, or as a rounding of their type where these are closer; those further away fail the run. Each line is
printed as soon as it is known: the first call of each program compiles it.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from polaformer_jax.models.attention import PolarityAttention, polarity_attention
from polaformer_jax.models.kernels.polarity import has_kernel
from polaformer_jax.models.layers import Block
from tests.models.test_attention import draw

# Heads, width, grid, reduction of the keys, and whether keys are masked.
CORES = {
    "pola_swin_t, stage 1": (3, 32, (56, 56), 1, False),
    "pola_swin_t, stage 2": (6, 32, (28, 28), 1, False),
    "pola_pvt_t, stage 1": (1, 64, (56, 56), 1, False),
    "pola_pvt_t, stage 2": (2, 64, (28, 28), 1, False),
    "pola_pvt_t, stage 3": (5, 64, (14, 14), 1, False),
    "pola_pvt_t, stage 4": (8, 64, (7, 7), 1, False),
    "reduced keys": (1, 64, (56, 56), 8, False),
    "16 channels, odd length": (2, 16, (1, 1037), 1, True),
    "32 channels, masked": (2, 32, (1, 2000), 1, True),
}
# Heads, width, grid, projections, and the hidden channels of the MLP, relative to all of the heads'.
BLOCKS = {
    "pola_swin_t, block 1": (3, 32, (56, 56), "qkvg", 4),
    "pola_swin_t, block 3": (6, 32, (28, 28), "qkvg", 4),
    "pola_pvt_t, block 1": (1, 64, (56, 56), "qg_kv", 8),
    "pola_pvt_t, block 3": (2, 64, (28, 28), "qg_kv", 8),
    "pola_pvt_t, block 5": (5, 64, (14, 14), "qg_kv", 4),
    "odd sizes": (3, 16, (9, 11), "qkvg", 1.3),
}
DTYPES = ("float32", "bfloat16")
BATCH = 4
LIMIT = 4  # the kernel's error, in those of the operations
LINE = "{:25} {:10} {:>13} {:>10} {:>22} {:>11} {:>9}"


def main() -> int:
    backend = jax.default_backend()
    if not has_kernel(backend, 32):
        print(f"{backend} has no kernel in jax {jax.__version__}")
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(LINE.format("case", "type", "y, operations", "y, kernel", "worst", "operations", "kernel"))
    failed = []
    cases = {name: functools.partial(_core_outcome, core, *_arguments(core)) for name, core in CORES.items()}
    cases |= {name: functools.partial(_block_outcome, block) for name, block in BLOCKS.items()}
    for name, outcome in tqdm(cases.items(), unit="case", disable=None):
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            expected = outcome("float64", "xla")
        for dtype in DTYPES:
            operations, kernel = (_errors(outcome(dtype, how), expected) for how in ("xla", "pallas"))
            rounding = float(jnp.finfo(dtype).eps)
            ratios = {part: kernel[part] / max(operations[part], rounding) for part in kernel}
            worst = max(ratios, key=lambda part: np.nan_to_num(ratios[part], nan=np.inf))
            if not ratios[worst] <= LIMIT:  # NaN fails too
                failed.append(f"{name} {dtype}")
            numbers = [f"{value:.1e}" for value in (operations["y"], kernel["y"], operations[worst], kernel[worst])]
            tqdm.write(LINE.format(name, dtype, *numbers[:2], worst, *numbers[2:]))
    print(f"failed: {', '.join(failed)}" if failed else f"all within {LIMIT} times the operations' errors")
    return int(bool(failed))


def _arguments(core):
    heads, width, grid, ratio, masked = core
    given = draw(heads, width, grid, ratio, 5, batch=BATCH)
    weights = np.random.default_rng(1).normal(size=given["q"].shape)
    if not masked:
        return given, None, weights
    lengths = np.array([grid[1], grid[1] // 2, 17, 1])
    mask = np.arange(grid[1]) < lengths[:, None]
    return given, mask, weights * mask[:, :, None]


def _core_outcome(core, given, mask, weights, dtype, implementation):
    """y and the gradients of a number that depends on all of it, with q, k, v and g in `dtype`."""
    full = "float64" if dtype == "float64" else "float32"
    inputs = {
        name: jnp.asarray(value, "bfloat16").astype(dtype) if name in "qkvg" else jnp.asarray(value, "float32")
        for name, value in given.items()
    }
    inputs = {name: value if name in "qkvg" else value.astype(full) for name, value in inputs.items()}
    weights = jnp.asarray(weights, full)

    def total(given):
        y = polarity_attention(**given, grid=core[2], mask=mask, implementation=implementation)
        return jnp.sum(y.astype(full) * weights), y if mask is None else jnp.where(mask[:, :, None], y, 0)

    gradients, y = jax.jit(jax.grad(total, has_aux=True))(inputs)
    return {name: np.asarray(value, np.float64) for name, value in {**gradients, "y": y}.items()}


def _block_outcome(block, dtype, implementation):
    """The result of a block and the gradients of a number that depends on all of it, computed in `dtype`."""
    heads, width, grid, projections, mlp_ratio = block
    full = "float64" if dtype == "float64" else "float32"
    types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(full), "rngs": nnx.Rngs(0)}
    attention = PolarityAttention(
        heads * width, heads, grid=grid, projections=projections, attention_impl=implementation, **types
    )
    settings = {"mlp_ratio": mlp_ratio, "epsilon": 1e-5, "drop_rate": 0.0, "drop_path": 0.0}
    graphdef, params = nnx.split(Block(attention, heads * width, implementation=implementation, **settings, **types))
    rng = np.random.default_rng(0)

    def drawn(mean, deviation, shape, dtype):
        """The same numbers in every dtype: those that bfloat16 has."""
        return jnp.asarray(mean + deviation * rng.normal(size=shape), "bfloat16").astype(dtype)

    # The scales of the LayerNorms lie around 1, everything else around 0.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: drawn("norm" in str(path) and "scale" in str(path), 0.1, leaf.shape, full),
        nnx.to_pure_dict(params),
    )
    x = drawn(0, 1, (BATCH, math.prod(grid), heads * width), dtype)
    weights = jnp.asarray(rng.normal(size=x.shape), full)

    def total(params, x):
        y = nnx.merge(graphdef, params)(x)
        return jnp.sum(y.astype(full) * weights), y

    gradients, y = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)
    leaves = jax.tree_util.tree_leaves_with_path({"y": y, "x": gradients[1], **gradients[0]})
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf, np.float64) for path, leaf in leaves
    }


def _errors(found, expected):
    """The greatest difference of each array from the expected one, relative to the greatest element of that."""
    return {
        name: float(np.max(np.abs(found[name] - array)) / max(np.max(np.abs(array)), 1e-6))
        for name, array in expected.items()
    }


if __name__ == "__main__":
    sys.exit(main())
