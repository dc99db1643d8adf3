"""Weights in and out: official names and layouts, our own files, and one error for all that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.errors import UserError
from polaformer_jax.weights import rules
from tests import small_models
from tests.golden_models import FULL, SMALL, official_tensors
from tests.torch_files import Config, write_pth

TINY = {"img_size": 32, "embed_dims": (4, 4, 8, 8), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 3}
ENTRIES = {**SMALL, **FULL}


def tiny(seed=0, **changes):
    return pf.PolaPVT(**{**TINY, "la_sr_ratios": "2111", **changes}, rngs=nnx.Rngs(seed))


def pure(model):
    return nnx.to_pure_dict(nnx.state(model))


def official(model) -> dict[str, np.ndarray]:
    flat = {name: np.asarray(leaf) for name, leaf in weights.flatten(pure(model)).items()}
    return {rules.official_name(name, a.ndim): rules.to_official(name, a) for name, a in flat.items()}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- names and layouts


@pytest.mark.parametrize("name", FULL)
def test_official_names_and_shapes(name):
    """Every tensor of the official models has exactly one place in ours, and the other way round."""
    params = pure(nnx.eval_shape(lambda: pf.create_model(name, rngs=nnx.Rngs(0))))
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
    model = nnx.eval_shape(lambda: pf.create_model("pola_swin_t", rngs=nnx.Rngs(0)))
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


# --- files


def test_saved_weights_load_exactly(tmp_path):
    path = tmp_path / "folder" / "mine.safetensors"
    weights.save_weights(tiny(seed=1), path, metadata={"note": "tiny"})
    model = tiny()
    assert weights.load_weights(model, path) == []
    assert_same(pure(model), pure(tiny(seed=1)))
    weights.load_weights(model, str(path))
    file = weights.read_file(path)
    assert file.layout == "ours" and file.metadata["note"] == "tiny" and file.metadata["family"] == "PolaPVT"
    assert file.tensors["block1.0.attn.qg.kernel"].shape == (4, 8)
    assert not file.tensors["block1.0.attn.qg.kernel"].flags.writeable


def test_a_file_of_any_layout_loads_bit_for_bit(tmp_path):
    """Ours, ours in the official layout, a foreign one with official names, and an official checkpoint."""
    saved = tiny(seed=1)
    weights.save_weights(saved, tmp_path / "ours.safetensors")
    weights.save_weights(saved, tmp_path / "torch.safetensors", layout="torch")
    contiguous = {name: np.ascontiguousarray(array) for name, array in official(saved).items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "foreign.safetensors")
    write_pth(tmp_path / "official.pth", {"model": weights.to_torch(saved), "epoch": 3})
    write_pth(tmp_path / "wrapped.bin", {"state_dict": {f"module.{key}": a for key, a in official(saved).items()}})
    for name in ("ours.safetensors", "torch.safetensors", "foreign.safetensors", "official.pth", "wrapped.bin"):
        model = tiny()
        weights.load_weights(model, tmp_path / name)
        assert_same(pure(model), pure(saved))
        weights.load_weights(model, weights.read_file(tmp_path / name))


def test_loaded_arrays_are_no_views_of_the_callers_arrays():
    source = {name: array.copy() for name, array in official(tiny(seed=1)).items()}
    model = tiny()
    weights.load_weights(model, source)
    for array in source.values():
        array[...] = 0
    assert_same(pure(model), pure(tiny(seed=1)))


def test_a_mapped_dict_of_the_caller_keeps_what_was_written_to_it(tmp_path):
    """Its pages are the caller's: only those of files that we mapped ourselves are given back."""
    size = sum(array.nbytes for array in official(tiny()).values())
    np.zeros(size, np.uint8).tofile(tmp_path / "a.bin")
    memory, source, offset = np.memmap(tmp_path / "a.bin", np.uint8, mode="c"), {}, 0
    for name, array in official(tiny(seed=1)).items():
        source[name] = memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        source[name][...] = array
        offset += array.nbytes
    model = tiny()
    weights.load_weights(model, source)
    assert_same(pure(model), pure(tiny(seed=1)))
    assert_same(source, {name: np.asarray(array) for name, array in official(tiny(seed=1)).items()})


def test_values_that_the_type_cannot_hold_are_refused():
    source = {name: array.astype(np.float64) for name, array in official(tiny(seed=1)).items()}
    source["head.bias"][0] = 1e300
    with pytest.raises(weights.WeightsError, match="head.bias holds values too large for the model's type, float32"):
        weights.load_weights(tiny(), source)


def test_bfloat16_survives_a_file(tmp_path):
    saved = tiny(seed=1, param_dtype="bfloat16")
    weights.save_weights(saved, tmp_path / "a.safetensors")
    model = tiny()
    weights.load_weights(model, tmp_path / "a.safetensors")
    assert_same(pure(model), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), pure(saved)))


def test_others_can_read_our_files(tmp_path):
    saved = tiny(seed=1)
    weights.save_weights(saved, tmp_path / "a.safetensors", layout="torch")
    loaded = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    expected = weights.to_torch(saved)
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    weights.save_weights(tiny(seed=1), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(type(epath.Path(path)), "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        weights.save_weights(tiny(seed=2), path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_our_files_are_as_strict(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_weights(tiny(seed=1, num_classes=4), path)
    model = tiny()
    with pytest.raises(weights.WeightsError, match=r"2 of another shape .*head.bias \(4,\), expected \(3,\)"):
        weights.load_weights(model, path)


def test_weights_of_another_alpha_are_refused(tmp_path):
    """No shape shows alpha, and with another one the model is another function."""
    weights.save_weights(tiny(seed=1, alpha=3), tmp_path / "a.safetensors")
    config = Config({"MODEL": {"LA": {"ALPHA": 3}}})
    write_pth(tmp_path / "a.pth", {"model": official(tiny(seed=1)), "config": config})
    for name in ("a.safetensors", "a.pth"):
        with pytest.raises(weights.WeightsError, match="trained with alpha=3, and the model has 4: no shape shows it"):
            weights.load_weights(tiny(), tmp_path / name)
        weights.load_weights(tiny(alpha=3), tmp_path / name)


def test_weights_of_other_heads_are_refused(tmp_path):
    """Of a softmax stage no shape shows them."""
    weights.save_weights(tiny(seed=1, attn_type="LLSS"), tmp_path / "a.safetensors")
    with pytest.raises(weights.WeightsError, match=r"num_heads=\(1, 1, 2, 2\), and the model has \(1, 1, 4, 4\)"):
        weights.load_weights(tiny(attn_type="LLSS", num_heads=(1, 1, 4, 4)), tmp_path / "a.safetensors")


def test_our_layout_is_known_without_our_tag(tmp_path):
    weights.save_weights(tiny(seed=1), tmp_path / "a.safetensors")
    safetensors.numpy.save_file(safetensors.numpy.load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert_same(pure(pf.create_model(weights=tmp_path / "b.safetensors")), pure(tiny(seed=1)))


@pytest.mark.parametrize(
    "metadata, message",
    [({"epoch": 3}, "'epoch': 3: expected strings"), ({"arguments": "{}"}, "'arguments': this name says what")],
)
def test_metadata_that_cannot_be_written_is_refused(metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.save_weights(tiny(), tmp_path / "a.safetensors", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 4, 50, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    weights.save_weights(tiny(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(weights.WeightsError, match="damaged"):
        weights.load_weights(tiny(), path)


@pytest.mark.parametrize("where", ["header", "metadata", "data"])
def test_a_flipped_bit_is_noticed(tmp_path, where):
    path = tmp_path / "a.safetensors"
    weights.save_weights(tiny(), path)
    content = bytearray(path.read_bytes())
    position = {"header": content.index(b"head.bias"), "metadata": content.index(b"drop_path_rate"), "data": -2}[where]
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(weights.WeightsError, match="damaged: its checksum is"):
        weights.load_weights(tiny(), path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(weights.WeightsError, match="there is no weights file"):
        weights.load_weights(tiny(), tmp_path / "none.safetensors")
    for path, message in (
        (tmp_path, "is a folder, expected a file of weights"),
        ("", "is a folder"),
        ("a\0b.pth", "cannot read"),
        ("a" * 300, "cannot read"),
        ("https://example.org/a.pth", "expected a local file or one in a bucket"),
    ):
        with pytest.raises(weights.WeightsError, match=message):
            weights.load_weights(tiny(), path)
    with pytest.raises(weights.WeightsError, match="an entry 3, expected names of tensors"):
        weights.load_weights(tiny(), {3: np.ones(3)})
    with pytest.raises(TypeError, match="model is a Linear, expected a PolaPVT or PolaSwin"):
        weights.load_weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {})
    with pytest.raises(weights.WeightsError, match="written as .safetensors"):
        weights.save_weights(tiny(), tmp_path / "a.pth")
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(weights.WeightsError, match="foreign.safetensors: .*\n.*missing: .*\n.*1 unexpected: a"):
        weights.load_weights(tiny(), tmp_path / "foreign.safetensors")
    for content, message in (
        ({"model": {"a": 3}}, "1 of 1 entries are none: 'a': int"),
        ({}, "it is empty"),
        ([1, 2], "holds a list, expected a dict of tensors"),
    ):
        write_pth(tmp_path / "a.pth", content)
        with pytest.raises(weights.WeightsError, match=message):
            weights.read_file(tmp_path / "a.pth")


# --- models made from files


def test_a_file_names_its_own_model(tmp_path):
    for saved in (tiny(seed=1, alpha=2.5, drop_path_rate=0.25), small_models.build("swin", alpha=3)):
        weights.save_weights(saved, tmp_path / "a.safetensors")
        model = pf.create_model(weights=tmp_path / "a.safetensors")
        assert type(model) is type(saved) and model.arguments == saved.arguments
        assert_same(pure(model), pure(saved))


def test_models_from_files_take_other_sizes_where_asked(tmp_path, caplog):
    weights.save_weights(tiny(seed=1), tmp_path / "a.safetensors")
    model = pf.create_model(weights=tmp_path / "a.safetensors", img_size=64, num_classes=7, dtype="bfloat16")
    arguments = dict(model.arguments)
    assert (arguments["img_size"], arguments["num_classes"], model.dtype) == (64, 7, jnp.bfloat16)
    assert not model.head.kernel[...].any()
    assert "pos_embed1: resized from 8x8 to 16x16 (bilinear)" in caplog.text
    assert "head: 3 classes: replaced by zeros for 7 classes" in caplog.text
    assert jax.eval_shape(model, np.ones((1, 64, 64, 3), np.float32)).shape == (1, 7)


def test_a_named_model_takes_the_classes_of_the_file(tmp_path):
    saved = pf.create_model("pola_pvt_nano", num_classes=10, rngs=nnx.Rngs(1))
    weights.save_weights(saved, tmp_path / "a.safetensors")
    assert_same(pure(pf.create_model("pola_pvt_nano", weights=tmp_path / "a.safetensors")), pure(saved))


def test_a_name_or_a_file_is_needed():
    with pytest.raises(ValueError, match="give one of pola_pvt_b, .*, or a file of weights"):
        pf.create_model(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="name is None"):
        pf.create_model(weights=official(tiny()))
    with pytest.raises(ValueError, match="rngs is None"):
        pf.create_model("pola_pvt_t")
