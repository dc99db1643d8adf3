"""What holds for any model that the constructors accept: shapes, finite numbers, windows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.config import HEADS
from polaformer_jax.models import registry, window_attention
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.windows import Windows
from tests.support.golden_models import FULL
from tests.support.quick import QUICK
from tests.support.small_models import FAMILIES, abstract, all_finite, build, noise, split

OFFICIAL = [name for name in pf.list_models() if name.startswith(("pola_pvt", "pola_swin")) and "nano" not in name]


@functools.cache
def compiled(family: str, dtype: str):
    """(function, params): images -> (cross-entropy to class 0, (pooled features, logits, params)), gradients."""
    graphdef, params = split(build(family, dtype=dtype))

    def loss(params, images):
        model = nnx.merge(graphdef, params)
        pooled = model.pooled(images)
        logits = model.head(pooled)
        return -jax.nn.log_softmax(logits)[:, 0].mean(), (pooled, logits, nnx.to_pure_dict(nnx.state(model)))

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK), params


# --- sizes and shapes


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models_have_the_official_number_of_parameters(name):
    published = {
        **{name: entry["params"] for name, entry in FULL.items()},
        "pola_pvt_b": 54_366_568,
        "pola_swin_b_384": 91_599_304,
    }
    unused = 2 * 512 if "pvt" in name else 0  # the final norm, which the official model never calls
    model = pf.create_model(name, rngs=AbstractKeys())
    assert sum(leaf.size for leaf in jax.tree.leaves(split(model)[1])) == published[name] - unused


@pytest.mark.parametrize("name", ["pola_pvt_t", "pola_swin_t", "pola_pvt_nano", "pola_swin_nano"])
def test_features_are_the_maps_of_four_strides(name):
    config = registry.model_config(name)
    size = config.img_size
    dims = config.embed_dims if config.family == "PolaPVT" else [config.embed_dim * 2**i for i in range(4)]
    graphdef, params = split(pf.create_model(name, num_classes=7, rngs=AbstractKeys()))

    def call(params, images):
        model = nnx.merge(graphdef, params)
        return model.features(images), model.pooled(images), model(images)

    maps, pooled, logits = jax.eval_shape(call, params, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
    assert [m.shape for m in maps] == [(2, size // s, size // s, d) for s, d in zip((4, 8, 16, 32), dims, strict=True)]
    assert pooled.shape == (2, dims[-1])
    assert logits.shape == (2, 7)


def test_small_models_of_the_zoo_are_small():
    for name in ("pola_pvt_nano", "pola_swin_nano"):
        model = pf.create_model(name, num_classes=10, rngs=AbstractKeys())
        assert sum(leaf.size for leaf in jax.tree.leaves(split(model)[1])) < 1.05e6


def test_without_classes_a_model_returns_the_pooled_features():
    graphdef, params = split(build("pvt", num_classes=0))
    assert "head" not in params
    both = jax.jit(lambda p, x: (nnx.merge(graphdef, p)(x), nnx.merge(graphdef, p).pooled(x)), compiler_options=QUICK)
    np.testing.assert_array_equal(*both(params, noise(2, 32, 32, 3)))


# --- a model is its parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_is_parameters_only(family):
    state = nnx.split(build(family))[1]
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert leaves and all(type(leaf) is nnx.Param for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pure_dict_is_the_whole_model(family):
    step, params = compiled(family, "float32")
    (_, (_, _, survived)), _ = step(params, noise(8, 32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, survived, params)


def test_models_of_one_architecture_share_their_graph():
    """So that it can be a static argument of a compiled function."""
    one, other = split(build("pvt"))[0], split(build("pvt"))[0]
    assert one == other and hash(one) == hash(other)


def test_merges_deep_models_under_trace():
    graphdef, params = split(pf.create_model("pola_pvt_b", rngs=AbstractKeys()))
    assert len(jax.tree.leaves(params)) > 600
    survived = jax.eval_shape(jax.jit(lambda p: nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, p)))), params)
    assert jax.tree.structure(survived) == jax.tree.structure(params)


# --- numbers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_images_have_finite_logits_and_gradients(family, dtype):
    step, params = compiled(family, dtype)
    (value, (_, logits, _)), gradients = step(params, jnp.zeros((8, 32, 32, 3)))
    assert all_finite((value, logits, gradients))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float32(family):
    step, params = compiled(family, "float32")
    (_, (expected, _, _)), _ = step(params, noise(8, 32, 32, 3))
    (_, (found, logits, _)), _ = compiled(family, "bfloat16")[0](params, noise(8, 32, 32, 3))
    assert found.dtype == logits.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("name", ["pola_pvt_nano", "pola_swin_nano", "pola_pp_nano", "pola_sequence", *HEADS])
def test_abstract_models_are_what_nnx_traces(name):
    config = registry.segmenter_config("pola_pp_nano", head=name) if name in HEADS else registry.model_config(name)
    expected = nnx.eval_shape(lambda: registry.create(config, param_dtype="bfloat16", rngs=nnx.Rngs(0)))
    graph, found = split(registry.create_abstract(config, param_dtype="bfloat16"))
    expected_graph, expected = split(expected)
    assert graph == expected_graph
    assert found == expected and {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"bfloat16"}


def test_stores_parameters_in_the_type_asked_for(x64):
    for param_dtype in ("bfloat16", "float32", "float64"):
        params = split(abstract("swin", param_dtype=param_dtype))[1]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {param_dtype}


def test_float32_stays_float32_where_double_precision_is_on(x64):
    for family in FAMILIES:
        graphdef, params = split(build(family))
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        assert jax.eval_shape(lambda p, x, g=graphdef: nnx.merge(g, p)(x), params, images).dtype == jnp.float32
        jaxpr = str(jax.make_jaxpr(lambda p, x, g=graphdef: nnx.merge(g, p)(x))(params, images))
        assert "f64[2" not in jaxpr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_over_eight_devices_gives_the_same_logits(family):
    graphdef, params = split(build(family))
    images = noise(8, 32, 32, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
    call = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images), compiler_options=QUICK)
    found = call(jax.device_put(params, jax.NamedSharding(mesh, jax.P())), spread)
    assert len(found.sharding.device_set) == 8 and not found.sharding.is_fully_replicated
    expected = compiled(family, "float32")[0](params, images)[0][1][1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def sweep(count: int):
    """Random combinations of constructor arguments; what cannot be built is left out."""
    rng = np.random.default_rng(0)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    found = []
    while len(found) < count:
        common = {
            "img_size": 32 if len(found) % 4 < 2 else pick(64, 96),
            "num_classes": pick(0, 1, 3),
            "qkv_bias": pick(True, False),
            "depths": tuple(int(n) for n in rng.integers(1, 3, 4)),
            "alpha": pick(0, 0.5, 3, 4.0),
            "kernel_size": pick(1, 3, 5, 7),
            "drop_rate": pick(0.0, 0.1),
            "drop_path_rate": pick(0.0, 0.3),
        }
        if len(found) % 2:
            constructor, arguments = (
                pf.PolaSwin,
                {
                    "embed_dim": pick(8, 12),
                    "num_heads": tuple(pick(1, 2) for _ in range(4)),
                    "attn_type": "".join(pick("L", "S", "M") for _ in range(4)),
                    "window_size": pick(1, 2, 3, 4, 6, 8, 57),
                    "softmax_window_size": pick(None, 1, 2, 3, 7),
                    "mlp_ratio": pick(1, 2.5),
                    "ape": pick(True, False),
                    "patch_norm": pick(True, False),
                },
            )
            if "M" in arguments["attn_type"]:
                arguments["attn_type"] += pick("0", "1", "9")
        else:
            constructor, arguments = (
                pf.PolaPVT,
                {
                    "embed_dims": tuple(pick(4, 8, 12) for _ in range(4)),
                    "num_heads": tuple(pick(1, 2) for _ in range(4)),
                    "mlp_ratios": tuple(pick(1, 2.5) for _ in range(4)),
                    "attn_type": "".join(pick("L", "S") for _ in range(4)),
                    "sr_ratios": tuple(pick(1, 2, 3) for _ in range(4)),
                    "la_sr_ratios": "".join(pick("1", "2", "3") for _ in range(4)),
                },
            )
        try:
            constructor(**common, **arguments, rngs=AbstractKeys())
        except ValueError:
            continue
        found.append((constructor, {**common, **arguments}))
    return found


@pytest.mark.parametrize("count, compiled_ones", [(1, 0), pytest.param(24, 8, marks=pytest.mark.slow)])
def test_any_accepted_combination_trains(count, compiled_ones):
    """Shapes for all combinations, numbers for some of them: to compile one takes seconds."""
    for constructor, arguments in sweep(count):
        graphdef, params = split(constructor(**arguments, rngs=AbstractKeys()))
        size, classes = arguments["img_size"], arguments["num_classes"]

        def loss(params, images, graphdef=graphdef):
            logits = nnx.merge(graphdef, params)(images, train=True, rngs=nnx.Rngs(dropout=jax.random.key(0)))
            return jnp.mean(logits**2), logits

        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        (_, logits), gradients = jax.eval_shape(step, params, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
        assert logits.shape[0] == 2 and (not classes or logits.shape[1] == classes), arguments
        assert jax.tree.structure(gradients) == jax.tree.structure(params), arguments
        if size == 32 and compiled_ones:
            compiled_ones -= 1
            params = split(constructor(**arguments, rngs=nnx.Rngs(0)))[1]
            (_, logits), gradients = step(params, noise(2, size, size, 3))
            assert all_finite((logits, gradients)), arguments
    assert not compiled_ones


# --- windows


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_relative_position_index(window):
    index = window_attention.relative_position_index(window)
    places = list(itertools.product(range(window), repeat=2))
    for i, j in itertools.product(range(window**2), repeat=2):
        rows, columns = places[i][0] - places[j][0], places[i][1] - places[j][1]  # query minus key
        assert index[i, j] == (rows + window - 1) * (2 * window - 1) + columns + window - 1


@pytest.mark.parametrize("grid, window, shift", [(4, 2, 1), (6, 3, 1), (14, 7, 3), (12, 4, 2)])
def test_shift_mask_separates_what_is_not_adjacent(grid, window, shift):
    """Tokens of one window may see each other where the shift moved them by the same number of grids."""
    place = np.indices((grid, grid)).reshape(2, -1).T  # where each token stands after the shift
    wrapped = (place + shift) // grid  # how often each came around an edge, by row and column
    of_window = np.stack(np.split(place // window, 2, axis=1), axis=-1).reshape(-1, 2) @ [grid // window, 1]
    mask = Windows((grid, grid), window, (shift, shift)).apart
    for i in range((grid // window) ** 2):
        members = wrapped[of_window == i]
        np.testing.assert_array_equal(mask[i], (members[:, None] != members[None]).any(-1))


def test_windows_are_cut_and_joined():
    x = noise(2, 36, 5)
    windows = Windows((6, 6), 3)
    cut = windows.cut(x)
    np.testing.assert_array_equal(cut[1], x[0].reshape(6, 6, 5)[:3, 3:].reshape(9, 5))
    np.testing.assert_array_equal(windows.join(cut), x)
