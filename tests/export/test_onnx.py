"""ONNX files compute what the models compute, in few nodes. Runs where the extra `onnx` is installed."""

import collections
import importlib.resources
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import cli
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.images.transforms import EvalImageTransform
from polaformer_jax.errors import UserError
from polaformer_jax.export import onnx_file
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.models.pola_sequence import Sequences
from polaformer_jax.weights import flatten
from tests.support import ROOT, small_models
from tests.support.small_models import perturbed

pytest.importorskip("jax2onnx")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-5  # of logits of about 1


def photographs(size: int) -> np.ndarray:
    """(2, size, size, 3) uint8: the photographs of scikit-learn, as evaluation prepares them."""
    transform = EvalImageTransform(resize=round(size * 256 / 224), crop=size, num_classes=1)
    folder = importlib.resources.files("sklearn.datasets.images")
    files = [(folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")]
    return np.stack([transform({"image": file, "label": 0})["image"] for file in files])


class Exported:
    """A file, and what it computes."""

    def __init__(self, path, model, function, inputs, outputs=("logits",), **options):
        self.weights = flatten(nnx.to_pure_dict(nnx.state(model)))
        options = {"metadata": {}, **options}
        onnx_file.write(function, inputs, path, outputs=outputs, weights=self.weights, **options)
        self.size = os.path.getsize(path)
        self.proto = onnx.load(path)
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs, self.function = list(inputs), list(outputs), jax.jit(function)

    def __call__(self, *arrays) -> list[np.ndarray]:
        return self.session.run(self.outputs, dict(zip(self.inputs, arrays, strict=True)))

    def check(self, *arrays, tolerance=TOLERANCE):
        """Compares with JAX: the whole batch, and its first example alone."""
        expected = self.function(*arrays)
        expected = expected if isinstance(expected, tuple) else (expected,)
        first = self(*(array[:1] for array in arrays))
        for want, got, alone in zip(expected, self(*arrays), first, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
            np.testing.assert_allclose(alone, want[:1], rtol=0, atol=tolerance)
            assert np.ptp(np.asarray(want), axis=0).max() > 100 * tolerance  # examples differ

    @property
    def nodes(self) -> collections.Counter:
        return collections.Counter(node.op_type for node in self.proto.graph.node)

    def groups(self) -> list[int]:
        return [
            attribute.i
            for node in self.proto.graph.node
            if node.op_type == "Conv"
            for attribute in node.attribute
            if attribute.name == "group"
        ]


def image_input(size: int, dtype=jnp.float32):
    return {"images": (("batch", size, size, 3), dtype)}


def exported_images(path, model, **options) -> Exported:
    return Exported(str(path), model, lambda images: model(images), image_input(model.config.img_size), **options)


IMAGE_MODELS = {
    "pvt": ("pvt", {}, [8, 12, 16]),
    "pvt of type S": ("pvt", {"attn_type": "SSSS"}, []),
    "swin with S": ("swin", {}, [8, 8, 32]),
    "swin, mixed": ("swin", {"attn_type": "MLSL1"}, [8, 16, 16, 64]),
    "swin, shifted": ("swin", {"attn_type": "LLLL", "window_size": 2, "depths": (2, 1, 1, 1)}, [8, 8, 16, 32, 64]),
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_an_image_model(name, tmp_path):
    family, changes, groups = IMAGE_MODELS[name]
    model = perturbed(small_models.build(family, **changes), scale=0.1)
    exported = exported_images(tmp_path / "model.onnx", model)
    exported.check(np.asarray(normalise(photographs(32))))
    blocks = sum(len(model.blocks(stage)) for stage in range(4))
    norms = sum(isinstance(module, nnx.LayerNorm) for _, module in nnx.iter_modules(model))
    nodes = exported.nodes
    assert exported.groups() == groups  # one channel each, and no more convolutions than blocks of type L
    assert nodes["Gelu"] == blocks and nodes["LayerNormalization"] == norms
    assert nodes["Softmax"] == blocks - len(groups)
    assert nodes["Exp"] == nodes["Log"] == 2 * len(groups)  # of queries and of keys
    assert not {"Pow", "Erf", "Sqrt", "Einsum", "Expand", "Shape", "Where", "Pad"} & set(nodes)
    assert exported.size < 1.02 * sum(w.nbytes for w in exported.weights.values()) + 60_000 + 1100 * sum(nodes.values())


SEQUENCES = {
    "max_length": 24,
    "vocabulary": 20,
    "num_classes": 4,
    "dim": 16,
    "num_heads": 2,
    "mlp_dim": 16,
    "head_dim": 8,
}


@pytest.mark.parametrize("attention, texts", [("polarity", 1), ("polarity", 2), ("softmax", 1), ("relu", 1)])
def test_a_sequence_model(attention, texts, tmp_path):
    """Of full, short and empty sequences."""
    model = perturbed(pf.PolaSequence(attention=attention, texts=texts, **SEQUENCES, rngs=nnx.Rngs(0)), scale=0.3)
    shape = (24,) if texts == 1 else (2, 24)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 20, (4, *shape), np.int32)
    length = np.resize(np.array([17, 24, 0, 1, 5], np.int32), (4, *shape[:-1]))
    exported = Exported(
        str(tmp_path / "model.onnx"),
        model,
        lambda tokens, length: model(Sequences(tokens, length)),
        {"tokens": (("batch", *shape), jnp.int32), "length": (("batch", *shape[:-1]), jnp.int32)},
    )
    exported.check(tokens, length)
    assert exported.groups() == ([16, 16] if attention == "polarity" else [])
    nodes = exported.nodes
    assert nodes["LayerNormalization"] == 5 and nodes["Gelu"] == 2
    assert nodes["Softmax"] == (2 if attention == "softmax" else 0)
    other = tokens.copy()
    other[np.arange(24) >= length[..., None]] = 7  # padding is ignored
    np.testing.assert_array_equal(exported(tokens, length), exported(other, length))


@pytest.fixture(scope="module")
def pixels_to_probabilities(tmp_path_factory) -> Exported:
    """A model of both kinds of attention, from bytes to probabilities, written with rematerialised blocks."""
    model = perturbed(small_models.build("pvt"), scale=0.1)
    model.remat = True

    def probabilities(images):
        return jax.nn.softmax(model(normalise(images)), axis=-1)

    path = str(tmp_path_factory.mktemp("onnx") / "model.onnx")
    metadata = {"model": "a small one", "classes": '["é", "b"]'}
    inputs = image_input(32, jnp.uint8)
    return Exported(path, model, probabilities, inputs, outputs=["probabilities"], metadata=metadata, opset=22)


def test_pixels_go_in_and_probabilities_come_out(pixels_to_probabilities):
    images = photographs(32)
    pixels_to_probabilities.check(images)
    np.testing.assert_allclose(pixels_to_probabilities(images)[0].sum(axis=-1), 1, atol=1e-6)
    given, result = pixels_to_probabilities.session.get_inputs()[0], pixels_to_probabilities.session.get_outputs()[0]
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 32, 32, 3])
    assert (result.name, result.type, result.shape) == ("probabilities", "tensor(float)", ["batch", 5])


def test_the_file_says_what_it_is(pixels_to_probabilities):
    proto = pixels_to_probabilities.proto
    assert (proto.producer_name, proto.producer_version) == ("polaformer_jax", pf.__version__)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {
        "model": "a small one",
        "classes": '["é", "b"]',
    }
    assert [(entry.domain, entry.version) for entry in proto.opset_import if entry.domain == ""] == [("", 22)]
    assert not proto.graph.value_info
    onnx.checker.check_model(proto, full_check=True)


def test_weights_are_stored_once_under_their_names(pixels_to_probabilities):
    stored = {array.name: array for array in pixels_to_probabilities.proto.graph.initializer}
    weights = pixels_to_probabilities.weights
    assert set(weights) <= set(stored)
    assert all(stored[name].data_type == onnx.TensorProto.FLOAT for name in weights)
    name = "block1.0.mlp.fc1.kernel"
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored[name]), weights[name])
    arrays = [onnx.numpy_helper.to_array(array) for array in stored.values()]
    large = [array.tobytes() for array in arrays if array.size > 100]
    assert len(large) == len(set(large))
    used = [name for node in pixels_to_probabilities.proto.graph.node for name in node.input]
    assert set(stored) <= set(used)


def test_zeros_and_large_inputs_are_finite(tmp_path):
    """Queries and keys of exact zeros, whose logarithm is infinite, and pixels a thousand times too large."""
    model = small_models.build("swin", attn_type="LLLL")
    for block in (block for stage in range(4) for block in model.blocks(stage)):
        block.attn.qkvg.kernel[...] = block.attn.qkvg.kernel[...].at[:, : block.attn.qkvg.kernel.shape[0]].set(0)
    exported = exported_images(tmp_path / "model.onnx", model)
    images = np.concatenate([np.zeros((1, 32, 32, 3), np.float32), 1000 * normalise(photographs(32))])
    expected, (got,) = exported.function(images), exported(images)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


NAMES = ("ant", "bee", "cat", "dog", "eel")


def informed(family, **changes):
    model = perturbed(small_models.build(family, **changes), scale=0.1)
    model.info = ModelInfo(class_names=NAMES, preprocess={"resize": 40, "crop": 32}, facts={"config": {}, "step": 3})
    return model


@pytest.mark.parametrize("family", ["pvt", "swin"])
def test_the_public_export_with_attention_maps(family, tmp_path):
    model = informed(family)
    metadata = pf.export.onnx(model, tmp_path / "a.onnx", preprocess=True, maps=(0, -1))
    session = ort.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    stored = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert stored == json.loads(json.dumps(metadata))
    assert stored["classes"] == list(NAMES) and stored["facts"] == {"step": 3} and stored["opset"] == 21
    assert stored["preprocess"]["resize"] == 40 and stored["preprocess"]["normalised_inside"]
    assert [output.name for output in session.get_outputs()] == ["probabilities", "same", "opposite"]
    images = photographs(32)
    program = pf.export.program_of(model, preprocess=True, maps=(0, -1))
    expected = jax.jit(program.function)(program.params, images)
    for got, want in zip(session.run(None, {"images": images}), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_the_command_and_the_snippet_of_the_documentation(tmp_path, monkeypatch, capsys):
    model = informed("swin")
    pf.save_weights(model, tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    words = ["export", "--source", "a.safetensors", "pola_swin_t.onnx"]
    assert cli.main([*words, "--preprocess"]) == 0
    assert "pola_swin_t.onnx: the program of a.safetensors" in capsys.readouterr().out
    page = (ROOT / "docs/deployment.md").read_text()
    (snippet,) = re.findall(r"```python\n(import json\n\nimport onnxruntime\n.*?)```", page, re.DOTALL)
    printed = []
    exec(snippet, {"images": photographs(32), "print": printed.append})
    program = pf.export.program_of(model, preprocess=True)
    (probabilities,) = jax.jit(program.function)(program.params, photographs(32))
    assert printed == [NAMES[int(probabilities[0].argmax())]]
    assert cli.main(words) == 1
    assert "exists: give another name, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": (9, 0)}, "maps: stage 9: expected an integer from 0 to 3"),
        ({"maps": (1, 0)}, "maps: block 0 of stage 1 has no two streams"),
        ({"dtype": "int8"}, "dtype: 'int8': ONNX files are written in float32. .*quantization for integers of 8 bits"),
        ({"opset": 20}, "opset: 20"),
        ({"path": "a.bin"}, "path: 'a.bin': expected a name that ends in .onnx"),
    ],
)
def test_options_that_cannot_be_are_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        pf.export.onnx(small_models.build("swin"), **{"path": "a.onnx", **options})
    assert os.listdir() == []


def written_by(tmp_path, model, **options):
    return exported_images(tmp_path / "folder" / "model.onnx", model, **options)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    model = small_models.build("pvt")
    with pytest.raises(UserError, match="opset: 20: files are written with ONNX opset 21 or later"):
        written_by(tmp_path, model, opset=20)
    with pytest.raises(UserError, match=r"opset: 99: onnx .* knows opsets up to"):
        written_by(tmp_path, model, opset=99)
    with pytest.raises(UserError, match="computed in bfloat16, .* dtype='float32'"):
        written_by(tmp_path, small_models.build("pvt", dtype=jnp.bfloat16))
    kernels = small_models.build("pvt", attention_impl="pallas")
    with pytest.raises(UserError, match="cannot be traced for inputs of any size: .*attention_impl='xla'"):
        written_by(tmp_path, kernels)
    with pytest.raises(UserError, match="runs kernels for accelerators, .*attention_impl='xla'"):
        inputs = {"images": ((1, 32, 32, 3), jnp.float32)}
        onnx_file.write(kernels, inputs, tmp_path / "folder/x.onnx", outputs=["y"], weights={}, metadata={})
    with pytest.raises(UserError, match="the model cannot be written as ONNX: .*'lgamma_of_nothing'"):
        unknown = jax.extend.core.Primitive("lgamma_of_nothing")
        unknown.def_abstract_eval(lambda x: x)
        onnx_file.write(
            unknown.bind, image_input(4), tmp_path / "folder/x.onnx", outputs=["y"], weights={}, metadata={}
        )
    with pytest.raises(ValueError, match="the function has 1 results, but 2 names are given"):
        written_by(tmp_path, model, outputs=["a", "b"])
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r'needs jax2onnx, .* pip install "polaformer_jax\[onnx\]"'):
        written_by(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_float64_is_refused(tmp_path, x64):
    with pytest.raises(UserError, match="stored or computed in float64, .* param_dtype='float32'"):
        written_by(tmp_path, small_models.build("pvt", dtype=jnp.float64, param_dtype=jnp.float64))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def fail(*args, **options):
        raise onnx.checker.ValidationError("not valid")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(onnx.checker.ValidationError):
        onnx_file.write(lambda x: x + 1, {"x": (("batch",), jnp.float32)}, path, outputs=["y"], weights={}, metadata={})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_functions_of_the_same_names_are_not_taken_for_the_models_own(tmp_path):
    @jax.jit
    def gelu(x):
        return jax.nn.gelu(x, approximate=True)

    @jax.jit
    def polarity_attention(q, k, v, g, *others):
        return q * k + v * g + sum(others)

    def function(x):
        y = gelu(model(x))[:, None]  # (B, 1, 3)
        return polarity_attention(y, y, y, y, *[y] * 5)

    model = perturbed(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    exported = Exported(str(tmp_path / "x.onnx"), model, function, {"x": (("batch", 3), jnp.float32)})
    exported.check(np.linspace(-2, 2, 12, dtype=np.float32).reshape(4, 3), tolerance=5e-6)
    assert not {"Gelu", "Conv"} & set(exported.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pola_swin_t"])
def test_a_published_model(name, tmp_path):
    model = perturbed(pf.create_model(name, rngs=nnx.Rngs(0)), scale=0.05)
    exported = exported_images(tmp_path / "model.onnx", model)
    exported.check(np.asarray(normalise(photographs(224))))
    assert exported.size < 1.02 * sum(weight.nbytes for weight in exported.weights.values())
