"""What is random in a model: stochastic depth, dropout, and its initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.models import initializers, layers, registry
from tests.support.quick import QUICK
from tests.support.small_models import build, noise, split

# --- randomness


def test_stochastic_depth_rises_linearly_over_all_blocks():
    rates = layers.drop_path_rates(0.3, (1, 2, 3, 1))
    assert [len(stage) for stage in rates] == [1, 2, 3, 1]
    np.testing.assert_allclose(sum(rates, []), 0.3 * np.arange(7) / 6)
    model = build("swin", drop_path_rate=0.6)
    found = [block.drop_path for stage in model.layers for block in stage.blocks]
    np.testing.assert_allclose(found, 0.6 * np.arange(6) / 5)


class Constant(nnx.Module):
    def __init__(self, value: float):
        self.value = value

    def __call__(self, x, key=None):
        return jnp.full_like(x, self.value)


def test_stochastic_depth_acts_per_sample_and_apart_for_the_two_residuals():
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    options = {"mlp_ratio": 1, "epsilon": 1e-6, "drop_rate": 0.0, "drop_path": 0.2, "implementation": "xla"}
    block = layers.Block(Constant(1.0), 4, **options, **types)
    block.mlp = Constant(10.0)
    x = jnp.zeros((20_000, 3, 4))
    y = np.asarray(block(x, jax.random.key(0)))

    assert (y == y[:, :1, :1]).all()  # all tokens and channels of a sample share its fate
    attended, processed = np.round(0.8 * y[:, 0, 0]) % 10, np.round(0.8 * y[:, 0, 0]) // 10
    np.testing.assert_allclose(y[:, 0, 0], attended / 0.8 + processed / 0.08, rtol=1e-6)  # kept ones are scaled
    deviation = (0.2 * 0.8 / len(y)) ** 0.5
    assert abs(attended.mean() - 0.8) < 4 * deviation
    assert abs(processed.mean() - 0.8) < 4 * deviation
    assert abs(np.corrcoef(attended, processed)[0, 1]) < 4 / len(y) ** 0.5

    assert (np.asarray(block(x)) == 11.0).all()  # evaluation


def test_dropout_keeps_the_mean():
    x = jnp.ones((400, 500))
    y = layers.dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.01
    assert layers.dropout(x, 0.25, None) is x


@pytest.mark.parametrize("family", ["pvt", pytest.param("swin", marks=pytest.mark.slow)])
def test_training_is_random_by_the_given_key_alone(family):
    graphdef, params = split(build(family, depths=(1, 1, 1, 1), drop_rate=0.2, drop_path_rate=0.4))
    images = noise(4, 32, 32, 3)

    def train(key):
        return nnx.merge(graphdef, params)(images, train=True, rngs=nnx.Rngs(dropout=key))

    call = jax.jit(train, compiler_options=QUICK)
    one, same, other = (call(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any(axis=1).all()


def test_training_without_random_numbers_is_refused():
    with pytest.raises(ValueError, match=r"drop_path_rate = \(0.0, 0.1\).*pass rngs=nnx.Rngs\(dropout=key\)"):
        build("pvt", drop_path_rate=0.1)(noise(1, 32, 32, 3), train=True)


def test_training_without_dropout_needs_no_random_numbers():
    graphdef, params = split(build("pvt"))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    train, evaluate = (
        jax.make_jaxpr(lambda p, x, t=t: nnx.merge(graphdef, p)(x, train=t))(params, images) for t in (1, 0)
    )
    assert str(train) == str(evaluate)


# --- initial weights


def test_initial_weights():
    params = pf.weights.flatten(split(pf.create_model("pola_swin_nano", ape=True, rngs=nnx.Rngs(0)))[1])
    for name, leaf in params.items():
        value = np.asarray(leaf)
        parent, kind = name.rpartition(".")[::2]
        if kind in ("power", "positional_encoding") or name.endswith("attn.scale"):
            assert (value == 0).all(), name
        elif kind == "scale":
            assert (value == 1).all(), name
        elif parent.endswith((".dwc", "patch_embed.proj")):
            kernel = params[f"{parent}.kernel"]
            bound = np.prod(kernel.shape[:3]) ** -0.5
            assert 0.8 * bound < np.abs(value).max() <= bound, name
            assert abs(value.mean()) < 4 * bound / (3 * value.size) ** 0.5, name
        elif kind == "bias":
            assert (value == 0).all(), name
        else:  # linear kernels and position tables
            assert abs(value.std() / 0.02 - 1) < 4 / (2 * value.size) ** 0.5, name
            assert abs(value.mean()) < 4 * 0.02 / value.size**0.5, name


def test_initial_weights_follow_from_the_seed():
    one, same, other = (split(pf.create_model("pola_pvt_nano", rngs=nnx.Rngs(seed)))[1] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (np.asarray(one["head"]["kernel"]) != np.asarray(other["head"]["kernel"])).all()
    values = pf.weights.flatten(one)
    assert (values["block3.0.mlp.fc1.kernel"] != values["block3.1.mlp.fc1.kernel"]).all()


@pytest.mark.parametrize("size", [3, 256, 5000, 70_000])
def test_initial_values_do_not_depend_on_the_blocks_they_are_drawn_in(size, monkeypatch):
    drawn = []
    for blocks in ((1 << 16,), (1 << 8, 1 << 12, 1 << 16)):
        monkeypatch.setattr(initializers, "BLOCKS", blocks)
        drawn.append(initializers.normal_init(jax.random.key(3), (size,), jnp.float32))
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("name", ["pola_pvt_nano", "pola_swin_nano", "pola_pp_nano", "pola_sequence"])
def test_all_initial_values_are_placed_where_the_keys_say(name):
    device = jax.devices()[3]
    keys = initializers.Keys(jax.random.key(0), lambda array: jax.device_put(array, device))
    _, params = split(registry.create(registry.model_config(name), rngs=keys))
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {device}
