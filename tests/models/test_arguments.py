"""What constructors, models and the registry refuse, and what they say about it."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.models.initializers import AbstractKeys
from tests.support.small_models import build


@pytest.mark.parametrize(
    "family, arguments, messages",
    [
        ("pvt", {"img_size": 100}, ["img_size=100: expected a multiple of 32, such as 96 or 128"]),
        ("swin", {"img_size": (32, 32)}, ["img_size=(32, 32): expected an integer"]),
        ("pvt", {"depths": (1, 1, 1)}, ["depths=(1, 1, 1): expected four values"]),
        ("swin", {"depths": (1, 0, 1, 1)}, ["depths[1]=0: expected an integer >= 1"]),
        ("pvt", {"num_heads": (3, 2, 2, 2)}, ["num_heads[0]=3 does not divide the 8 channels"]),
        ("pvt", {"num_heads": (8, 8, 12, 2)}, ["num_heads[0]=8 makes heads of 1 channels", "num_heads[2]=12"]),
        ("pvt", {"attn_type": "LLM1"}, ["attn_type='LLM1': expected one letter of L, S"]),
        ("pvt", {"attn_type": "LLLLL"}, ["attn_type='LLLLL'"]),
        ("swin", {"attn_type": "LMSL"}, ["attn_type='LMSL': a number after the four letters"]),
        ("swin", {"attn_type": "LLSL1"}, ["attn_type='LLSL1': a number after the four letters"]),
        ("swin", {"attn_type": "LLXL"}, ["attn_type='LLXL': expected one letter of L, S, M"]),
        ("pvt", {"la_sr_ratios": "3111"}, ["la_sr_ratios[0]=3 does not divide", "8x8", "choose one of 1, 2, 4, 8"]),
        ("pvt", {"la_sr_ratios": "01"}, ["la_sr_ratios='01': expected one digit"]),
        ("pvt", {"sr_ratios": (1, 3, 1, 1)}, ["sr_ratios[1]=3 does not divide"]),
        ("swin", {"alpha": -1}, ["alpha=-1: expected a number >= 0"]),
        ("swin", {"alpha": np.array([1.0, 2.0])}, ["alpha=array([1., 2.]): expected a number >= 0"]),
        ("swin", {"alpha": np.array([1.0])}, ["alpha=array([1.]): expected a number >= 0"]),
        ("swin", {"qkv_bias": "False"}, ["qkv_bias='False': expected True or False"]),
        ("swin", {"ape": None}, ["ape=None: expected True or False"]),
        ("pvt", {"qkv_bias": 1}, ["qkv_bias=1: expected True or False"]),
        ("swin", {"attn_type": "MMMM" + 5000 * "1"}, ["a number after the four letters"]),
        ("pvt", {"depth": 2, "heads": 3}, ["PolaPVT has no argument depth, heads; its arguments are img_size,"]),
        ("swin", {"kernel_size": 4}, ["kernel_size=4: expected an odd number, such as 3 or 5"]),
        ("pvt", {"drop_path_rate": 1.0}, ["drop_path_rate=1.0: expected a number in [0, 1)"]),
        ("pvt", {"dtype": "float16"}, ["dtype='float16': expected one of bfloat16, float32, float64"]),
        ("pvt", {"param_dtype": "float64"}, ["param_dtype=float64 needs jax.config.update('jax_enable_x64', True)"]),
        (
            "swin",
            {"num_classes": -1, "alpha": None, "embed_dim": 2.5},
            ["num_classes=-1", "alpha=None", "embed_dim=2.5"],
        ),
    ],
    ids=str,
)
def test_constructors_say_what_is_wrong(family, arguments, messages):
    with pytest.raises(ValueError) as error:
        build(family, **arguments)
    assert all(message in str(error.value) for message in messages), error.value


def test_an_image_size_that_the_windows_cannot_take_is_refused_with_what_fits():
    with pytest.raises(ValueError) as error:
        pf.create_model("pola_swin_t", img_size=128, rngs=nnx.Rngs(0))
    message = str(error.value)
    assert "stage 2 has 8x8 tokens and softmax_window_size=7" in message
    assert "32, 64, 96, 224, 448" in message
    offered = dict(way.split(" ", 1) for way in message.split("What would fit: ")[1].split("; or "))
    assert offered.keys() == {"img_size", "softmax_window_size"}
    for name, values in offered.items():
        for value in values.split(", "):
            arguments = {"img_size": 128, name: int(value)}
            pf.create_model("pola_swin_t", **arguments, rngs=AbstractKeys())


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 3, 32, 32), "float32"),
        ((2, 64, 64, 3), "float32"),
        ((32, 32, 3), "float32"),
        ((0, 32, 32, 3), "float32"),
        ((2, 32, 32, 3), "uint8"),
    ],
    ids=str,
)
def test_images_of_another_shape_or_type_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="images have (shape|type)"):
        build("pvt")(jnp.zeros(shape, dtype))


def test_names_of_models():
    assert pf.list_models() == sorted(
        [f"pola_pvt_{size}" for size in ("t", "s", "m", "b", "nano")]
        + [f"pola_swin_{size}" for size in ("t", "s", "b", "b_384", "nano")]
        + [f"pola_pp_{size}" for size in ("b0", "b1", "b2", "b3", "b4", "b5", "nano")]
        + ["pola_sequence"]
    )
    with pytest.raises(ValueError, match="unknown model 'pola_swin_tiny'. Did you mean .*pola_swin_t"):
        pf.create_model("pola_swin_tiny", rngs=nnx.Rngs(0))


def test_configs_of_models():
    config = registry.model_config("pola_swin_t", drop_path=0.4, kernel_size=3)
    assert config.drop_path_rate == 0.4 and config.kernel_size == 3
    assert config.alpha == 4 and config.window_size == 56 and config.depths == (2, 2, 6, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 3
    with pytest.raises(ValueError, match="PolaPVT has no argument window_size; its arguments are img_size"):
        registry.model_config("pola_pvt_t", window_size=7)
    with pytest.raises(ValueError, match="two names for one rate"):
        registry.model_config("pola_pvt_t", drop_path=0.1, drop_path_rate=0.1)


@pytest.mark.parametrize("name", pf.list_models())
def test_a_config_survives_json_and_knows_its_name(name):
    config = registry.model_config(name)
    again = type(config)(**json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    rate = {"drop_path_rate": 0.5} if hasattr(config, "drop_path_rate") else {"drop_rate": 0.5}
    assert registry.name_of(dataclasses.replace(again, num_classes=3, **rate)) == name


def test_a_config_does_not_depend_on_how_its_values_are_written():
    plain = pf.PolaSwinConfig(attn_type="LMSL1", depths=(2, 2, 6, 2), alpha=3.0, qkv_bias=False, window_size=7)
    other = pf.PolaSwinConfig(
        attn_type=np.str_("LMSL01"),
        depths=np.array([2, 2, 6, 2]),
        alpha=jnp.float32(3),
        qkv_bias=np.bool_(False),
        window_size=np.int64(7),
    )
    assert plain == other and hash(plain) == hash(other)
    assert json.dumps(plain.to_dict()) == json.dumps(other.to_dict())


def test_constructors_take_a_config_or_its_fields():
    config = dataclasses.replace(registry.model_config("pola_pvt_nano"), num_classes=3)
    model = pf.PolaPVT(config, rngs=AbstractKeys())
    assert model.config == config and model.head.out_features == 3
    with pytest.raises(TypeError, match="a config and alpha: give one of them"):
        pf.PolaPVT(config, alpha=3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="config is a PolaPVTConfig, expected a PolaSwinConfig"):
        pf.PolaSwin(config, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="config is a int, expected a PolaSequenceConfig; other arguments"):
        pf.PolaSequence(4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="PolaSwin has no argument sr_ratios; its arguments are img_size"):
        pf.PolaSwin(sr_ratios=(1, 1, 1, 1), rngs=nnx.Rngs(0))
