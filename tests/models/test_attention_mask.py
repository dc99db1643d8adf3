"""Attention along sequences: the convolution has one axis, and padding an example changes nothing of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.models.attention import PolarityAttention, polarity_attention
from tests.models.test_attention import by_definition, draw
from tests.support.quick import QUICK

HEADS, WIDTH, KERNEL, TOKENS = 2, 4, 5, 12


def arguments(tokens=TOKENS, batch=3, seed=0):
    """Arguments of `polarity_attention` for sequences, in float64; the kernel keeps its middle row alone."""
    drawn = draw(HEADS, WIDTH, (1, tokens), 1, KERNEL, batch=batch, seed=seed)
    return {**drawn, "kernel": drawn["kernel"][KERNEL // 2]}


def attend(given, mask=None, **changes):
    given = {name: jnp.asarray(value) for name, value in {**given, **changes}.items()}
    return polarity_attention(**given, grid=(given["q"].shape[1],), alpha=3.0, mask=mask)


def cut(given, tokens, example=slice(None)):
    """The same arguments for the first tokens alone, of one example or of all."""
    sequences = {name: given[name][example, :tokens] for name in ("q", "k", "v", "g")}
    return {**given, **sequences, "positional_encoding": given["positional_encoding"][:, :tokens]}


def test_a_sequence_is_an_image_of_one_row(x64):
    drawn = draw(HEADS, WIDTH, (1, TOKENS), 1, KERNEL)
    expected = by_definition(**drawn, grid=(1, TOKENS), alpha=3.0)
    found = attend({**drawn, "kernel": drawn["kernel"][KERNEL // 2]})
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_a_mask_that_hides_nothing_changes_nothing(x64):
    given = arguments()
    np.testing.assert_allclose(attend(given, jnp.ones((3, TOKENS), bool)), attend(given), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("padding", [pytest.param(1, marks=pytest.mark.slow), 40])
def test_padding_changes_no_value_and_no_gradient(padding, x64):
    """Whatever stands in the padding, in examples that are padded unequally."""
    lengths = np.array([TOKENS, 7, 1])
    given = arguments(TOKENS + padding)
    mask = jnp.arange(TOKENS + padding).reshape(1, -1) < lengths.reshape(-1, 1)

    def padded(given):
        return jnp.sum(jnp.where(mask[:, :, None], jnp.sin(attend(given, mask)), 0))

    def alone(given):
        return sum(jnp.sum(jnp.sin(attend(cut(given, n, slice(i, i + 1))))) for i, n in enumerate(lengths))

    given = {name: jnp.asarray(value) for name, value in given.items()}
    (one, one_slopes), (other, other_slopes) = (
        jax.jit(jax.value_and_grad(f), compiler_options=QUICK)(given) for f in (padded, alone)
    )
    np.testing.assert_allclose(one, other, rtol=1e-10)
    for name in given:
        np.testing.assert_allclose(one_slopes[name], other_slopes[name], rtol=1e-10, atol=1e-10, err_msg=name)


def test_hidden_tokens_anywhere_are_no_keys(x64):
    given = arguments(batch=1)
    hidden = np.array([0, 3, 4, 9])
    left = np.setdiff1d(np.arange(TOKENS), hidden)
    mask = jnp.ones((1, TOKENS), bool).at[:, hidden].set(False)
    pointwise = {"kernel": np.zeros((KERNEL, 1, WIDTH))}  # a convolution would see the gaps
    some = {name: given[name][:, left] for name in ("q", "k", "v", "g", "positional_encoding")}
    found = attend(given, mask, **pointwise)[:, left]
    np.testing.assert_allclose(found, attend({**given, **some}, **pointwise), rtol=1e-10, atol=1e-12)


def test_the_convolution_sees_zeros_at_hidden_tokens(x64):
    given = arguments(batch=1)
    mask = jnp.ones((1, TOKENS), bool).at[:, 5].set(False)
    zeroed = given["v"].copy()
    zeroed[:, 5] = 0
    hidden = attend(given, mask)
    np.testing.assert_array_equal(hidden, attend(given, mask, v=zeroed))
    assert np.abs(hidden - attend(given))[:, 4].max() > 1e-3


def test_an_example_without_tokens_is_finite():
    given = {name: jnp.asarray(value, jnp.float32) for name, value in arguments(batch=1).items()}
    value, slopes = jax.value_and_grad(lambda g: jnp.sum(attend(g, jnp.zeros((1, TOKENS), bool))))(given)
    assert np.isfinite(value)
    assert all(np.isfinite(slope).all() for slope in jax.tree.leaves(slopes))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(3, 11\), expected one value for each key, \(3, 12\)"):
        attend(arguments(), jnp.ones((3, TOKENS - 1), bool))


def test_the_module_takes_any_length_up_to_its_table():
    module = PolarityAttention(8, 2, grid=(TOKENS,), projections="qkvg", rngs=nnx.Rngs(0))
    assert module.dwc.kernel.shape == (5, 1, 4)
    assert module.positional_encoding.shape == (1, TOKENS, 8)
    x = jax.random.normal(jax.random.key(0), (2, TOKENS, 8))
    for tokens in (TOKENS, 3):
        mask = jnp.ones((2, TOKENS), bool).at[:, tokens:].set(False)
        padded = module(x, mask=mask)[:, :tokens]
        np.testing.assert_allclose(padded, module(x[:, :tokens]), rtol=1e-5, atol=1e-6)


def test_keys_of_a_sequence_are_not_reduced():
    with pytest.raises(ValueError, match=r"sr_ratio 2 with the grid \(12,\) of a sequence"):
        PolarityAttention(8, 2, grid=(TOKENS,), projections="qg_kv", sr_ratio=2, rngs=nnx.Rngs(0))
