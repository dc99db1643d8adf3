"""The attention core against a transcription of its definition, and its behaviour where numbers are special."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention, polarity_attention
from tests.support.quick import QUICK

# heads, head width, query grid, spatial reduction, kernel, alpha
CASES = [
    (1, 4, (4, 4), 1, 5, 4.0),
    (3, 6, (5, 3), 1, 3, 2.5),
    (2, 2, (6, 6), 2, 7, 0.0),
    (2, 8, (3, 6), 3, 1, 3.0),
    (5, 2, (1, 1), 1, 5, 4.0),
]


def draw(heads, width, grid, ratio, kernel, *, batch=2, seed=0):
    """Arguments of `polarity_attention`, in float64."""
    rng = np.random.default_rng(seed)
    tokens, channels = grid[0] * grid[1], heads * width
    keys = tokens // ratio**2
    return {
        "q": rng.normal(size=(batch, tokens, channels)),
        "k": rng.normal(size=(batch, keys, channels)),
        "v": rng.normal(size=(batch, keys, channels)),
        "g": rng.normal(size=(batch, tokens, channels)),
        "power": rng.normal(size=(1, heads, 1, width)),
        "scale": rng.normal(size=(1, 1, channels)),
        "positional_encoding": rng.normal(size=(1, keys, channels)),
        "kernel": rng.normal(size=(kernel, kernel, 1, width)),
        "bias": rng.normal(size=(width,)),
    }


def by_definition(q, k, v, g, *, power, scale, positional_encoding, kernel, bias, grid, alpha):
    """The definition step by step in NumPy: every head alone, four products, the convolution pixel by pixel."""
    batch, tokens, channels = q.shape
    keys = k.shape[1]
    heads, width = power.shape[1], power.shape[3]
    k = k + positional_encoding
    s = np.log1p(np.exp(scale))
    q, k = q / s, k / s
    out = np.empty_like(q)
    for b in range(batch):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            p = 1 + alpha / (1 + np.exp(-power[0, head, 0]))
            q_pos, q_neg = np.maximum(q[b, :, own], 0) ** p, np.maximum(-q[b, :, own], 0) ** p
            k_pos, k_neg = np.maximum(k[b, :, own], 0) ** p, np.maximum(-k[b, :, own], 0) ** p
            k_all = np.concatenate([k_pos, k_neg], axis=1)
            v1, v2 = np.split(v[b, :, own], 2, axis=1)
            streams = []
            for q_all, values in ((np.concatenate([q_pos, q_neg], 1), v1), (np.concatenate([q_neg, q_pos], 1), v2)):
                normaliser = q_all @ k_all.mean(axis=0)[:, None] + 1e-6
                streams.append(q_all @ (k_all.T @ values) / keys / normaliser)
            out[b, :, own] = np.concatenate(streams, axis=1)
            for c in range(width):
                # np.interp holds its ends, as linear interpolation without aligned corners does.
                positions = (np.arange(tokens) + 0.5) * keys / tokens - 0.5
                plane = np.interp(positions, np.arange(keys), v[b, :, head * width + c]).reshape(grid)
                r = kernel.shape[0] // 2
                padded = np.pad(plane, r)
                for y, x in np.ndindex(*grid):
                    patch = padded[y : y + 2 * r + 1, x : x + 2 * r + 1]
                    out[b, y * grid[1] + x, head * width + c] += (patch * kernel[:, :, 0, c]).sum() + bias[c]
    return out * g


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_its_definition(case, x64):
    *shape, alpha = case
    arguments = draw(*shape)
    expected = by_definition(**arguments, grid=shape[2], alpha=alpha)
    found = polarity_attention(**{k: jnp.asarray(a) for k, a in arguments.items()}, grid=shape[2], alpha=alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_gradients_equal_finite_differences(case, x64):
    *shape, alpha = case
    arguments = {k: jnp.asarray(a) for k, a in draw(*shape, seed=1).items()}
    directions = {k: jnp.asarray(a) for k, a in draw(*shape, seed=2).items()}

    def total(step):
        moved = jax.tree.map(lambda a, d: a + step * d, arguments, directions)
        return jnp.sum(jnp.sin(polarity_attention(**moved, grid=shape[2], alpha=alpha)))

    h = 1e-6
    value = jax.jit(total, compiler_options=QUICK)
    slope = jax.jit(jax.grad(total), compiler_options=QUICK)
    np.testing.assert_allclose(slope(0.0), (value(h) - value(-h)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_gradients_are_finite_at_exact_zeros(alpha, dtype):
    shape = (2, 4, (3, 3), 1, 3)
    arguments = {k: jnp.asarray(a, jnp.float32) for k, a in draw(*shape).items()}
    for name in ("q", "k", "v", "g"):
        arguments[name] = arguments[name].at[:, ::2].set(0).astype(dtype)
    arguments["positional_encoding"] *= 0

    def total(arguments):
        return jnp.sum(polarity_attention(**arguments, grid=(3, 3), alpha=alpha).astype(jnp.float32) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(total), compiler_options=QUICK)(arguments)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((value, gradients)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_nan_goes_through_as_by_definition(dtype):
    """One NaN in any argument is NaN in the results that depend on it, and in its own gradient."""
    shape = (2, 4, (4, 4), 2, 3)
    given = draw(*shape)

    def total(arguments):
        y = polarity_attention(**arguments, grid=(4, 4))
        return jnp.sum(y.astype(jnp.float32)), y

    program = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
    for name in given:
        broken = {**given, name: given[name].copy()}
        broken[name].flat[1] = np.nan
        arguments = {k: jnp.asarray(a, dtype if k in "qkvg" else jnp.float32) for k, a in broken.items()}
        gradients, y = program(arguments)
        expected = by_definition(**broken, grid=(4, 4), alpha=4.0)
        np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)), np.isnan(expected), err_msg=name)
        if name in ("q", "k", "power", "scale", "positional_encoding"):  # y is linear in the others
            assert np.isnan(np.asarray(gradients[name], np.float32).flat[1]), name


def test_bfloat16_is_close_to_float32():
    shape = (2, 8, (6, 6), 1, 5)
    exact = {k: jnp.asarray(a, jnp.float32) for k, a in draw(*shape).items()}
    rounded = {k: a.astype(jnp.bfloat16) if k in "qkvg" else a for k, a in exact.items()}
    expected = polarity_attention(**exact, grid=(6, 6))
    found = polarity_attention(**rounded, grid=(6, 6))
    assert found.dtype == jnp.bfloat16
    assert jnp.linalg.norm(found.astype(jnp.float32) - expected) < 0.02 * jnp.linalg.norm(expected)


def test_bfloat16_computes_power_and_normaliser_in_float32():
    """Keys and queries so small that their powers would vanish beside 1e-6 if it were rounded, and some so large that
    float16 would overflow."""
    shape = (1, 4, (4, 4), 1, 1)
    arguments = {k: jnp.asarray(a, jnp.float32) for k, a in draw(*shape).items()}
    for size in (1e-3, 1e3):
        scaled = {**arguments, "q": size * arguments["q"], "k": size * arguments["k"]}
        scaled["positional_encoding"] = 0 * scaled["positional_encoding"]
        expected = polarity_attention(**scaled, grid=(4, 4))
        rounded = {k: a.astype(jnp.bfloat16) if k in "qkvg" else a for k, a in scaled.items()}
        found = polarity_attention(**rounded, grid=(4, 4)).astype(jnp.float32)
        assert jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("projections, sr_ratio", [("qkvg", 1), ("qg_kv", 1), ("qg_kv", 2)])
def test_module_has_the_official_parameters(projections, sr_ratio):
    module = PolarityAttention(
        8, 2, grid=(4, 4), projections=projections, sr_ratio=sr_ratio, kernel_size=3, rngs=nnx.Rngs(0)
    )
    names = set(nnx.to_pure_dict(nnx.state(module)))
    first = {"qkvg"} if projections == "qkvg" else {"qg", "kv"}
    reduction = {"sr", "norm"} if sr_ratio > 1 else set()
    assert names == {"proj", "dwc", "power", "scale", "positional_encoding"} | first | reduction
    assert module.positional_encoding.shape == (1, 16 // sr_ratio**2, 8)
    assert module(jnp.ones((2, 16, 8))).shape == (2, 16, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"alpha": -0.1}, "alpha=-0.1: expected a number >= 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"kernel_size": 4}, "kernel_size=4: expected an odd number"),
        ({"num_heads": 3}, "dim 8 over 3 heads"),
        ({"num_heads": 8}, "dim 8 over 8 heads"),
        ({"sr_ratio": 3}, "sr_ratio 3 does not divide the grid"),
        ({"projections": "qkv"}, "projections 'qkv'"),
        ({"projections": "qkvg", "sr_ratio": 2}, "keys can be reduced with 'qg_kv' only"),
    ],
    ids=str,
)
def test_refuses_what_cannot_work(arguments, message):
    settings = {"num_heads": 2, "grid": (4, 4), "projections": "qg_kv", **arguments}
    with pytest.raises(ValueError, match=message):
        PolarityAttention(8, **settings, rngs=nnx.Rngs(0))
