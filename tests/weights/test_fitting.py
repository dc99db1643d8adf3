"""Weights for another image size or number of classes, changed as the official fine-tuning changes them."""

import jax
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.weights import fitting
from tests.support import small_models
from tests.support.golden_models import GOLDEN_FOLDER

GOLDEN = np.load(GOLDEN_FOLDER / "bicubic.npz")


@pytest.mark.parametrize("size", [12, 5])
def test_position_tables_are_resized_as_pytorch_does(size):
    table = GOLDEN["positional_encoding_7"][None].astype(np.float64)  # (1, 49, 8)
    resized = fitting.resize_table("block1.0.attn.positional_encoding", table, (1, size**2, 8))
    np.testing.assert_allclose(resized[0], GOLDEN[f"positional_encoding_{size}"], rtol=0, atol=1e-14)


def test_relative_position_tables_are_resized_as_pytorch_does():
    table = GOLDEN["relative_position_bias_7"].astype(np.float64)  # (13 * 13, 4)
    resized = fitting.resize_table("a.relative_position_bias_table", table, (23**2, 4))
    np.testing.assert_allclose(resized, GOLDEN["relative_position_bias_12"], rtol=0, atol=1e-14)


def test_float32_tables_stay_float32():
    table = GOLDEN["relative_position_bias_7"]
    resized = fitting.resize_table("a.relative_position_bias_table", table, (23**2, 4))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, GOLDEN["relative_position_bias_12"], rtol=0, atol=5e-7)


def test_absolute_positions_are_bicubic_and_those_of_pvt_bilinear():
    ramp = np.arange(4.0)[:, None] * np.ones(4)  # a slope down the image
    table = ramp.reshape(1, 16, 1)
    bilinear = fitting.resize_table("pos_embed1", table, (1, 64, 1)).reshape(8, 8)
    np.testing.assert_allclose(bilinear[:, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-12)
    bicubic = fitting.resize_table("absolute_pos_embed", table, (1, 64, 1)).reshape(8, 8)
    assert bicubic[0, 0] < 0 and bicubic[-1, 0] > 3  # a cubic kernel overshoots where the edge repeats


@pytest.mark.parametrize(
    "name, shape, wanted",
    [
        ("head.kernel", (16, 3), (36, 3)),
        ("block1.0.attn.positional_encoding", (1, 16, 8), (1, 36, 4)),  # other channels
        ("block1.0.attn.positional_encoding", (1, 15, 8), (1, 36, 8)),  # no square
        ("block1.0.attn.positional_encoding", (16, 8), (1, 36, 8)),
        ("block1.0.attn.power", (1, 16, 8), (1, 36, 8)),
    ],
)
def test_nothing_else_is_resized(name, shape, wanted):
    assert fitting.resize_table(name, np.ones(shape), wanted) is None


@pytest.mark.parametrize("family, changes", [("pvt", {"img_size": 64}), ("swin", {"img_size": 64, "window_size": 8})])
def test_models_take_weights_of_another_image_size(family, changes, tmp_path):
    weights.save_weights(small_models.build(family), tmp_path / "a.safetensors")
    model = small_models.build(family, **changes)
    with pytest.raises(weights.WeightsError, match="of another shape"):
        weights.load_weights(model, tmp_path / "a.safetensors")
    reported = weights.load_weights(model, tmp_path / "a.safetensors", fit=["tables"])
    leaves = {change.name.rsplit(".", 1)[-1] for change in reported}
    assert "positional_encoding" in leaves
    assert leaves & {"pos_embed1", "absolute_pos_embed"}
    saved, loaded = (weights.flatten(nnx.to_pure_dict(nnx.state(m))) for m in (small_models.build(family), model))
    for name in saved.keys() - {change.name for change in reported}:
        np.testing.assert_array_equal(saved[name], loaded[name])
    assert jax.eval_shape(model, small_models.noise(1, 64, 64, 3)).shape == (1, 5)


def test_a_classifier_for_other_classes_starts_from_zeros_and_only_where_allowed():
    source = weights.to_torch(small_models.build("pvt"))
    model = small_models.build("pvt", num_classes=9)
    with pytest.raises(weights.WeightsError, match=r"head.weight \(5, 16\), expected \(9, 16\)"):
        weights.load_weights(model, source, fit=["tables"])
    (change,) = weights.load_weights(model, source, fit=["classifier"])
    assert str(change) == "head: 5 classes: replaced by zeros for 9 classes"
    assert not model.head.kernel[...].any() and not model.head.bias[...].any()
    np.testing.assert_array_equal(model.block1[0].attn.qg.kernel[...], source["block1.0.attn.qg.weight"].T)


def test_classifiers_come_and_go():
    bare = small_models.build("pvt", num_classes=0)
    (change,) = weights.load_weights(bare, weights.to_torch(small_models.build("pvt")), fit=["classifier"])
    assert "omitted" in str(change)
    model = small_models.build("pvt")
    (change,) = weights.load_weights(model, weights.to_torch(bare), fit=["classifier"])
    assert str(change) == "head: no classifier: replaced by zeros for 5 classes"


def test_what_fits_is_not_changed():
    source = weights.to_torch(small_models.build("swin"))
    assert weights.load_weights(small_models.build("swin"), source, fit=["tables", "classifier"]) == []


def test_unknown_kinds_of_fitting_are_refused():
    with pytest.raises(ValueError, match="fit holds 'heads', expected some of 'tables', 'classifier'"):
        weights.load_weights(small_models.build("pvt"), {}, fit=["heads"])


def test_changes_are_summed_up():
    changes = [weights.Change(f"block1.{i}.attn.positional_encoding", "resized") for i in range(3)]
    assert weights.summary([*changes, weights.Change("head", "replaced")]) == [
        "3 x positional_encoding: resized",
        "head: replaced",
    ]


def test_swin_says_which_windows_an_image_size_can_have():
    with pytest.raises(ValueError) as error:
        pf.create_model("pola_swin_t", img_size=288, rngs=nnx.Rngs(0))
    assert "img_size 32, 64, 96, 224, 448, 896" in str(error.value)
    assert "window_size 2, 3, 4, 6, 9, 12, 18, 36, 72" in str(error.value)
    assert "softmax_window_size 3, 9, 18" in str(error.value)
