"""The fused kernel on a real GPU or TPU, beside the same attention as operations, both against float64.

    python -m tests.campaigns.kernels

Values and gradients of cores of the models, masked ones and lengths that blocks do not divide included. Errors are
relative to the greatest element of each float64 array, which the CPU computes. The kernel may be up to four times as
far from it as the operations are, or as a rounding of its type where these are closer; one that is further away fails
the run. Each line is printed as soon as it is known: the first call of each program compiles it.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from polaformer_jax.models.attention import polarity_attention
from polaformer_jax.models.kernels.polarity import has_kernel
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
    print(LINE.format("core", "type", "y, operations", "y, kernel", "worst", "operations", "kernel"))
    failed = []
    for name, core in tqdm(CORES.items(), unit="core", disable=None):
        given, mask, weights = _arguments(core)
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            expected = _outcome(core, given, mask, weights, "float64", "xla")
        for dtype in DTYPES:
            operations, kernel = (
                _errors(_outcome(core, given, mask, weights, dtype, how), expected) for how in ("xla", "pallas")
            )
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


def _outcome(core, given, mask, weights, dtype, implementation):
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


def _errors(found, expected):
    """The greatest difference of each array from the expected one, relative to the greatest element of that."""
    return {
        name: float(np.max(np.abs(found[name] - array)) / max(np.max(np.abs(array)), 1e-6))
        for name, array in expected.items()
    }


if __name__ == "__main__":
    sys.exit(main())
