"""Entropies of attention rows against their definition, written out with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax.analysis.sequence_entropy import row_entropies
from polaformer_jax.models.pola_sequence import PolaSequence, Sequences

LENGTHS = np.array([9, 4], np.int32)


def model_of(attention, **options):
    model = PolaSequence(
        num_classes=4, vocabulary=20, max_length=12, attention=attention, dim=16, mlp_dim=16, param_dtype=jnp.float64,
        dtype=jnp.float64, rngs=nnx.Rngs(0), **options,
    )  # fmt: skip
    for name, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if name[-1] in ("power", "scale", "positional_encoding"):  # zeros at first
            param[...] = jax.random.normal(jax.random.key(len(name)), param.shape, param.dtype)
    return model


def measured(model, tokens, block=1):
    graphdef, params = nnx.split(model)
    found = row_entropies(graphdef, nnx.to_pure_dict(params), Sequences(tokens, LENGTHS), block=block)
    return {name: np.asarray(values) for name, values in found.items()}


def tokens_of(padded):
    return np.random.default_rng(0).integers(1, 20, (2, padded)).astype(np.int32)


def mean_entropy(rows):
    """Of the rows that are not zero throughout."""
    rows = [np.array([value / sum(row) for value in row if value > 0]) for row in rows if sum(row) > 0]
    return np.mean([-np.sum(row * np.log(row)) for row in rows]) if rows else np.nan


def by_definition(model, tokens, example, weight):
    """(h,) mean entropies where `weight(q, k)` is what a key vector gets from a query vector of one head."""
    n = LENGTHS[example]
    own = Sequences(tokens[example : example + 1, :n], LENGTHS[example : example + 1])
    x, _ = model.tokens_before(own, block=1)
    attn = model.blocks[1].attn
    projected = getattr(attn, "qkvg", None) or attn.qkv
    q, k = (
        np.asarray(part)[0]
        for part in jnp.split(projected(model.blocks[1].norm1(x)), 4 if hasattr(attn, "qkvg") else 3, -1)[:2]
    )
    if hasattr(attn, "qkvg"):
        k = k + np.asarray(attn.positional_encoding[0, :n])
        scale = np.log1p(np.exp(np.asarray(attn.scale[0, 0])))
        q, k = q / scale, k / scale
    return [
        mean_entropy([[weight(head, q[i, part], k[j, part]) for j in range(n)] for i in range(n)]) / np.log(n)
        for head, part in enumerate((slice(0, 8), slice(8, 16)))
    ]


@pytest.mark.parametrize("attention", ["relu", "softmax", "polarity"])
def test_equal_their_definition_whatever_the_padding(x64, attention):
    model = model_of(attention, **({"alpha": 3.0} if attention == "polarity" else {}))
    tokens = tokens_of(12)
    found = measured(model, tokens)

    def relu(head, q, k):
        return np.maximum(q, 0) @ np.maximum(k, 0)

    def softmax(head, q, k):
        return np.exp(q @ k / np.sqrt(8))

    def stream(power, sign):
        def weight(head, q, k):
            p = power[head]
            plus = np.sum(np.maximum(q, 0) ** p * np.maximum(sign * k, 0) ** p)
            return plus + np.sum(np.maximum(-q, 0) ** p * np.maximum(-sign * k, 0) ** p)

        return weight

    if attention == "polarity":
        power = 1 + 3.0 / (1 + np.exp(-np.asarray(model.blocks[1].attn.power[0, :, 0])))
        one = np.ones_like(power)
        wanted = {"same": stream(power, 1), "opposite": stream(power, -1)}
        wanted |= {"same, p = 1": stream(one, 1), "opposite, p = 1": stream(one, -1)}
    else:
        wanted = {attention: {"relu": relu, "softmax": softmax}[attention]}
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        for example in range(2):
            np.testing.assert_allclose(found[name][example], by_definition(model, tokens, example, weight), rtol=1e-9)
