"""Baselines in the linear blocks of image models, with the same layers around them, and without the gate or the
convolution.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax import create_model, load_weights, save_weights
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.models import registry
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.plain_attention import BaselineAttention
from tests.support.small_models import perturbed

TYPES = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def naive(attn, x, mask=None):
    """(B, N, C) -> (B, N, C) by loops over heads and explicit N x n weights, in NumPy; grid (4, 6), no reduction."""
    q, k, v, g = (None if part is None else np.asarray(part) for part in attn.project(x))
    k = k + np.asarray(attn.positional_encoding[...])
    batch, tokens, channels = q.shape
    valid = np.ones((batch, tokens), bool) if mask is None else np.asarray(mask)
    width, o = channels // attn.num_heads, np.zeros_like(q)
    for b in range(batch):
        for h in range(attn.num_heads):
            own = slice(h * width, (h + 1) * width)
            if attn.kind == "softmax":
                weights = np.exp(q[b, :, own] @ k[b, :, own].T / np.sqrt(width)) * valid[b]
                weights /= weights.sum(1, keepdims=True)
            else:
                weights = np.maximum(q[b, :, own], 0) @ np.maximum(k[b, :, own], 0).T * valid[b] / valid[b].sum()
                weights /= weights.sum(1, keepdims=True) + 1e-6
            o[b, :, own] = weights @ v[b, :, own]
    if attn.dwc is not None:
        kernel, bias = np.asarray(attn.dwc.kernel[...]), np.asarray(attn.dwc.bias[...])
        padded = np.pad((v * valid[:, :, None]).reshape(batch, 4, 6, channels), ((0, 0), (2, 2), (2, 2), (0, 0)))
        for row in range(4):
            for column in range(6):
                seen = padded[:, row : row + 5, column : column + 5]
                o[:, row * 6 + column] += (seen * np.tile(kernel[:, :, 0], attn.num_heads)).sum((1, 2))
        o += np.tile(bias, attn.num_heads)
    o = o if g is None else o * g
    return o @ np.asarray(attn.proj.kernel[...]) + np.asarray(attn.proj.bias[...])


def baseline(kind, **parts):
    layers = {"grid": (4, 6), "projections": "qkvg", **parts}
    return perturbed(BaselineAttention(8, 2, kind=kind, **layers, **TYPES, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("parts", [{}, {"gate": False}, {"convolution": False}, {"gate": False, "convolution": False}])
@pytest.mark.parametrize("kind", ["relu", "softmax"])
def test_baseline_equals_explicit_weights(kind, parts, x64):
    attn = baseline(kind, **parts)
    x = jax.random.normal(jax.random.key(1), (2, 24, 8), jnp.float64)
    mask = jnp.arange(24)[None] < jnp.asarray([[24], [17]])
    np.testing.assert_allclose(attn(x), naive(attn, x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(attn(x, mask=mask)[1, :17], naive(attn, x, mask)[1, :17], rtol=1e-12, atol=1e-12)


def test_parts_that_are_left_out_are_those_of_the_equation(x64):
    """Without the gate the result is that of a gate of ones, without the convolution that of a kernel of zeros."""
    layers = {"grid": (4, 4), "projections": "qg_kv", **TYPES}
    full = perturbed(PolarityAttention(8, 2, **layers, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 16, 8), jnp.float64)
    state = nnx.to_pure_dict(nnx.state(full))

    plain = PolarityAttention(8, 2, **layers, gate=False, convolution=False, rngs=nnx.Rngs(0))
    theirs = {name: state[name] for name in ("kv", "proj", "power", "scale", "positional_encoding")}
    theirs["q"] = jax.tree.map(lambda a: a[..., :8], state["qg"])
    nnx.update(plain, theirs)

    full.qg.kernel[...] = full.qg.kernel[...].at[:, 8:].set(0)
    full.qg.bias[...] = full.qg.bias[...].at[8:].set(1)
    full.dwc.kernel[...], full.dwc.bias[...] = (jnp.zeros_like(p[...]) for p in (full.dwc.kernel, full.dwc.bias))
    np.testing.assert_allclose(plain(x), full(x), rtol=1e-12, atol=1e-12)


CHOICES = [
    {"attention": "relu"},
    {"attention": "softmax", "gate": False},
    {"attention": "relu", "gate": False, "convolution": False},
    {"gate": False},
    {"convolution": False},
]


@pytest.mark.parametrize("name", ["pola_pvt_nano", "pola_swin_nano"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_file_of_weights_says_which_attention_it_holds(tmp_path, name, choice):
    model = create_model(name, num_classes=3, **choice, rngs=nnx.Rngs(0))
    save_weights(model, tmp_path / "w.safetensors")
    loaded = create_model(weights=tmp_path / "w.safetensors")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.head.kernel[...], model.head.kernel[...])
    with pytest.raises(WeightsError):
        load_weights(create_model(name, num_classes=3, rngs=nnx.Rngs(0)), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["pola_pvt_nano", "pola_swin_nano"])
def test_softmax_is_not_loaded_as_relu(tmp_path, name):
    save_weights(create_model(name, attention="softmax", rngs=nnx.Rngs(0)), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="attention=softmax, and the model has relu"):
        load_weights(create_model(name, attention="relu", rngs=nnx.Rngs(0)), tmp_path / "w.safetensors")


def test_what_has_no_effect_is_no_part_of_the_architecture():
    config = registry.model_config("pola_pvt_nano", attention="relu")
    assert config.architecture() == dataclasses.replace(config, alpha=1.0).architecture()
    assert config.architecture() != dataclasses.replace(config, gate=False).architecture()
    softmax = registry.model_config("pola_pvt_nano", attn_type="SSSS")
    assert softmax.architecture() == dataclasses.replace(softmax, attention="relu", gate=False).architecture()


def test_mlp_ratio_is_that_of_all_stages():
    pvt, swin = (registry.model_config(f"pola_{name}_nano", mlp_ratio=3.5) for name in ("pvt", "swin"))
    assert pvt.mlp_ratios == (3.5,) * 4 and swin.mlp_ratio == 3.5


def test_odd_heads_are_allowed_without_streams():
    arguments = {"embed_dims": (6, 6, 12, 12), "num_heads": (2, 2, 4, 4)}
    assert registry.model_config("pola_pvt_nano", attention="softmax", **arguments).embed_dims[0] == 6
    with pytest.raises(UserError, match="even width"):
        registry.model_config("pola_pvt_nano", **arguments)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"attention": "linear"}, "attention='linear': expected one of polarity, softmax, relu"),
        ({"gate": 1}, "gate=1: expected True or False"),
        ({"convolution": None}, "convolution=None: expected True or False"),
    ],
)
def test_a_wrong_choice_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        registry.model_config("pola_swin_nano", **wrong)
