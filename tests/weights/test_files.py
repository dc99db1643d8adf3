"""Files of weights: written whole, read in any layout, refused where damaged or of another model; models from them."""

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
from tests.support import small_models
from tests.support.tiny_weights import assert_same, official, pure, tiny
from tests.support.torch_files import Config, write_pth


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
    with pytest.raises(UserError, match="a.safetensors' cannot be written: no space left"):
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
        with pytest.raises(weights.WeightsError, match="trained with alpha=3, and the model has 4: "):
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
    [({"epoch": 3}, "'epoch': 3: expected strings"), ({"arguments": "{}"}, "'arguments': this name describes")],
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
    with pytest.raises(weights.WeightsError, match="damaged" if cut else "is empty, expected a .safetensors file"):
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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'{"error": "Access denied"}', "JSON text, perhaps the error message of a failed download"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00", "compressed with gzip"),
        (b"", "is empty"),
    ],
)
def test_files_of_another_kind_are_called_what_they_are(content, message, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(weights.WeightsError, match=f"a{suffix} is {message}" if content else message):
        weights.load_weights(tiny(), path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("how", ["ours", "torch", "dict"])
def test_values_that_are_not_finite_are_refused(value, how, tmp_path):
    model = tiny()
    name = "head.bias"
    if how == "dict":
        source = weights.to_torch(model)
        source[name] = source[name] + value
    else:
        model.head.bias[...] = model.head.bias[...] + value
        source = tmp_path / "a.safetensors"
        weights.save_weights(model, source, layout=how)
    with pytest.raises(weights.WeightsError, match=r"1 with values that are not finite \(NaN .*: head.bias"):
        weights.load_weights(tiny(), source)


@pytest.mark.parametrize(("stored", "names"), [(None, None), ('["a", "b\\n"]', ("a", r"b\n"))], ids=["none", "names"])
def test_a_file_names_its_classes(stored, names, tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_weights(tiny(), path, metadata={} if stored is None else {"classes": stored})
    assert weights.read_file(path).class_names == names


@pytest.mark.parametrize(
    ("stored", "message"), [('{"a": 1}', "expected a JSON list of names"), ("a, b", "classes: not valid JSON")]
)
def test_names_that_are_no_list_are_refused(stored, message, tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_weights(tiny(), path, metadata={"classes": stored})
    with pytest.raises(weights.WeightsError, match=message):
        _ = weights.read_file(path).class_names


def test_weights_of_another_family_are_named(tmp_path):
    weights.save_weights(small_models.build("swin"), tmp_path / "a.safetensors")
    with pytest.raises(weights.WeightsError, match="holds the weights of a PolaSwin, and the model is a PolaPVT"):
        weights.load_weights(small_models.build("pvt"), tmp_path / "a.safetensors")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(weights.WeightsError, match="there is no weights file"):
        weights.load_weights(tiny(), tmp_path / "none.safetensors")
    for path, message in (
        (tmp_path, "is a folder, expected a file of weights"),
        ("", "the path is empty"),
        ("a\0b.pth", "cannot read"),
        ("a" * 300, "cannot read"),
        ("https://example.org/a.pth", "expected a local path, or one in a bucket"),
    ):
        with pytest.raises(weights.WeightsError, match=message):
            weights.load_weights(tiny(), path)
    with pytest.raises(weights.WeightsError, match="an entry 3, expected names of tensors"):
        weights.load_weights(tiny(), {3: np.ones(3)})
    with pytest.raises(
        TypeError, match="model is a Linear, expected a PolaPVT, PolaSwin, PolaPP, PolaSequence or Segmenter"
    ):
        weights.load_weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {})
    with pytest.raises(weights.WeightsError, match="written as .safetensors"):
        weights.save_weights(tiny(), tmp_path / "a.pth")
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(weights.WeightsError, match="foreign.safetensors: .*\n.*missing: .*\n.*1 unexpected: a"):
        weights.load_weights(tiny(), tmp_path / "foreign.safetensors")
    for content, message in (
        ({"model": {"a": 3}}, "1 of 1 entries are not: 'a': int"),
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
        assert type(model) is type(saved) and model.config == saved.config
        assert_same(pure(model), pure(saved))


def test_models_from_files_take_other_sizes_where_asked(tmp_path, caplog):
    weights.save_weights(tiny(seed=1), tmp_path / "a.safetensors")
    model = pf.create_model(weights=tmp_path / "a.safetensors", img_size=64, num_classes=7, dtype="bfloat16")
    arguments = model.config.to_dict()
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
    with pytest.raises(ValueError, match="give one of pola_pp_b0, .*, or a file of weights"):
        pf.create_model(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="name is None"):
        pf.create_model(weights=official(tiny()))
    with pytest.raises(ValueError, match="rngs is None"):
        pf.create_model("pola_pvt_t")
