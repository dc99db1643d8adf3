"""Where blocks of PolaFormer++ look: the weights reproduce the attention; those of linear blocks may be negative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polaformer_jax as pf
from polaformer_jax.analysis.attention_maps import last_linear_block
from polaformer_jax.inference import pictures
from polaformer_jax.models.rotary_attention import rotary_linear_attention
from tests.support.small_models import perturbed
from tests.support.small_models import tiny_pp as tiny

pytestmark = pytest.mark.slow


def test_weights_of_a_linear_block_reproduce_its_streams():
    model = perturbed(tiny())
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32))
    block = model.layers[0].blocks[0]
    tokens = block.attention_input(model.tokens_before(x, stage=0, block=0), (8, 8))
    q, k, v, _ = (t.reshape(1, 1, 64, 4) for t in jnp.split(block.attn.qkvg(tokens), 4, axis=-1))
    y = rotary_linear_attention(q, k, v, block.attn.s1[...], block.attn.s2[...], grid=(8, 8))[0, 0]
    row, column = 2, 5
    maps = pf.attention_maps(model, x, stage=0, block=0, token=(row, column)).streams
    assert set(maps) == {"same", "opposite"}
    for name, half in (("same", slice(0, 2)), ("opposite", slice(2, 4))):
        weights = maps[name].weights[0, 0].reshape(-1)  # (64,)
        np.testing.assert_allclose(weights @ v[0, 0, :, half], y[8 * row + column, half], rtol=1e-4, atol=1e-5)
        assert np.isnan(maps[name].entropy).item() == bool((weights < 0).any())


def test_weights_of_a_softmax_block_are_probabilities():
    model = perturbed(tiny())
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32))
    (stream,) = pf.attention_maps(model, x, stage=1, token=(0, 0)).streams.values()
    assert stream.weights.shape == (2, 2, 4, 4) and (stream.weights > 0).all()
    np.testing.assert_allclose(stream.weights.sum(axis=(2, 3)), 1, rtol=1e-5)
    assert np.isfinite(stream.entropy).all()


def test_they_are_drawn():
    model = perturbed(tiny())
    assert last_linear_block(model) == (2, 0)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    results = [{**result, "image": "a.png"} for result in pf.predict(model, image)]
    for chosen, panels in (({}, 3), ({"stage": 1}, 2)):
        figure = pictures.draw(model, [image], results, where=pictures.choose(model, **chosen))
        assert len([axes for axes in figure.axes if axes.images]) == panels
    assert jax.default_backend() == "cpu"
