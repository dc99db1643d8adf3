"""Official checkpoints of PolaFormer++: recognised, loaded strictly, given back, and their moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.weights import conversion
from tests.support.golden_pp import FULL, SMALL, official_tensors
from tests.support.small_models import perturbed
from tests.support.small_models import tiny_pp as tiny
from tests.support.torch_files import write_pth


def state_of(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, state_of(one), state_of(other))


@pytest.fixture(scope="module")
def model():
    return perturbed(tiny())


@pytest.mark.parametrize("ema", [False, True])
def test_both_weights_of_a_checkpoint(model, ema, tmp_path):
    last = weights.to_torch(model)
    average = {name: np.asarray(array + array.dtype.type(1)) for name, array in last.items()}
    path = write_pth(tmp_path / "a.pth", {"model": last, "state_dict_ema": average, "epoch": 299})
    file = weights.read_file(path, ema=ema)
    assert file.facts == {"epoch": 299}
    found = pf.create_model(weights=file)
    expected = jax.tree.map(lambda leaf: leaf + 1, state_of(model)) if ema else state_of(model)
    jax.tree.map(np.testing.assert_array_equal, state_of(found), expected)
    # heads of softmax stages show in the angles; the image size and drop rates nowhere
    assert found.config.architecture() == model.config.architecture()


@pytest.mark.slow
def test_the_converter_takes_the_moving_average(model, tmp_path):
    path = write_pth(tmp_path / "a.pth", {"model": weights.to_torch(tiny()), "state_dict_ema": weights.to_torch(model)})
    done = conversion.convert(path, tmp_path / "a.safetensors", ema=True)
    assert "alpha" not in done.table() and set(name.rsplit(".")[-1] for name in done.ignored) == {
        "angle", "num_batches_tracked",
    }  # fmt: skip
    assert_same(pf.create_model(weights=tmp_path / "a.safetensors"), model)
    statistics = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat)))
    assert statistics and done.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) - statistics
    with pytest.raises(weights.WeightsError, match="is a .safetensors file, which has no second weights"):
        weights.read_file(tmp_path / "a.safetensors", ema=True)
    alone = write_pth(tmp_path / "b.pth", {"model": weights.to_torch(model)})
    with pytest.raises(weights.WeightsError, match="has no moving average"):
        weights.read_file(alone, ema=True)


@pytest.mark.parametrize("layout", ["ours", "torch"])
def test_what_is_saved_is_loaded_bit_for_bit(model, layout, tmp_path):
    pf.save_weights(model, tmp_path / "a.safetensors", layout=layout)
    assert_same(pf.create_model(weights=tmp_path / "a.safetensors"), model)


@pytest.mark.parametrize("name", FULL)
def test_official_names_and_shapes_are_complete(name):
    found = pf.create_model(name, rngs=AbstractKeys())
    flat = weights.flatten(state_of(found))
    assert {
        weights.rules.official_name(path, leaf.ndim): list(weights.rules.official_shape(path, leaf.shape))
        for path, leaf in flat.items()
    } == FULL[name]["shapes"]


def test_heads_that_nothing_shows_are_those_of_the_published_model():
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in FULL["pola_pp_b3"]["shapes"].items()}
    file = weights.WeightsFile("a", "torch", tensors, {}, {})
    config, assumed = weights.identify(file)
    assert config.num_heads == (1, 2, 5, 8)
    assert assumed == ["num_heads of stage 3, 4: as in pola_pp_b3, which has these channels and depths"]


def test_heads_that_nothing_shows_at_all_are_asked_for():
    tensors = official_tensors(SMALL["pp_llvv"]["shapes"])
    with pytest.raises(weights.WeightsError, match="nothing shows the heads of stage 3"):
        weights.identify(weights.WeightsFile("a", "torch", tensors, {}, {}))


def test_strictly(model):
    tensors = weights.to_torch(model)
    for change, message in (
        ({"norm.running_var": None}, "1 missing: norm.running_var"),
        ({"layers.0.blocks.0.extra": np.zeros(3, np.float32)}, "1 unexpected: layers.0.blocks.0.extra"),
        ({"norm.running_mean": np.full(8, np.nan, np.float32)}, "not finite .*: norm.running_mean"),
        ({"head.weight": np.zeros((3, 9, 1, 1), np.float32)}, r"head.weight \(3, 9, 1, 1\), expected \(3, 8, 1, 1\)"),
    ):
        changed = {name: array for name, array in {**tensors, **change}.items() if array is not None}
        with pytest.raises(weights.WeightsError, match=message):
            pf.load_weights(tiny(), changed)


def test_other_classes_and_none(model, tmp_path):
    pf.save_weights(model, tmp_path / "a.safetensors")
    other = pf.create_model(weights=tmp_path / "a.safetensors", num_classes=7)
    assert not other.head.kernel[...].any() and other.head.kernel.shape == (1, 1, 8, 7)
    np.testing.assert_array_equal(other.proj.kernel[...], model.proj.kernel[...])
    none = pf.create_model(weights=tmp_path / "a.safetensors", num_classes=0)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert none.head is None and jax.eval_shape(lambda m, x: m(x), none, images).shape == (1, 8)
