"""Features of images of any size: tables interpolated, windows padded, reductions that leave a rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.models import interpolation, registry
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.layers import rematerialised
from polaformer_jax.models.pola_pvt import SpatialReductionAttention
from polaformer_jax.models.window_attention import SwinBlock, WindowAttention, relative_position_index
from polaformer_jax.models.windows import Windows
from polaformer_jax.weights import fitting
from tests.models.test_attention import by_definition
from tests.support.quick import QUICK
from tests.support.small_models import all_finite, build, noise, perturbed, split

TYPES = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def features(model):
    """(function, params) images -> maps."""
    graphdef, params = split(model)
    return jax.jit(lambda params, x: nnx.merge(graphdef, params).features(x), compiler_options=QUICK), params


# --- whole models


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pvt", "swin"])
def test_trains_at_another_size_in_bfloat16_with_blocks_recomputed(family):
    model = build(family, drop_path_rate=0.2, dtype=jnp.bfloat16)
    model.remat = True
    graphdef, params = split(model)

    def loss(params, images):
        rngs = nnx.Rngs(dropout=jax.random.key(0))
        maps = nnx.merge(graphdef, params).features(images, train=True, rngs=rngs, mask=jnp.ones(1, bool))
        return sum(jnp.sum(m.astype(jnp.float32) ** 2) for m in maps)

    value, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params, noise(1, 32, 96, 3))
    assert all_finite((value, gradients)) and value > 0
    tables = {name: leaf for name, leaf in weights.flatten(gradients).items() if "pos_embed" in name}
    assert tables and all(jnp.any(leaf) for leaf in tables.values())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("pvt", {"img_size": 32, "attn_type": "LSSS"}),
        # Windows divide all grids, and none is reduced: only the table of absolute positions has another size. The last
        # block is not shifted at the size that it is made for, and is at the other.
        pytest.param("swin", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 2)}, marks=pytest.mark.slow),
    ],
)
def test_is_the_model_whose_tables_are_resized_beforehand(family, changes, x64):
    size = 2 * changes["img_size"]
    model = perturbed(build(family, **changes, **TYPES))
    resized = build(family, **{**changes, "img_size": size}, **TYPES)
    changed = weights.load_weights(resized, weights.to_torch(model), fit=["tables"])
    assert len(changed) == (5 if family == "pvt" else 1)
    images = noise(1, size, size, 3)
    found, expected = (call(params, images) for call, params in map(features, (model, resized)))
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12 * np.abs(other).max(), err_msg=f"stage {i}")


@pytest.mark.parametrize("family", ["pvt", "swin"])
def test_maps_have_the_shapes_of_the_image_and_tables_are_interpolated_where_needed(family, monkeypatch):
    asked, weights_of = [], interpolation.interpolation_weights
    monkeypatch.setattr(interpolation, "interpolation_weights", lambda *a: asked.append(a) or weights_of(*a))
    model = build(family)
    for height, width in ((32, 32), (32, 96)):
        maps = jax.eval_shape(model.features, jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32))
        expected = zip((4, 8, 16, 32), model.config.stage_channels, strict=True)
        assert [m.shape for m in maps] == [(2, height // s, width // s, c) for s, c in expected]
        assert bool(asked) == (width != 32)


def test_other_sizes_are_for_features_alone_and_multiples_of_32():
    model = build("swin")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    for call in (model, model.pooled, lambda x: model.tokens_before(x, stage=0, block=0)):
        with pytest.raises(ValueError, match=r"expected \(batch, 32, 32, 3\)"):
            jax.eval_shape(call, images)
    for shape in ((1, 48, 64, 3), (1, 0, 64, 3), (1, 3, 64, 64), (64, 64, 3)):
        with pytest.raises(ValueError, match="height and width multiples of 32"):
            jax.eval_shape(model.features, jax.ShapeDtypeStruct(shape, jnp.float32))


# --- tables


def test_tables_of_a_plane_that_is_not_square_are_those_of_its_axes(x64):
    """A product of two curves is resized along each axis as the square tables are."""
    rows, columns = np.random.default_rng(0).normal(size=(2, 4))
    found = interpolation.table_on(jnp.outer(rows, columns).reshape(1, 16, 1), (4, 4), (6, 3), "bicubic")

    def along(curve, size):
        plane = np.outer(curve, np.ones(4)).reshape(1, 16, 1)
        return fitting.resize_table("positional_encoding", plane, (1, size**2, 1)).reshape(size, size)[:, 0]

    expected = np.outer(along(rows, 6), along(columns, 3))
    np.testing.assert_allclose(found.reshape(6, 3), expected, rtol=1e-12, atol=1e-14)


def test_tables_keep_their_dtype():
    table = noise(1, 4, 3).astype(jnp.bfloat16)
    found = interpolation.table_on(table, (2, 2), (3, 5), "bilinear")
    assert (found.dtype, found.shape) == (jnp.bfloat16, (1, 15, 3))


# --- reductions


def test_a_reduction_leaves_out_the_rest(x64):
    attn = perturbed(PolarityAttention(4, 2, grid=(4, 4), projections="qg_kv", sr_ratio=2, **TYPES, rngs=nnx.Rngs(0)))
    x = noise(2, 35, 4)
    q, k, v, g = attn.project(x, (5, 7))
    inner = x.reshape(2, 5, 7, 4)[:, :4, :6].reshape(2, 24, 4)
    for found, expected in zip((k, v), attn.project(inner, (4, 6))[1:3], strict=True):
        assert found.shape == (2, 6, 4)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    arrays = {name: np.asarray(getattr(attn, name)[...]) for name in ("power", "scale")}
    arrays["positional_encoding"] = interpolation.table_on(attn.positional_encoding[...], (2, 2), (2, 3), "bicubic")
    arrays |= {name: np.asarray(getattr(attn.dwc, name)[...]) for name in ("kernel", "bias")}
    y = by_definition(*map(np.asarray, (q, k, v, g)), **arrays, grid=(5, 7), alpha=attn.alpha)
    np.testing.assert_allclose(attn(x, grid=(5, 7)), attn.proj(y), rtol=1e-10, atol=1e-12)


def test_softmax_keys_leave_out_the_rest_too():
    attn = SpatialReductionAttention(
        4, 2, sr_ratio=3, qkv_bias=True, drop_rate=0.0, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    assert attn.project(noise(1, 35, 4), (5, 7))[1].shape == (1, 2, 2, 2)
    with pytest.raises(ValueError, match="a map of 2x7 tokens is smaller than a patch, 3x3"):
        attn(noise(1, 14, 4), grid=(2, 7))


# --- padded windows

LAYOUTS = [((5, 7), 3, True), ((5, 7), 3, False), ((2, 5), 4, True), ((4, 6), 2, True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_windows_are_cut_pixel_by_pixel(layout):
    grid, window, shifted = layout
    windows = Windows.on(grid, window, shifted=shifted)
    rows, columns = (-(-side // window) for side in grid)
    shift = [window // 2 if shifted and side > window else 0 for side in grid]
    x = noise(2, grid[0] * grid[1], 3)
    expected = np.zeros((2, rows * columns, window**2, 3), np.float32)
    members = np.full((rows * columns, window**2), -1)
    for token, (row, column) in enumerate(np.ndindex(*grid)):
        at = (row - shift[0]) % (rows * window), (column - shift[1]) % (columns * window)
        place = (at[0] // window * columns + at[1] // window, at[0] % window * window + at[1] % window)
        expected[:, *place] = x[:, token]
        members[place] = token
    np.testing.assert_array_equal(windows.cut(x), expected.reshape(-1, window**2, 3))
    np.testing.assert_array_equal(windows.join(windows.cut(x)), x)
    np.testing.assert_array_equal(windows.members, members)
    assert (windows.valid is None) == (members >= 0).all() and (members >= 0).any(axis=1).all()


def block_of(kind, window, **types):
    """A shifted block of 4 channels in two heads, in float64 unless `types` say otherwise."""
    types = {**TYPES, **types, "rngs": nnx.Rngs(0)}
    if kind == "S":
        attn = WindowAttention(4, 2, window=window, qkv_bias=True, drop_rate=0.0, **types)
    else:
        attn = PolarityAttention(4, 2, grid=(window, window), projections="qkvg", kernel_size=3, **types)
    block = SwinBlock(
        attn, 4, window=window, shifted=True, mlp_ratio=1, epsilon=1e-5, drop_rate=0.0, drop_path=0.0, **types
    )
    return perturbed(block)


def softmax_window(attn, arrays, tokens, apart):
    """Attention to each other of the tokens of one window that are at the places `tokens` in it, before `proj`."""
    q, k, v = arrays  # (B, m, h, d)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    pairs = relative_position_index(attn.window)[np.ix_(tokens, tokens)]
    scores += np.asarray(attn.relative_position_bias_table[...])[pairs].transpose(2, 0, 1) - 100 * apart
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", share, v).reshape(*q.shape[:2], -1)


def linear_window(attn, arrays, tokens, apart):
    """The same by the definition for these tokens alone, whose convolution is that of the window."""
    q, k, v, g = arrays  # (B, m, C)
    kernel, bias, power, scale, table = (
        np.asarray(p[...]) for p in (attn.dwc.kernel, attn.dwc.bias, attn.power, attn.scale, attn.positional_encoding)
    )
    without = {"kernel": np.zeros((1, 1, 1, bias.size)), "bias": 0 * bias, "grid": (len(tokens), 1)}
    tables = {"power": power, "scale": scale, "positional_encoding": table[:, tokens]}
    y = by_definition(q, k, v, np.ones_like(g), **tables, **without, alpha=attn.alpha)
    kernel, bias = np.tile(kernel[:, :, 0], 2), np.tile(bias, 2)  # of both heads
    u = np.zeros_like(v) + bias
    for i, j in np.ndindex(len(tokens), len(tokens)):
        down, right = np.subtract(divmod(tokens[j], attn.grid[1]), divmod(tokens[i], attn.grid[1])) + 1
        if 0 <= down < 3 and 0 <= right < 3:
            u[:, i] += kernel[down, right] * v[:, j]
    return (y + u) * g


@pytest.mark.parametrize("kind", ["L", "S"])
@pytest.mark.parametrize("grid", [(5, 7), (2, 4)], ids=str)
def test_padded_windows_are_windows_of_the_tokens_that_there_are(kind, grid, x64):
    block = block_of(kind, 3)
    x = noise(2, grid[0] * grid[1], 4)
    windows = block.windows(grid)
    assert windows.shift == (grid[0] > 3, 1)
    # Along an axis the tokens before the shift, which wrapped around, are apart from the others.
    wrapped = np.array([[row < windows.shift[0], column < windows.shift[1]] for row, column in np.ndindex(*grid)])
    arrays = [np.asarray(a) for a in block.attn.project(x)]  # of each token alone
    expected = np.zeros(x.shape)
    for members in windows.members:
        (tokens,) = np.nonzero(members >= 0)
        at = members[tokens]
        apart = (wrapped[at][:, None] != wrapped[at][None]).any(axis=-1)
        attend = softmax_window if kind == "S" else linear_window
        expected[:, at] = attend(block.attn, [a[:, at] for a in arrays], tokens, apart)
    found = jax.jit(lambda x: block.mix(x, None, grid=grid), compiler_options=QUICK)(x)
    np.testing.assert_allclose(found, block.attn.proj(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["L", "S"])
def test_what_padding_holds_does_not_matter(kind, monkeypatch, x64):
    block, x = block_of(kind, 3), noise(2, 35, 4)
    expected = block.mix(x, None, grid=(5, 7))
    pad = jnp.pad
    monkeypatch.setattr(jnp, "pad", lambda x, sides: pad(x, sides, constant_values=7.0))
    assert (block.windows((5, 7)).cut(x) == 7).any()
    np.testing.assert_allclose(block.mix(x, None, grid=(5, 7)), expected, rtol=1e-12, atol=1e-14)


def test_padded_windows_in_the_kernel(x64):
    block, x = block_of("L", 3), noise(2, 35, 4)
    values = []
    for implementation in ("xla", "pallas"):
        block.attn.attention_impl = implementation
        values.append(jax.jit(lambda x: block.mix(x, None, grid=(5, 7)), compiler_options=QUICK)(x))
    np.testing.assert_allclose(*values, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["L", "S"])
def test_gradients_through_padded_windows_are_finite(kind):
    block = block_of(kind, 3, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    graphdef, params = split(block)

    def total(params, x):
        y = rematerialised(nnx.merge(graphdef, params), x, jax.random.key(0), static={"grid": (5, 7)})
        return jnp.sum(y.astype(jnp.float32) ** 2)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=QUICK)(params, 0 * noise(2, 35, 4))
    assert all_finite(gradients)


def test_the_published_windows_at_512():
    with pytest.raises(ValueError, match="Windows are padded with padded_windows=True"):
        registry.model_config("pola_swin_t", img_size=512)
    config = registry.model_config("pola_swin_t", img_size=512, padded_windows=True)
    assert config.architecture() == registry.model_config("pola_swin_t").architecture()
    assert registry.name_of(config) == "pola_swin_t"
    model = registry.create_abstract(config)
    assert [stage.blocks[1].window for stage in model.layers] == [56, 56, 7, 7]
    small = registry.create_abstract(registry.model_config("pola_swin_t"))
    odd = [stage.blocks[1] for stage in small.layers]
    assert [block.windows((side, side)).shift[0] for block, side in zip(odd, (56, 28, 14, 7), strict=True)] == [
        0,
        0,
        3,
        0,
    ]
    assert [block.windows((96, 96)).shift[0] for block in odd] == [28, 14, 3, 3]
    images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
    logits, maps = nnx.eval_shape(lambda model, x: (model(x), model.features(x)), model, images)
    assert logits.shape == (1, 1000) and [m.shape[1] for m in maps] == [128, 64, 32, 16]


def test_files_of_padded_models_name_them_and_what_cannot_be_made_of_them_is_refused(tmp_path):
    model = build("swin", img_size=64, window_size=3, softmax_window_size=3, padded_windows=True)
    for layout in ("ours", "torch"):
        pf.save_weights(model, tmp_path / f"{layout}.safetensors", layout=layout)
        assert pf.create_model(weights=tmp_path / f"{layout}.safetensors").config == model.config
    with pytest.raises(UserError, match="padded windows have no maps"):
        pf.attention_maps(model, noise(1, 64, 64, 3), stage=0)
    with pytest.raises(UserError, match="padded windows, which cannot be written as ONNX"):
        pf.export.onnx(model, tmp_path / "a.onnx")
