"""The sequence model: exact masks, pairs, three kinds of attention with all else equal, and files of its weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.analysis import augmentation
from polaformer_jax.config import ATTENTIONS
from polaformer_jax.errors import UserError
from polaformer_jax.inference.images import evaluation_transform
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.plain_attention import relu_attention
from polaformer_jax.models.pola_sequence import Sequences
from polaformer_jax.weights.conversion import convert_all
from tests.support.quick import QUICK
from tests.support.recipes import recipe
from tests.support.small_models import all_finite, split

SMALL = {"num_classes": 3, "vocabulary": 11, "max_length": 24, "dim": 8, "depth": 1, "mlp_dim": 12, "head_dim": 10}


def build(attention="polarity", **changes):
    return pf.create_model("pola_sequence", **{**SMALL, "attention": attention, **changes}, rngs=nnx.Rngs(0))


def call(model, given, *, dropout=None):
    """The model's logits, compiled in a moment; in training, with the seed `dropout`, where that is given."""
    graphdef, params = split(model)

    def logits(params, given):
        rngs = None if dropout is None else nnx.Rngs(dropout=dropout)
        return nnx.merge(graphdef, params)(given, train=dropout is not None, rngs=rngs)

    return jax.jit(logits, compiler_options=QUICK)(params, given)


def sequences(*shape, lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 11, shape)
    return Sequences(jnp.asarray(tokens), jnp.asarray(lengths))


def padded(given, count):
    """As many tokens more, of any kind."""
    more = np.random.default_rng(9).integers(0, 11, (*given.tokens.shape[:-1], count))
    return Sequences(jnp.concatenate([given.tokens, more], axis=-1), given.length)


@pytest.mark.parametrize(
    "attention, texts", [("polarity", 1), ("softmax", 2), pytest.param("relu", 2, marks=pytest.mark.slow)]
)
def test_padding_to_any_length_changes_nothing(attention, texts, x64):
    model = build(attention, texts=texts, depth=2, dtype=jnp.float64, param_dtype=jnp.float64)
    for block in model.blocks:  # zeros at first, which would hide a mistake
        if attention == "polarity":
            table = block.attn.positional_encoding
            table[...] = jax.random.normal(jax.random.key(1), table.shape)
    graphdef, params = split(model)
    given = sequences(3, 9, lengths=[9, 4, 1]) if texts == 1 else sequences(2, 2, 9, lengths=[[9, 2], [3, 5]])

    def total(params, given):
        logits = nnx.merge(graphdef, params)(given)
        return jnp.sum(jnp.sin(logits)), logits

    run = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)
    (_, logits), slopes = run(params, given)
    (_, longer), longer_slopes = run(params, padded(given, 15))
    np.testing.assert_allclose(longer, logits, rtol=1e-10, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), longer_slopes, slopes)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_examples_do_not_touch_each_other(attention):
    model = build(attention)
    given = sequences(2, 9, lengths=[9, 4])
    alone = call(model, Sequences(given.tokens[1:], given.length[1:]))
    np.testing.assert_allclose(call(model, given)[1], alone[0], rtol=1e-4, atol=1e-5)


def test_the_models_differ_in_the_attention_alone():
    shapes = {a: {k: v.shape for k, v in weights.flatten(split(build(a))[1]).items()} for a in ATTENTIONS}
    others = {a: {k: v for k, v in found.items() if ".attn." not in k} for a, found in shapes.items()}
    assert others["polarity"] == others["softmax"] == others["relu"]
    assert shapes["softmax"] == shapes["relu"]
    assert shapes["polarity"].keys() - shapes["relu"].keys() == {
        f"blocks.{i}.attn.{name}"
        for i in range(1)
        for name in (
            "qkvg.kernel", "qkvg.bias", "power", "scale", "positional_encoding", "dwc.kernel", "dwc.bias",
        )
    }  # fmt: skip


def test_the_sizes_of_the_long_range_arena_are_the_defaults():
    model = pf.create_model("pola_sequence", rngs=AbstractKeys())
    shapes = {name: leaf.shape for name, leaf in weights.flatten(split(model)[1]).items()}
    assert shapes["token_embed"] == (512, 64) and shapes["pos_embed"] == (1, 4096, 64)
    assert shapes["blocks.1.attn.qkvg.kernel"] == (64, 256) and shapes["blocks.1.attn.power"] == (1, 2, 1, 32)
    assert shapes["blocks.1.mlp.fc1.kernel"] == (64, 128)
    assert shapes["head.fc1.kernel"] == (64, 128) and shapes["head.fc2.kernel"] == (128, 10)
    assert "blocks.2.norm1.scale" not in shapes
    arguments = model.config.to_dict()
    assert arguments["drop_rate"] == 0.1 and arguments["alpha"] == 3 and arguments["kernel_size"] == 5


def test_relu_attention_equals_its_definition(x64):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 6, 2, 4))
    mask = np.array([[True, True, False, True, True, False]])
    found = relu_attention(*(jnp.asarray(a) for a in (q, k, v)), mask=jnp.asarray(mask))
    for head in range(2):
        scores = np.maximum(q[0, :, head], 0) @ np.maximum(k[0, mask[0], head], 0).T / mask.sum()
        expected = scores @ v[0, mask[0], head] / (scores.sum(1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(found[0, :, head], expected, rtol=1e-10, atol=1e-12)


def test_softmax_attention_equals_its_definition(x64):
    model = build("softmax", dtype=jnp.float64, param_dtype=jnp.float64)
    attn, x = model.blocks[0].attn, jax.random.normal(jax.random.key(0), (1, 6, 8))
    mask = np.array([[True, True, True, True, False, False]])
    q, k, v = (np.asarray(a).reshape(6, 2, 4) for a in jnp.split(attn.qkv(x)[0], 3, axis=-1))
    out = np.empty((6, 2, 4))
    for head in range(2):
        scores = np.exp(q[:, head] @ k[mask[0], head].T / 2)
        out[:, head] = scores / scores.sum(1, keepdims=True) @ v[mask[0], head]
    np.testing.assert_allclose(attn(x, mask=mask)[0], attn.proj(jnp.asarray(out.reshape(6, 8))), rtol=1e-10, atol=1e-12)


def test_a_pair_is_encoded_alike_and_compared():
    model = build("relu", texts=2, num_classes=2)
    given = sequences(1, 2, 9, lengths=[[9, 5]])
    single = build("relu")
    nnx.update(single, {k: v for k, v in nnx.to_pure_dict(nnx.state(model)).items() if k != "head"})
    pool = jax.jit(single.pooled, compiler_options=QUICK)
    a, b = (pool(Sequences(given.tokens[:, i], given.length[:, i]))[0, 0] for i in range(2))
    expected = model.head(jnp.concatenate([a, b, a * b, a - b]).reshape(1, -1))
    np.testing.assert_allclose(call(model, given), expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_tokens_counts():
    model, given = build("relu"), sequences(1, 9, lengths=[9])
    assert jnp.abs(call(model, given) - call(model, Sequences(given.tokens[:, ::-1], given.length))).max() > 1e-4


def test_dropout_acts_in_training_alone_and_needs_random_numbers():
    model, given = build("relu"), sequences(2, 9, lengths=[9, 4])
    one, other = (call(model, given, dropout=seed) for seed in (0, 1))
    assert jnp.abs(one - other).max() > 1e-4
    with pytest.raises(ValueError, match="train=True with drop_rate=0.1 draws random numbers, and rngs is None"):
        model(given, train=True)
    model = build("relu", drop_rate=0.0)
    np.testing.assert_array_equal(call(model, given, dropout=0), call(model, given))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_is_close_and_finite_without_tokens(attention):
    given = sequences(3, 9, lengths=[9, 4, 0])
    expected, model = call(build(attention), given), build(attention, dtype=jnp.bfloat16)
    found = call(model, given)
    assert found.dtype == jnp.float32
    assert jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)
    graphdef, params = split(model)
    slope = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(given))), compiler_options=QUICK)
    slopes = slope(params)
    assert all_finite(slopes)


def test_rematerialised_blocks_give_the_same_gradients():
    given, found = sequences(2, 9, lengths=[9, 4]), []
    for remat in (False, True):
        model = build("relu")
        model.remat = remat
        graphdef, params = split(model)

        def total(params, graphdef=graphdef):
            return jnp.sum(nnx.merge(graphdef, params)(given, train=True, rngs=nnx.Rngs(dropout=1)))

        found.append(jax.jit(jax.grad(total), compiler_options=QUICK)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


@pytest.mark.parametrize(
    "tokens, lengths, message",
    [
        ((2, 25), (2,), "25 tokens long, expected at most 24"),
        ((2, 9), (2, 1), r"have shapes \(2, 9\) and \(2, 1\), expected \(batch, tokens\) and \(batch,\)"),
        ((2, 2, 9), (2, 2), r"expected \(batch, tokens\)"),
        ((0, 9), (0,), "expected at least one sequence"),
    ],
)
def test_what_the_model_cannot_take(tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        build()(Sequences(jnp.ones(tokens, jnp.int32), jnp.ones(lengths, jnp.int32)))
    with pytest.raises(ValueError, match="tokens have type float32, expected integers"):
        build()(Sequences(jnp.ones((1, 9)), jnp.ones(1, jnp.int32)))


def test_all_that_cannot_be_built_is_said_at_once():
    with pytest.raises(UserError) as error:
        build("linear", texts=3, num_heads=3, drop_rate=1.0, kernel_size=4, vocabulary=0)
    for part in ("attention='linear'", "texts=3", "num_heads=3", "drop_rate=1.0", "kernel_size=4", "vocabulary=0"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="PolaSequence has no argument img_size; its arguments are num_classes"):
        build(img_size=224)


# --- files of weights


@pytest.fixture
def saved(tmp_path):
    model = build("relu", num_heads=4)
    pf.save_weights(model, tmp_path / "a.safetensors")
    return model, tmp_path / "a.safetensors"


def test_a_file_knows_its_model(saved):
    model, path = saved
    again = pf.create_model(weights=path)
    assert again.config.to_dict() == {**model.config.to_dict()}
    assert weights.read_file(path).metadata["model"] == "PolaSequence"
    given = sequences(2, 9, lengths=[9, 4])
    np.testing.assert_array_equal(again(given), model(given))


def test_a_file_whose_tensors_are_of_another_depth_is_refused(saved):
    file = weights.read_file(saved[1])
    for depth in (2, 10**12):
        arguments = json.dumps({**json.loads(file.metadata["arguments"]), "depth": depth})
        changed = dataclasses.replace(file, metadata={**file.metadata, "arguments": arguments})
        with pytest.raises(weights.WeightsError, match=f"it has 1 blocks, and names a model of {depth}"):
            pf.create_model(weights=changed)


def test_the_registry_names_the_model_of_the_arena():
    model = pf.create_model("pola_sequence", num_classes=2, texts=2, rngs=AbstractKeys())
    described = weights.model_metadata(model)
    assert described["model"] == "pola_sequence" and json.loads(described["arguments"])["texts"] == 2


@pytest.mark.parametrize(
    "attention, changes, message",
    [
        ("softmax", {}, "attention=relu, and the model has softmax"),
        ("relu", {"num_heads": 2}, "num_heads=4, and the model has 2"),
        ("relu", {"max_length": 48}, r"pos_embed \(1, 24, 8\), expected \(1, 48, 8\)"),
        ("polarity", {"num_heads": 4}, "attention=relu, and the model has polarity"),
    ],
)
def test_weights_of_another_function_are_refused(saved, attention, changes, message):
    with pytest.raises(weights.WeightsError, match=message):
        pf.load_weights(build(attention, **{"num_heads": 4, **changes}), saved[1])


def test_another_alpha_is_refused(tmp_path):
    pf.save_weights(build(alpha=3.0), tmp_path / "a.safetensors")
    with pytest.raises(weights.WeightsError, match="alpha=3, and the model has 5:"):
        pf.load_weights(build(alpha=5.0), tmp_path / "a.safetensors")


def test_there_is_no_official_layout(saved, tmp_path):
    with pytest.raises(weights.WeightsError, match="a PolaSequence has no official layout"):
        pf.save_weights(saved[0], tmp_path / "b.safetensors", layout="torch")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("texts", [1, 2])
def test_a_file_is_converted_and_run_as_those_of_images_are(tmp_path, texts, capsys):
    source, target = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    model = build(texts=texts)
    pf.save_weights(model, source)
    options = {"out": target, "out_dir": None, "overwrite": False}
    assert convert_all([source], **options) == []
    assert f"model      PolaSequence, {model.config.max_length} tokens, " in capsys.readouterr().out
    assert pf.create_model(weights=target).config == model.config
    assert weights.read_file(target).tensors.keys() == weights.read_file(source).tensors.keys()
    reference = {"images": np.zeros((1, 3, 32, 32), np.float32), "logits": np.zeros((1, 4), np.float32)}
    assert convert_all([source], **{**options, "overwrite": True}, reference=reference) == [source]
    assert "holds a sequence model; a reference has images" in capsys.readouterr().err


def test_what_is_for_images_refuses_it(saved):
    with pytest.raises(UserError, match="PolaSequence, which does not take images"):
        evaluation_transform(saved[0])
    with pytest.raises(
        UserError, match="the model is a PolaSequence, expected an image model: maps are drawn over images"
    ):
        pf.attention_maps(saved[0], np.zeros((1, 32, 32, 3), np.float32), stage=0, block=0)
    with pytest.raises(UserError, match="task.name='listops': the preview draws the augmentation of image class"):
        augmentation.preview(recipe("lra", "listops"))
