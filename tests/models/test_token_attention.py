"""Baselines in the linear blocks of image models, with the same layers around them, and without the gate or the
convolution.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from polaformer_jax import create_model, export, load_weights, save_weights
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.models import registry
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.plain_attention import BaselineAttention
from polaformer_jax.weights import conversion, flatten
from tests.support.quick import QUICK
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
    found = jax.jit(lambda x: (attn(x), attn(x, mask=mask)))(x)
    np.testing.assert_allclose(found[0], naive(attn, x), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[1][1, :17], naive(attn, x, mask)[1, :17], rtol=1e-12, atol=1e-12)


def test_parts_that_are_left_out_are_those_of_the_equation(x64):
    """Without the gate the result is that of a gate of ones, without the convolution that of a kernel of zeros."""
    layers = {"grid": (4, 4), "projections": "qg_kv", **TYPES}
    full = perturbed(PolarityAttention(8, 2, **layers, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 16, 8), jnp.float64)
    state = nnx.to_pure_dict(nnx.state(full))

    plain = PolarityAttention(8, 2, **layers, gate=False, convolution=False, rngs=AbstractKeys())
    theirs = {name: state[name] for name in ("kv", "proj", "power", "scale", "positional_encoding")}
    theirs["q"] = jax.tree.map(lambda a: a[..., :8], state["qg"])
    nnx.update(plain, theirs)

    full.qg.kernel[...] = full.qg.kernel[...].at[:, 8:].set(0)
    full.qg.bias[...] = full.qg.bias[...].at[8:].set(1)
    full.dwc.kernel[...], full.dwc.bias[...] = (jnp.zeros_like(p[...]) for p in (full.dwc.kernel, full.dwc.bias))
    found, expected = jax.jit(lambda x: (plain(x), full(x)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


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
    field, value = next(iter(choice.items()))
    with pytest.raises(WeightsError, match=f"{field}={value}, and the model has"):
        load_weights(registry.create_abstract(registry.model_config(name, num_classes=3)), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["pola_pvt_nano", "pola_swin_nano"])
def test_softmax_is_not_loaded_as_relu(tmp_path, name):
    save_weights(create_model(name, attention="softmax", rngs=nnx.Rngs(0)), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="attention=softmax, and the model has relu"):
        load_weights(
            registry.create_abstract(registry.model_config(name, attention="relu")), tmp_path / "w.safetensors"
        )


def test_without_linear_blocks_their_attention_is_no_matter(tmp_path):
    softmax = {"attn_type": "SSSS", "num_classes": 3}
    save_weights(create_model("pola_pvt_nano", **softmax, rngs=nnx.Rngs(0)), tmp_path / "w.safetensors")
    model = create_model("pola_pvt_nano", **softmax, attention="relu", rngs=nnx.Rngs(1))
    load_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("choice", [{}, {"attention": "relu"}, {"gate": False}], ids=str)
def test_a_segmenter_keeps_the_attention_of_its_backbone(tmp_path, choice):
    config = registry.segmenter_config("pola_pvt_nano", head="semantic_fpn", num_classes=3, head_channels=8, **choice)
    save_weights(registry.create(config, rngs=nnx.Rngs(0)), tmp_path / "w.safetensors")
    assert create_model(weights=tmp_path / "w.safetensors").config == config
    assert conversion.convert(tmp_path / "w.safetensors", tmp_path / "copy.safetensors").config == config
    other = registry.change(config, attention="softmax", gate=True)
    with pytest.raises(WeightsError, match="and the model has"):
        load_weights(registry.create_abstract(other), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "choice, found",
    [
        ({"attention": "softmax"}, "softmax attention"),
        ({"gate": False, "convolution": False}, "no convolution, no gate"),
    ],
)
def test_what_the_authors_did_not_publish_has_no_official_layout(tmp_path, choice, found):
    model = create_model("pola_pvt_nano", **choice, rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match=f"a model with {found} has no official layout"):
        save_weights(model, tmp_path / "w.safetensors", layout="torch")
    assert not (tmp_path / "w.safetensors").exists()


def test_an_attention_that_a_file_does_not_state_is_named_in_a_warning(tmp_path, caplog):
    relu, softmax = (
        create_model("pola_pvt_nano", attention=kind, num_classes=3, rngs=nnx.Rngs(0)) for kind in ("relu", "softmax")
    )
    params = flatten(nnx.to_pure_dict(nnx.state(relu)))
    safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in params.items()}, tmp_path / "w.safetensors")
    load_weights(softmax, tmp_path / "w.safetensors")
    assert "does not specify the attention; the model's, softmax, is used" in caplog.text
    assert "alpha" not in caplog.text


@pytest.mark.parametrize("kind", ["relu", "softmax"])
def test_reduced_keys_on_another_grid(kind, x64):
    """Gradients equal finite differences; bfloat16 is within its rounding."""
    layers = {"grid": (4, 4), "projections": "qg_kv", "sr_ratio": 2}
    exact = perturbed(BaselineAttention(8, 2, kind=kind, **layers, **TYPES, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 48, 8), jnp.float64)

    step = 1e-6 * jax.random.normal(jax.random.key(2), x.shape, jnp.float64)
    narrow = BaselineAttention(8, 2, kind=kind, **layers, dtype=jnp.bfloat16, rngs=AbstractKeys())
    nnx.update(narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(exact)))

    def loss(x):
        return jnp.sum(jnp.sin(exact(x, grid=(6, 8))))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(x):
        slopes = jnp.sum(jax.grad(loss)(x) * step), (loss(x + step) - loss(x - step)) / 2
        return slopes, exact(x, grid=(6, 8)), narrow(x.astype(jnp.bfloat16), grid=(6, 8))

    (slope, difference), expected, found = run(x)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    assert found.dtype == jnp.bfloat16
    found = np.asarray(found, np.float64)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(found)


def test_what_has_no_effect_is_no_part_of_the_architecture():
    config = registry.model_config("pola_pvt_nano", attention="relu")
    assert config.architecture() == dataclasses.replace(config, alpha=1.0).architecture()
    assert config.architecture() != dataclasses.replace(config, gate=False).architecture()
    softmax = registry.model_config("pola_pvt_nano", attn_type="SSSS")
    assert softmax.architecture() == dataclasses.replace(softmax, attention="relu", gate=False).architecture()


def test_mlp_ratio_is_that_of_all_stages():
    with pytest.raises(UserError, match="mlp_ratio is mlp_ratios of all stages: give one of them"):
        registry.model_config("pola_pvt_nano", mlp_ratio=3.5, mlp_ratios=(1, 1, 1, 1))
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


@pytest.mark.parametrize("choice, found", [({"attention": "relu"}, "relu attention"), ({"gate": False}, "no gate")])
def test_what_onnx_does_not_take_is_refused(tmp_path, choice, found):
    model = create_model("pola_pvt_nano", **choice, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=f"a model with {found}, beside the convolution .* cannot be written as ONNX"):
        export.onnx(model, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
