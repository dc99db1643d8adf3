"""Attention maps: the model's own weights, where they lie in the image, and how spread out they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.analysis import attention_maps as maps
from polaformer_jax.analysis.attention_maps import attention_maps, last_linear_block
from polaformer_jax.analysis.attention_rows import polarity_weights
from polaformer_jax.models.attention import polarity_attention
from polaformer_jax.models.signed_features import signed_features
from tests.models.test_attention import CASES, draw
from tests.support.small_models import abstract, build, noise, split

BATCH = 2


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Small models would have all their query tokens in one chunk."""
    monkeypatch.setattr(maps, "_ENTRIES", 300)


@functools.cache
def trained(family):
    """A float64 model none of whose tables is zero, and whose queries and keys are spread out."""
    model = build(family, dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(3)
    _, params = split(model)
    nnx.update(model, jax.tree.map(lambda a: jnp.asarray(a + rng.normal(0, 0.3, a.shape)), params))
    return model


def images():
    return np.random.default_rng(1).normal(size=(BATCH, 32, 32, 3))


def rows(model, *, stage, block=-1):
    """Of each stream the attention matrix (B, h, N, n) of all query tokens, from the maps of one after another."""
    side = 32 // 4 // 2**stage
    found = [
        attention_maps(model, images(), stage=stage, block=block, token=divmod(token, side)).streams
        for token in range(side**2)
    ]
    return {
        name: np.stack([one[name].weights.reshape(BATCH, one[name].weights.shape[1], -1) for one in found], axis=2)
        for name in found[0]
    }


def inside(model, *, stage, block):
    """The block, and the normalised tokens that its attention sees as one image (B, N, C)."""
    chosen = model.blocks(stage)[block]
    return chosen, chosen.norm1(model.tokens_before(images(), stage=stage, block=block))


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1)  # (B, N, h, d)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_weights_times_values_are_the_two_streams(case, x64):
    h, width, grid, ratio, kernel, alpha = case

    @jax.jit
    def both(arguments):
        alone = {name: 0 * arguments[name] for name in ("kernel", "bias")} | {"g": jnp.ones_like(arguments["g"])}
        tables = {name: arguments[name] for name in ("power", "scale", "positional_encoding")}
        same, opposite = polarity_weights(*signed_features(arguments["q"], arguments["k"], **tables, alpha=alpha))
        v1, v2 = jnp.split(heads(arguments["v"], h), 2, axis=-1)
        streams = [jnp.einsum("bhmn,bnhe->bmhe", a, v) for a, v in ((same, v1), (opposite, v2))]
        o = polarity_attention(**{**arguments, **alone}, grid=grid, alpha=alpha)
        return jnp.concatenate(streams, axis=-1).reshape(o.shape), o

    found, expected = both(draw(h, width, grid, ratio, kernel))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "family, stage, block",
    [
        pytest.param("pvt", 0, 0, marks=pytest.mark.slow),
        ("pvt", 2, 0),
        pytest.param("swin", 0, 1, marks=pytest.mark.slow),
    ],
    ids=["reduced keys", "all keys", "shifted windows"],
)
def test_maps_of_all_tokens_give_the_streams_of_the_block(family, stage, block, x64):
    model = trained(family)
    found = rows(model, stage=stage, block=block)

    @jax.jit
    def values_and_streams(model):
        chosen, x = inside(model, stage=stage, block=block)
        attn = chosen.attn
        cut = whole = lambda x: x
        if family == "swin":
            windows = chosen.windows((8 // 2**stage,) * 2)
            cut, whole = windows.cut, windows.join
        q, k, v, g = attn.project(cut(x))
        o = polarity_attention(
            q,
            k,
            v,
            jnp.ones_like(g),
            power=attn.power[...],
            scale=attn.scale[...],
            positional_encoding=attn.positional_encoding[...],
            kernel=0 * attn.dwc.kernel[...],
            bias=0 * attn.dwc.bias[...],
            grid=attn.grid,
            alpha=attn.alpha,
        )
        return heads(whole(v), attn.power.shape[1]), heads(whole(o), attn.power.shape[1])

    v, expected = (np.asarray(a) for a in values_and_streams(model))
    v1, v2 = np.split(v, 2, axis=-1)
    streams = [np.einsum("bhmn,bnhe->bmhe", found[name], v) for name, v in (("same", v1), ("opposite", v2))]
    np.testing.assert_allclose(np.concatenate(streams, -1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family, block", [("pvt", 0), ("swin", 1)])
def test_softmax_maps_give_the_output_of_the_block(family, block, x64):
    model = trained(family)
    found = rows(model, stage=1, block=block)["softmax"]

    @jax.jit
    def both(model, found):
        chosen, x = inside(model, stage=1, block=block)
        # In Pola-Swin `project` is of each token alone, so that it may act on the whole image too.
        grid = (4, 4)
        _, _, v = chosen.attn.project(x) if family == "swin" else chosen.attn.project(x, grid)  # (B, n, h, d)
        return chosen.attn.proj(jnp.einsum("bhmn,bnhe->bmhe", found, v).reshape(x.shape)), chosen.mix(
            x, None, grid=grid
        )

    y, expected = both(model, found)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_a_shifted_softmax_window_is_the_definition_pixel_by_pixel(x64):
    """Scores, bias and mask of Swin, pair by pair on the image, without partition or roll."""
    model = trained("swin")
    found = rows(model, stage=1, block=1)["softmax"]
    chosen = model.blocks(1)[1]
    side, window, shift = 4, 2, 1
    assert chosen.windows((side, side)) == ((side, side), window, (shift, shift))

    @jax.jit
    def queries_and_keys(model):
        chosen, x = inside(model, stage=1, block=1)
        return chosen.attn.project(x)[:2]

    q, k = (np.asarray(a) for a in queries_and_keys(model))
    table = np.asarray(chosen.attn.relative_position_bias_table[...])
    expected = np.full(found.shape, -np.inf)
    for i, j in np.ndindex(side**2, side**2):
        at = np.array([divmod(i, side), divmod(j, side)])
        shifted = (at - shift) % side
        if (shifted[0] // window != shifted[1] // window).any():
            continue
        delta = shifted[0] - shifted[1] + window - 1
        apart = ((shifted >= side - shift)[0] != (shifted >= side - shift)[1]).any()
        score = np.einsum("bhd,bhd->bh", q[:, i], k[:, j]) * q.shape[-1] ** -0.5
        expected[:, :, i, j] = score + table[delta[0] * (2 * window - 1) + delta[1]] - 100 * apart
    np.testing.assert_allclose(found, jax.nn.softmax(expected, axis=-1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("stage, block, window, shift", [(0, 0, 4, 0), (0, 1, 4, 2), (1, 1, 2, 1)])
def test_a_token_looks_within_its_window_alone(stage, block, window, shift, x64):
    side, token = 8 // 2**stage, (0, 1)
    found = attention_maps(trained("swin"), images(), stage=stage, block=block, token=token)
    near = {
        axis: [at for at in range(side) if (at - shift) % side // window == (token[axis] - shift) % side // window]
        for axis in (0, 1)
    }
    expected = np.zeros((side, side), bool)
    expected[np.ix_(near[0], near[1])] = True
    for stream in found.streams.values():
        assert (stream.weights[..., ~expected] == 0).all()
        assert (stream.weights[..., expected].sum(axis=-1) > 0).all()


@pytest.mark.parametrize(
    "family, stage, block", [("pvt", 0, 0), ("pvt", 1, 0), ("swin", 0, 1), ("swin", 1, 1)], ids=str
)
def test_the_average_is_the_mean_of_all_tokens(family, stage, block, x64):
    model = trained(family)
    average = attention_maps(model, images(), stage=stage, block=block)
    for name, matrix in rows(model, stage=stage, block=block).items():
        stream = average.streams[name]
        mean = matrix.mean(axis=2).reshape(stream.weights.shape)
        np.testing.assert_allclose(stream.weights, mean, rtol=1e-12, atol=1e-15)
        share = matrix / matrix.sum(axis=-1, keepdims=True)
        naive = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1)  # (B, h, N)
        np.testing.assert_allclose(stream.entropy, naive.mean(axis=2), rtol=1e-10)
        assert (stream.entropy < average.uniform_entropy).all()


def blind(family, names):
    """A model whose named parameters are zero in every block."""
    model = build(family)
    _, params = split(model)
    nnx.update(
        model,
        jax.tree_util.tree_map_with_path(
            lambda path, a: np.zeros_like(a) if names & {key.key for key in path} else a, params
        ),
    )
    return model


def test_softmax_of_equal_scores_is_uniform():
    found = attention_maps(blind("pvt", {"q"}), noise(1, 32, 32, 3), stage=1)
    stream = found.streams["softmax"]  # 4x4 queries, keys reduced to 2x2
    np.testing.assert_allclose(stream.weights, np.full((1, 2, 2, 2), 1 / 4), rtol=1e-6)
    np.testing.assert_allclose(stream.entropy, found.uniform_entropy, rtol=1e-6)
    assert found.uniform_entropy == np.log(4)


@pytest.mark.parametrize("token", [None, (0, 0)], ids=["average", "token"])
def test_rows_of_zeros_have_no_entropy(token):
    for stream in attention_maps(blind("swin", {"qkvg"}), noise(1, 32, 32, 3), stage=0, token=token).streams.values():
        assert (stream.weights == 0).all()
        assert np.isnan(stream.entropy).all()


def test_stage_block_and_token_count_from_the_end_too(x64):
    found, same = (
        attention_maps(trained("swin"), images(), stage=stage, block=block, token=token)
        for stage, block, token in ((-4, -1, (-1, 0)), (0, 1, (7, 0)))
    )
    assert (found.stage, found.block) == (0, 1)
    for name, stream in found.streams.items():
        np.testing.assert_array_equal(stream.weights, same.streams[name].weights)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stage": 4}, "stage 4: expected an integer from 0 to 3 .*PolaSwin has 4 stages"),
        ({"stage": "0"}, "stage '0': expected an integer"),
        ({"stage": 0, "block": 2}, "block 2: expected an integer from 0 to 1 .*stage 0 has 2 blocks"),
        ({"stage": 2, "block": -2}, "block -2: .*stage 2 has 1 block$"),
        ({"stage": 1, "token": (4, 0)}, "token row 4: expected an integer from 0 to 3 .*grid has 4x4 tokens"),
        ({"stage": 1, "token": (0, 1.5)}, "token column 1.5"),
        ({"stage": 1, "token": (1, 2, 3)}, r"token \(1, 2, 3\): expected \(row, column\)"),
    ],
    ids=str,
)
def test_refuses_what_is_not_there(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(abstract("swin"), noise(1, 32, 32, 3), **arguments)


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("pvt", {}, (2, 0)),  # a grid of 2x2; in stage 3 there is a single token
        ("swin", {"img_size": 64, "depths": (1, 1, 2, 1)}, (2, 1)),
        ("swin", {"attn_type": "SSSS"}, (2, 0)),
    ],
    ids=["a single token", "LSLS", "SSSS"],
)
def test_last_linear_block(family, changes, expected):
    assert last_linear_block(abstract(family, **changes)) == expected


def test_the_public_name_stays_the_function():
    assert pf.attention_maps is pf.attention_maps is attention_maps
