"""From an official checkpoint to our file, to a model, to the official logits; and back."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import convert_torch_weights
import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.models import registry
from polaformer_jax.weights import conversion
from tests.golden.fill import image
from tests.support import small_models
from tests.support.golden_models import FULL, GOLDEN_FOLDER, float32_tolerance, images, official_tensors, relative_error
from tests.support.golden_models import SMALL as ENTRIES
from tests.support.quick import QUICK
from tests.support.torch_files import official_checkpoint, write_pth


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint as the official trainer does, and gives its path."""

    def write(name: str):
        if name == "pvt_llll":
            return GOLDEN_FOLDER / "official_pvt_llll.pth"
        return official_checkpoint(tmp_path / "official_swin_llss.pth")

    return write


def logits(model, batch: int) -> np.ndarray:
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x), compiler_options=QUICK)
    return np.asarray(forward(params, images(batch, model.config.img_size, model.dtype)))


def small_pth(path, **changes):
    """A checkpoint of a small model of the tests, which is fast to run."""
    model = small_models.build("pvt", **changes)
    return write_pth(path, {"model": weights.to_torch(model), "epoch": 7, "max_accuracy": 12.5})


def run(*arguments) -> int:
    return convert_torch_weights.main([str(argument) for argument in arguments])


# --- parity


@pytest.mark.parametrize("name", ["pvt_llll", pytest.param("swin_llss", marks=pytest.mark.slow)])
def test_official_checkpoints_give_the_official_logits(name, checkpoint, tmp_path, x64):
    """The whole path: .pth, converter, .safetensors, create_model, float64 logits."""
    target = tmp_path / "a.safetensors"
    done = conversion.convert(checkpoint(name), target)
    model = pf.create_model(weights=target, dtype="float64", param_dtype="float64")
    golden = np.load(GOLDEN_FOLDER / f"small_{name}.npz")["logits"]
    assert relative_error(logits(model, 4), golden) < 1e-9
    assert done.facts["epoch"] == 300 and done.facts["config"]["MODEL"]["LA"]["ALPHA"] == 4
    assert done.found == len(ENTRIES[name]["shapes"]) and done.assumed == []
    if name == "pvt_llll":
        assert "ignored    norm.weight, norm.bias\n" in done.table()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pola_pvt_t", "pola_swin_t", "pola_swin_b"])
def test_full_size_state_dicts_give_the_official_logits(name, tmp_path):
    """As above for models of the published sizes, in float32; the converter itself compares."""
    write_pth(tmp_path / "a.pth", {"model": official_tensors(FULL[name]["shapes"])})
    golden = np.load(GOLDEN_FOLDER / "full.npz")[f"{name}/logits"]
    done = conversion.convert(
        tmp_path / "a.pth", tmp_path / "a.safetensors", reference={"images": image(1, 224), "logits": golden}
    )
    assert done.model == name
    assert done.error < float32_tolerance(FULL[name])
    assert relative_error(logits(pf.create_model(weights=tmp_path / "a.safetensors"), 1), golden) < float32_tolerance(
        FULL[name]
    )


# --- and back


@pytest.mark.parametrize("name", [pytest.param("pvt_llll", marks=pytest.mark.slow), "swin_llss"])
def test_the_way_back_is_exact(name, checkpoint, tmp_path):
    """What comes out in the official layout is what the official checkpoint held, its buffers included."""
    official = weights.read_file(checkpoint(name)).tensors
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert run(checkpoint(name), ours) == 0
    assert run(ours, back, "--layout", "torch") == 0
    returned = weights.read_file(back)
    assert returned.layout == "torch" and returned.tensors.keys() == official.keys()
    for key, array in official.items():
        if key not in ("norm.weight", "norm.bias") or "swin" in name:  # Pola-PVT's is never used, and not kept
            assert returned.tensors[key].dtype == array.dtype
            np.testing.assert_array_equal(returned.tensors[key], array)
    assert json.loads(returned.metadata["facts"])["epoch"] == 300


@pytest.mark.parametrize("name", [*ENTRIES, *FULL])
def test_the_official_layout_is_complete(name):
    """Names and shapes are those of the official state_dict, which loads strictly."""
    shapes = {**ENTRIES, **FULL}[name]["shapes"]
    file = weights.WeightsFile("a", "torch", {k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()}, {}, {})
    identity = weights.identify(file)
    model = registry.create_abstract(identity.config)
    flat = weights.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    empty = {key: np.broadcast_to(np.float32(0), leaf.shape) for key, leaf in flat.items()}
    official = weights.in_official_layout(empty, model)
    assert {key: list(array.shape) for key, array in official.items()} == shapes


# --- the command


def test_prints_what_was_done(checkpoint, tmp_path, capsys):
    assert run(checkpoint("swin_llss"), tmp_path / "a.safetensors") == 0
    text = capsys.readouterr().out
    assert "model      PolaSwin, 224 pixels, 10 classes, alpha 4\n" in text
    assert "found      142 tensors, epoch 300, max_accuracy 82.6\n" in text
    assert "converted  137 tensors, 733,842 parameters, all finite\n" in text
    assert "ignored    4 x relative_position_index, attn_mask\n" in text
    assert "resized    none\n" in text
    assert re.search(r"forward    in \d+\.\d s with compilation, all logits finite", text)


def test_several_files(tmp_path, capsys):
    small_pth(tmp_path / "one.pth")
    small_pth(tmp_path / "two.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing of the kind")
    sources = [tmp_path / name for name in ("one.pth", "bad.pth", "two.pth")]
    assert run(*sources, "--out-dir", tmp_path / "out") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.safetensors", "two.safetensors"]
    assert "bad.pth" in capsys.readouterr().err


def test_other_sizes_and_classes(tmp_path, capsys):
    source, target = small_pth(tmp_path / "a.pth", alpha=3), tmp_path / "b.safetensors"
    assert run(source, target, "--img-size", 64, "--num-classes", 9, "--alpha", 3) == 0
    assert "pos_embed1: resized from 8x8 to 16x16 (bilinear)" in capsys.readouterr().out
    model = pf.create_model(weights=target)
    assert (model.config.img_size, model.config.num_classes, model.config.alpha) == (64, 9, 3)


def test_compares_with_reference_logits(tmp_path, capsys):
    source, target = small_pth(tmp_path / "a.pth"), tmp_path / "a.safetensors"
    expected = logits(small_models.build("pvt"), 2)
    np.savez(tmp_path / "right.npz", images=image(2, 32), logits=expected)
    assert run(source, target, "--compare", tmp_path / "right.npz") == 0
    assert "compared   logits within" in capsys.readouterr().out
    target.unlink()
    np.savez(tmp_path / "wrong.npz", images=image(2, 32), logits=expected + 1)
    np.savez(tmp_path / "small.npz", images=image(2, 16), logits=expected)
    np.savez(tmp_path / "empty.npz", a=expected)
    np.savez(tmp_path / "text.npz", images=image(2, 32), logits=np.array(["a"]))
    np.savez(tmp_path / "nothing.npz", images=image(2, 32)[:0], logits=expected[:0])
    np.save(tmp_path / "array.npy", expected)
    (tmp_path / "zero.npz").write_bytes(b"")
    for name, message in (
        ("wrong.npz", "the logits differ from the reference by"),
        ("small.npz", "the reference's images have shape (2, 3, 16, 16), expected (batch, 3, 32, 32)"),
        ("empty.npz", "has no images and no logits; it has a"),
        ("text.npz", "logits is <U1 (1,), expected a non-empty array of floats"),
        ("nothing.npz", "images is float32 (0, 3, 32, 32), expected a non-empty array of floats"),
        ("array.npy", "expected an .npz file"),
        ("zero.npz", "expected an .npz file"),
        ("none.npz", "cannot read"),
    ):
        assert run(source, target, "--compare", tmp_path / name) == 2
        assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": {"conv1.weight": np.ones((2, 3, 7, 7), np.float32)}}, "holds neither a Pola-PVT"),
        ({"model": "no dict"}, "expected a dict of tensors by name"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(content, message, tmp_path, capsys):
    write_pth(tmp_path / "a.pth", content)
    assert run(tmp_path / "a.pth") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_values_that_are_not_finite_are_refused(tmp_path, capsys):
    tensors = weights.to_torch(small_models.build("pvt"))
    tensors["block1.0.mlp.fc1.bias"] = np.full_like(tensors["block1.0.mlp.fc1.bias"], np.inf)
    write_pth(tmp_path / "a.pth", tensors)
    assert run(tmp_path / "a.pth") == 2
    assert (
        "1 with values that are not finite (NaN or infinity: the file is broken, or its training diverged): block1.0"
        in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_failed_forward_pass_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise weights.WeightsError("not finite")

    monkeypatch.setattr(conversion, "_run", fail)
    with pytest.raises(weights.WeightsError, match="not finite"):
        conversion.convert(small_pth(tmp_path / "a.pth"), tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    source, target = small_pth(tmp_path / "a.pth"), tmp_path / "a.safetensors"
    target.write_text("precious")
    assert run(source) == 1
    assert (
        "a.safetensors exists: give another name or folder, or set overwrite to replace it" in capsys.readouterr().err
    )
    assert target.read_text() == "precious"
    assert run(source, "--overwrite") == 0
    assert weights.read_file(target).layout == "ours"
    other_target = tmp_path / "z.safetensors"
    other_target.write_text("precious")
    for options in ([], ["--overwrite"]):  # a glob may have named it as a file to convert
        assert run(source, other_target, *options) == 1
        assert "to replace it, give it as out with overwrite" in capsys.readouterr().err
    assert other_target.read_text() == "precious"
    assert run(source, "--out", other_target, "--overwrite") == 0
    for second in ("none.pth", tmp_path):
        assert run(source, second) == 1
        assert f"there is no file {second} to convert" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    other = small_pth(tmp_path / "b" / "a.pth")
    assert run(source, other, "--out-dir", tmp_path / "c") == 1
    assert "several files would be written to" in capsys.readouterr().err


def test_an_unknown_model_is_refused(tmp_path, capsys):
    assert run(small_pth(tmp_path / "a.pth"), "--model", "pola_swim_t") == 2
    assert "Did you mean pola_swin_t" in capsys.readouterr().err
