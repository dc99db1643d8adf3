"""Programs in StableHLO compute what the model does, for any batch, and are loaded by a process that has only JAX."""

import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import cli, weights
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError
from polaformer_jax.export import stablehlo_file
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.models.pola_sequence import Sequences
from tests.support import ROOT, small_models
from tests.support.tiny_weights import tiny

NAMES = ("ant", "bee", "cat", "dog", "eel")


def built(family, **changes):
    model = small_models.perturbed(small_models.build(family, **changes))
    names = NAMES if model.config.num_classes == len(NAMES) else None
    model.info = ModelInfo(class_names=names, preprocess={"resize": 40, "crop": 32})
    return model


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A model, its file with preprocessing, and what it answers to five images."""
    model, path = built("swin"), tmp_path_factory.mktemp("stablehlo") / "a.stablehlo"
    pf.export.stablehlo(model, path, preprocess=True)
    expected = jax.jit(lambda model, x: jax.nn.softmax(model(normalise(x))))(model, pixels(5))
    return model, path, np.asarray(expected)


def test_it_computes_what_the_model_does_for_any_batch(swin):
    model, path, expected = swin
    program = pf.export.load_stablehlo(path)
    for part in (slice(0, 3), slice(3, 4)):
        np.testing.assert_allclose(program(pixels(5)[part]), expected[part], atol=2e-6)
    assert program.metadata["platforms"] == ["cpu", "cuda", "tpu"] and program.weights is None
    assert program.metadata["model"] == "PolaSwin" and program.metadata["classes"] == list(NAMES)
    assert program.metadata["inputs"] == {"images": {"shape": ["batch", 32, 32, 3], "dtype": "uint8"}}
    prepared = program.metadata["preprocess"]
    assert (prepared["resize"], prepared["crop"], prepared["normalised_inside"]) == (40, 32, True)
    assert set(program.exported.platforms) == {"cpu", "cuda", "tpu"}


def test_it_names_no_file_of_this_machine(swin):
    with zipfile.ZipFile(swin[1]) as archive:
        content = archive.read("program.bin")
    assert b"site-packages" not in content and b".py" not in content and str(ROOT).encode() not in content
    assert jax.config.jax_traceback_in_locations_limit != 0  # as before


@pytest.mark.slow
def test_weights_lie_beside_it_on_demand(tmp_path):
    model = small_models.perturbed(tiny())
    pf.export.stablehlo(model, tmp_path / "a.stablehlo", weights="beside", platforms=["cpu"])
    assert len(np.load(tmp_path / "a.npz").files) == len(weights.flatten(nnx.to_pure_dict(nnx.state(model))))
    program = pf.export.load_stablehlo(tmp_path / "a.stablehlo")
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32))
    np.testing.assert_allclose(jax.jit(program)(images), jax.jit(lambda m, x: m(x))(model, images), atol=2e-6)
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (None, b"", b"text", whole[:-100]):
        os.remove(tmp_path / "a.npz") if content is None else (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"the weights of .*a.stablehlo, .*a.npz, cannot be read"):
            pf.export.load_stablehlo(tmp_path / "a.stablehlo")
    np.savez(tmp_path / "a.npz", **{"head.bias": np.zeros(4, np.float32)})
    with pytest.raises(UserError, match=r"a.npz does not hold the weights of .*: block1.0.attn.dwc.bias"):
        pf.export.load_stablehlo(tmp_path / "a.stablehlo")


def test_sequence_models_take_tokens_and_lengths(tmp_path):
    sizes = {"vocabulary": 8, "max_length": 8, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8, "head_dim": 8}
    model = pf.PolaSequence(**sizes, num_classes=2, texts=2, rngs=nnx.Rngs(0))
    pf.export.stablehlo(model, tmp_path / "a.stablehlo", platforms=["cpu"])
    program = pf.export.load_stablehlo(tmp_path / "a.stablehlo")
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 8, (3, 2, 8), np.int32), rng.integers(0, 9, (3, 2), np.int32)
    expected = jax.jit(lambda m, *x: m(Sequences(*x)))(model, tokens, lengths)
    np.testing.assert_allclose(program(tokens, lengths), expected, atol=2e-6)
    for inputs, message in (
        ((tokens,), "1 arrays, expected tokens, lengths"),
        ((tokens, lengths[:2]), "3 tokens, 2 lengths: expected at least 1, and as many of each"),
        ((tokens[:0], lengths[:0]), "0 tokens, 0 lengths: expected at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            program(*inputs)


@pytest.mark.parametrize("choice", [{"attention": "softmax"}, {"attention": "relu", "gate": False}], ids=str)
def test_other_attentions_are_exported(tmp_path, choice):
    model = built("pvt", **choice)
    pf.export.stablehlo(model, tmp_path / "a.stablehlo", platforms=["cpu"])
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    expected = jax.jit(lambda m, x: m(x))(model, images)
    np.testing.assert_allclose(pf.export.load_stablehlo(tmp_path / "a.stablehlo")(images), expected, atol=2e-6)


def test_a_model_without_classifier_gives_features(tmp_path):
    model = built("swin", num_classes=0)
    pf.export.stablehlo(model, tmp_path / "a.stablehlo", platforms=["cpu"])
    program = pf.export.load_stablehlo(tmp_path / "a.stablehlo")
    assert program.metadata["outputs"] == ["features"]
    assert program(np.zeros((1, 32, 32, 3), np.float32)).shape == (1, 64)


def test_a_process_that_has_only_jax_loads_and_calls_it(swin, tmp_path):
    """By the program that the documentation shows."""
    _, path, expected = swin
    page = (ROOT / "docs/deployment.md").read_text()
    (program,) = re.findall(r"```python\n(import json\nimport zipfile\n.*?)```", page, re.DOTALL)
    np.save(tmp_path / "images.npy", pixels(5)[:2])
    program = program.replace("pola_swin_t.stablehlo", str(path))
    lines = [
        "import sys",
        "for name in ('polaformer_jax', 'flax', 'safetensors', 'etils', 'PIL'): sys.modules[name] = None",
        "import numpy as np",
        "images = np.load('images.npy')",
        program,
        "np.save('answer.npy', probabilities)",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), expected[:2], atol=2e-6)
    assert ended.stdout.split() == [NAMES[label] for label in expected[:2].argmax(1)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), r"images: float32 .*, expected uint8 \(batch, 32, 32, 3\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"images: uint8 \(1, 3, 32, 32\), expected uint8"),
        (np.zeros((32, 32, 3), np.uint8), r"images: uint8 \(32, 32, 3\), expected"),
        (np.uint8(0), r"images: uint8 \(\), expected"),
        ([[1, 2]], r"images: int64 \(1, 2\), expected"),
    ],
)
def test_inputs_that_do_not_fit_are_named(swin, images, message):
    with pytest.raises(UserError, match=message):
        pf.export.load_stablehlo(swin[1])(images)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"dtype": "int8"},
            "dtype: 'int8': expected one of bfloat16, .*. Integers of 8 bits are not",
        ),
        ({}, {"weights": "outside"}, "weights: 'outside': expected inside or beside"),
        ({}, {"platforms": ["cpu", "npu"]}, r"platforms: \['cpu', 'npu'\]: expected some of cpu, cuda"),
        ({}, {"platforms": []}, "platforms: .*: expected some of cpu"),
        ({}, {"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ({}, {"path": "a.bin"}, "path: 'a.bin': expected a name that ends in .stablehlo"),
        ({"num_classes": 0}, {"preprocess": True}, "preprocess: the model has no classifier .num_classes=0."),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(changes, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        pf.export.stablehlo(built("swin", **changes), **{"path": "a.stablehlo", **options})
    assert os.listdir() == []


def test_files_of_another_kind_or_version_are_named(swin, tmp_path, monkeypatch):
    path = tmp_path / "b.stablehlo"
    for content, message in (
        (b"", "is damaged, or no program that `polaformer export --format stablehlo` wrote"),
        (b"text" * 100, "is damaged, or no program"),
        (swin[1].read_bytes()[:-200], "is damaged, or no program"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            pf.export.load_stablehlo(path)
    with pytest.raises(UserError, match="none.stablehlo cannot be read: No such file"):
        pf.export.load_stablehlo("none.stablehlo")
    with zipfile.ZipFile(swin[1]) as archive:
        metadata, program = json.loads(archive.read("metadata.json")), archive.read("program.bin")
    for changes, content, message in (
        ({"format": "polaformer_jax/stablehlo/2"}, program, "has the format 'polaformer_jax/stablehlo/2', expected"),
        ({"jax": "9.9"}, program[:100], f"was written with JAX 9.9 .*, and JAX {jax.__version__} cannot read it"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", json.dumps({**metadata, **changes}))
            archive.writestr("program.bin", content)
        with pytest.raises(UserError, match=message):
            pf.export.load_stablehlo(path)


def test_a_fixed_batch_is_the_only_one(tmp_path):
    pf.export.stablehlo(built("pvt"), tmp_path / "a.stablehlo", batch_size=2, platforms=["cpu"], dtype="bfloat16")
    program = pf.export.load_stablehlo(tmp_path / "a.stablehlo")
    assert program(np.zeros((2, 32, 32, 3), np.float32)).shape == (2, 5)
    with pytest.raises(UserError, match="a batch of 1: the program was exported for batches of 2"):
        program(np.zeros((1, 32, 32, 3), np.float32))
    assert stablehlo_file.FORMAT == program.metadata["format"] and program.metadata["batch_size"] == 2


def test_the_command_exports_a_file_of_weights(tmp_path, capsys):
    pf.save_weights(built("swin"), tmp_path / "a.safetensors")
    words = ["export", "--source", str(tmp_path / "a.safetensors"), str(tmp_path / "a.stablehlo")]
    assert cli.main([*words, "--preprocess", "--platforms", "cpu"]) == 0
    assert "a.stablehlo: the program of" in capsys.readouterr().out
    assert pf.export.load_stablehlo(tmp_path / "a.stablehlo").metadata["preprocess"]["resize"] == 40
    assert cli.main(words) == 1
    assert "a.stablehlo exists: give another name, or --overwrite" in capsys.readouterr().err
    (tmp_path / "b.npz").write_text("data of mine")
    words = [*words[:-1], str(tmp_path / "b.stablehlo"), "--store-weights=beside"]
    assert cli.main(words) == 1
    assert "b.npz exists: give another name, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "b.npz").read_text() == "data of mine" and not (tmp_path / "b.stablehlo").exists()


def test_names_of_other_classes_are_refused(tmp_path):
    model = built("pvt")
    model.info = ModelInfo(class_names=("ant", "bee"))
    for export in (
        lambda: pf.export.stablehlo(model, tmp_path / "a.stablehlo"),
        lambda: pf.push_to_hub(model, "user/name", dry_run=tmp_path / "folder"),
    ):
        with pytest.raises(UserError, match="model.info names 2 classes, but the model has 5"):
            export()
    assert os.listdir(tmp_path) == []


def test_a_model_of_another_type_is_exported_in_float32(tmp_path):
    model = built("pvt", dtype="bfloat16")
    program = pf.export.program_of(model)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    (logits,) = jax.jit(program.function)(program.params, images)
    expected = jax.jit(lambda m, x: m(x))(built("pvt"), images)
    np.testing.assert_allclose(logits, expected, atol=2e-6)
