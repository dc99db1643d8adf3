"""PolaFormer++ against the official code, and what its family adds: statistics, any image size, mixed blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.kernels import placement
from polaformer_jax.models.rotary_attention import rotary_linear_attention, softmax_attention
from polaformer_jax.weights import rules
from tests.golden.fill import image
from tests.support.golden_models import float32_tolerance, relative_error
from tests.support.golden_pp import FULL, SMALL, build_full, build_small, images, numbers
from tests.support.quick import AS_USERS, QUICK
from tests.support.small_models import tiny_pp as tiny

small = pytest.mark.parametrize("name", ["mixed", "llvv"])


def official(tree) -> dict[str, np.ndarray]:
    flat = {name: np.asarray(leaf) for name, leaf in weights.flatten(tree).items()}
    return {rules.official_name(name, a.ndim): rules.to_official(name, a) for name, a in flat.items()}


@pytest.mark.slow
@small
def test_float64(name, x64):
    golden, x = numbers(name), images(name, jnp.float64)
    graphdef, state = build_small(name, jnp.float64)

    def loss(state):
        model = nnx.merge(graphdef, state)
        logits = model(x, train=True)
        loss = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), golden["labels"]])
        return loss, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    def run(state):
        return nnx.merge(graphdef, state)(x), jax.value_and_grad(loss, has_aux=True)(state)

    evaluated, ((found, (logits, statistics)), gradients) = jax.jit(run, compiler_options=QUICK)(state)
    assert relative_error(evaluated, golden["eval_logits"]) < 1e-9
    assert relative_error(logits, golden["train_logits"]) < 1e-9
    assert relative_error(found, golden["loss"]) < 1e-9
    running = official(statistics)
    assert {f"after/{path}" for path in running} == {key for key in golden.files if key.startswith("after/")}
    for path, value in running.items():
        assert relative_error(value, golden[f"after/{path}"]) < 1e-9, path
    for path, gradient in official(gradients).items():
        if path in running:
            assert not gradient.any(), path
            continue
        expected = golden[f"grad/{path}"].astype(np.float64)
        # The floor is for biases before a normalisation, whose gradients are zero but for rounding.
        assert np.linalg.norm(gradient - expected) <= 1e-6 * np.linalg.norm(expected) + 1e-9, path


@pytest.mark.parametrize("name", ["mixed", pytest.param("llvv", marks=pytest.mark.slow)])
def test_float32(name):
    """Logits in evaluation and in training, and the statistics that the training takes up."""
    golden, x = numbers(name), images(name, jnp.float32)
    graphdef, state = build_small(name, jnp.float32)

    def run(state):
        model = nnx.merge(graphdef, state)
        evaluated, logits = model(x), model(x, train=True)
        return evaluated, logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    evaluated, logits, statistics = jax.jit(run, compiler_options=QUICK)(state)
    assert evaluated.dtype == logits.dtype == jnp.float32
    assert relative_error(evaluated, golden["eval_logits"]) < 3e-6
    assert relative_error(logits, golden["train_logits"]) < 3e-5
    for path, value in official(statistics).items():
        assert relative_error(value, golden[f"after/{path}"]) < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name, x64):
    golden = numbers("full")
    graphdef, state = build_full(name, jnp.float64)
    x = jnp.asarray(image(1, FULL[name]["img_size"], FULL[name]["seed"]).transpose(0, 2, 3, 1), jnp.float64)

    def both(state):
        model = nnx.merge(graphdef, state)
        return model(x), model.features(x)

    logits, maps = jax.jit(both, compiler_options=QUICK)(state)
    assert relative_error(logits, golden[f"{name}/logits"]) < 1e-9
    for i, values in enumerate(maps):
        found = np.array([np.mean(values), np.std(values)])
        np.testing.assert_allclose(found, golden[f"{name}/stage{i}_mean_std"], rtol=1e-9, atol=1e-12)
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)
    graphdef = nnx.graphdef(pf.create_model(name, rngs=AbstractKeys()))
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x), compiler_options=AS_USERS)
    error = relative_error(run(in_float32, x.astype(jnp.float32)), golden[f"{name}/logits"])
    assert error < float32_tolerance(FULL[name])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pola_pp_b0", 7_548_712),
        ("pola_pp_b1", 9_227_496),
        ("pola_pp_b2", 16_450_664),
        ("pola_pp_b3", 27_145_896),
        pytest.param("pola_pp_b4", 49_798_792, marks=pytest.mark.slow),
        pytest.param("pola_pp_b5", 97_773_000, marks=pytest.mark.slow),
    ],
)
def test_parameters_are_as_many_as_the_official_ones(name, count):
    model = pf.create_model(name, rngs=AbstractKeys())
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert {letter for word in model.config.flags[:2] for letter in word} == {"l"}
    assert {letter for word in model.config.flags[2:] for letter in word} == {"v"}


def test_initial_values_are_the_official_ones():
    model = pf.create_model("pola_pp_nano", rngs=nnx.Rngs(0), layer_init_values=(1, 1e-6, 1, 1))
    attn = model.layers[0].blocks[0].attn
    assert not attn.s1[...].any() and not attn.lepe.bias[...].any()
    bound = 32**-0.5  # PyTorch's default of linear layers, weight and bias
    for values in (attn.qkvg.kernel[...], attn.qkvg.bias[...]):
        assert 0.9 * bound < np.abs(values).max() <= bound
    assert np.std(model.proj.kernel[...]) == pytest.approx(0.02, rel=0.05)
    gammas = [float(model.layers[i].blocks[0].gamma_1[...].max()) for i in range(2)]
    assert gammas == [1, np.float32(1e-6)]
    norm = model.layers[0].downsample.norm
    assert (norm.mean[...] == 0).all() and (norm.var[...] == 1).all() and (norm.scale[...] == 1).all()


@pytest.mark.slow
def test_images_of_any_size_and_blocks_recomputed():
    model = tiny(drop_path_rate=0.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 96, 3), np.float32))

    @jax.jit
    def run(model, x):
        return model(x), model.features(x), model.pooled(x)

    logits, maps, pooled = run(model, x)
    assert [m.shape for m in maps] == [(2, 16, 24, 4), (2, 8, 12, 8), (2, 4, 6, 8), (2, 2, 3, 8)]
    assert model.config.stage_channels == (4, 8, 8, 8)
    assert logits.shape == (2, 3) and pooled.shape == (2, 8)
    model.remat = True
    np.testing.assert_allclose(run(model, x)[0], logits, rtol=1e-5)
    headless = tiny(num_classes=0)
    assert headless.proj is None and jax.eval_shape(lambda m, x: m(x), headless, x).shape == (2, 8)


def test_programs_for_tpus_compute_the_same(x64, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.standard_normal((3, 2, 3, 6, 8)))
    s1, s2 = jnp.asarray(rng.standard_normal((2, 1, 3, 1, 16)))

    def results():
        linear = rotary_linear_attention.__wrapped__(q, k, v, s1, s2, grid=(2, 3))  # not a program traced before
        return linear, softmax_attention.__wrapped__(q, k, v)

    ours = results()
    monkeypatch.setattr(placement, "for_tpu", lambda: True)
    for expected, result in zip(ours, results(), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.0, 30.0])
def test_zeros_and_large_inputs_are_finite(dtype, size):
    """exp(30) - 1 is 1e13: its square, in the normaliser and the product, is far below the largest float32."""
    q, k, v = jnp.full((3, 1, 2, 4, 8), size, dtype)
    s = jnp.zeros((1, 2, 1, 16), jnp.float32)

    def total(q, k, v, s):
        return jnp.sum(rotary_linear_attention(q, k, v, s, s, grid=(2, 2)))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(q, k, v, s)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert size or value == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flags": ("l", "x", "v", "v")}, r"flags\[1\]='x': expected 1 letters of l, v"),
        ({"flags": "l,l,v"}, "flags=.*: expected four values"),
        ({"flags": ("ll", "l", "v", "v")}, r"flags\[0\]='ll': expected 1 letters"),
        ({"num_heads": (1, 3, 1, 2)}, r"num_heads\[1\]=3 over 8 channels"),
        ({"num_heads": (2, 2, 1, 2)}, r"num_heads\[0\]=2 over 4 channels: heads must .* multiples of 4"),
        ({"layerscales": (1, True, True, True)}, r"layerscales\[0\]=1: expected True or False"),
        ({"projection": 0}, "projection=0: expected an integer >= 1"),
        ({"attention_impl": "pallas"}, "attention_impl='pallas': PolaFormer.. has no kernel of its own"),
        ({"img_size": 40}, "img_size=40: expected a multiple of 32"),
        ({"alpha": 3}, "alpha"),
    ],
)
def test_what_cannot_be_built_is_named(changes, message):
    with pytest.raises((UserError, TypeError), match=message):
        tiny(**changes)


@pytest.mark.parametrize("shape", [(1, 40, 32, 3), (1, 0, 32, 3), (1, 3, 32, 32), (32, 32, 3)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="height and width multiples of 32"):
        tiny()(jnp.zeros(shape))


def test_the_specification_is_that_of_the_published_code():
    assert set(SMALL) == {"pp_llvv", "pp_mixed"} and set(FULL) == {"pola_pp_b0", "pola_pp_b1", "pola_pp_b3"}
