"""Weights in and out: official names and layouts, our own files, and one error for all that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.weights import rules
from tests.support.golden_models import FULL, SMALL, official_tensors
from tests.support.tiny_weights import assert_same, official, pure, tiny

ENTRIES = {**SMALL, **FULL}


# --- names and layouts


@pytest.mark.parametrize("name", FULL)
def test_official_names_and_shapes(name):
    """Every tensor of the official models has exactly one place in ours, and the other way round."""
    params = pure(pf.create_model(name, rngs=AbstractKeys()))
    flat = weights.flatten(params)
    found = {
        rules.official_name(path, leaf.ndim): rules.official_shape(path, leaf.shape) for path, leaf in flat.items()
    }
    ignored = rules.UNUSED if "pvt" in name else ()
    expected = {
        path: tuple(shape)
        for path, shape in FULL[name]["shapes"].items()
        if path not in ignored and path.rsplit(".", 1)[-1] not in rules.BUFFERS
    }
    assert found == expected
    assert {rules.our_name(path, len(shape)) for path, shape in expected.items()} == set(flat)


@pytest.mark.parametrize(
    "ours, shape, theirs, official_shape",
    [
        ("block1.0.attn.qg.kernel", (4, 8), "block1.0.attn.qg.weight", (8, 4)),
        ("patch_embed1.proj.kernel", (4, 5, 3, 8), "patch_embed1.proj.weight", (8, 3, 4, 5)),
        ("layers.0.blocks.1.norm2.scale", (8,), "layers.0.blocks.1.norm2.weight", (8,)),
        ("norm.scale", (8,), "norm.weight", (8,)),
        ("norm.bias", (8,), "norm.bias", (8,)),
        ("block1.0.attn.scale", (1, 1, 8), "block1.0.attn.scale", (1, 1, 8)),
        ("block1.0.attn.norm.scale", (8,), "block1.0.attn.norm.weight", (8,)),
        ("pos_embed1", (1, 64, 8), "pos_embed1", (1, 64, 8)),
    ],
)
def test_rules(ours, shape, theirs, official_shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    assert rules.official_name(ours, len(shape)) == theirs
    assert rules.our_name(theirs, len(shape)) == ours
    assert rules.official_shape(ours, shape) == official_shape == rules.to_official(ours, array).shape
    np.testing.assert_array_equal(rules.from_official(ours, rules.to_official(ours, array)), array)


def test_flatten_joins_paths():
    tree = {"a": {0: {"kernel": 1}, 10: {"kernel": 2}}, "b": 3}
    assert weights.flatten(tree) == {"a.0.kernel": 1, "a.10.kernel": 2, "b": 3}


# --- official tensors


def test_loads_official_tensors_in_their_layout():
    model = tiny()
    source = official(tiny(seed=1))
    weights.load_weights(model, source)
    np.testing.assert_array_equal(model.head.kernel[...], source["head.weight"].T)
    kernel = source["block2.0.attn.dwc.weight"]
    np.testing.assert_array_equal(model.block2[0].attn.dwc.kernel[...][1, 2, 0, 3], kernel[3, 0, 1, 2])
    assert_same(pure(model), pure(tiny(seed=1)))


def test_passes_over_buffers_and_the_unused_norm():
    source = official(tiny(seed=1))
    extra = {
        "norm.weight": np.ones(8, np.float32),
        "norm.bias": np.zeros(8, np.float32),
        "layers.0.blocks.1.attn_mask": np.zeros((4, 9, 9), np.float32),
        "layers.0.blocks.0.attn.relative_position_index": np.zeros((9, 9), np.int64),
    }
    model = tiny()
    weights.load_weights(model, {**source, **extra})
    assert_same(pure(model), pure(tiny(seed=1)))


def test_the_final_norm_of_swin_is_a_weight():
    model = pf.create_model("pola_swin_t", rngs=AbstractKeys())
    source = official_tensors(FULL["pola_swin_t"]["shapes"])
    del source["norm.weight"]
    with pytest.raises(weights.WeightsError, match="1 missing: norm.weight"):
        weights.load_weights(model, source)


def test_casts_to_the_type_of_the_model():
    source = {name: array.astype(np.float64) for name, array in official(tiny(seed=1)).items()}
    for dtype in ("float32", "bfloat16"):
        model = tiny(param_dtype=dtype)
        weights.load_weights(model, source)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(pure(model))} == {dtype}
        np.testing.assert_array_equal(model.head.kernel[...], source["head.weight"].T.astype(jnp.dtype(dtype)))


def test_all_that_does_not_fit_is_reported_at_once_and_nothing_changes():
    model = tiny()
    before = pure(model)
    source = official(tiny(seed=1))
    del source["head.bias"], source["block1.0.attn.sr.weight"]
    source["head.weight"] = source["head.weight"][:2]
    source["pos_embed2"] = source["pos_embed2"].astype(np.int32)
    source["surplus"] = source["block4.0.attn.power"]
    with pytest.raises(weights.WeightsError) as error:
        weights.load_weights(model, source)
    lines = str(error.value).splitlines()[1:]
    assert sorted(lines) == sorted(
        [
            "  2 missing: block1.0.attn.sr.weight; head.bias",
            "  1 unexpected: surplus",
            "  1 of another shape (another image size, window or number of classes?): "
            "head.weight (2, 8), expected (3, 8)",
            "  1 of another type: pos_embed2 int32, expected a float type",
        ]
    )
    assert isinstance(error.value, UserError)
    assert_same(pure(model), before)


def test_long_lists_are_cut():
    with pytest.raises(weights.WeightsError, match=r"missing: .*, and \d+ more"):
        weights.load_weights(tiny(), {})


def test_pure_dicts_keep_structure_and_devices():
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    like = jax.device_put(pure(tiny()), sharding)
    loaded = weights.from_torch(official(tiny(seed=1)), like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(loaded))
    assert_same(loaded, pure(tiny(seed=1)))
