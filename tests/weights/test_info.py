"""What is known of a model besides its function travels with it, and never makes it another model."""

import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.weights import conversion, imagenet
from tests.support import small_models
from tests.support.tiny_weights import tiny
from tests.support.torch_files import write_pth

INFO = ModelInfo(
    class_names=("ant", "bee", "cat"),
    preprocess={"resize": 36, "crop": 32},
    facts={"data": "insects", "step": 7, "accuracy": 0.9},
    other={"note": "by hand"},
)


def fields(info):
    return {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}


def named():
    model = tiny()
    model.info = INFO
    return model


@pytest.mark.parametrize("layout", ["ours", "torch"])
def test_it_is_saved_and_loaded(layout, tmp_path):
    pf.save_weights(named(), tmp_path / "a.safetensors", layout=layout)
    assert fields(pf.create_model(weights=tmp_path / "a.safetensors").info) == fields(INFO)
    pf.save_weights(named(), tmp_path / "b.safetensors", metadata={"classes": '["x", "y", "z"]'})
    assert pf.create_model(weights=tmp_path / "b.safetensors").info.class_names == ("x", "y", "z")
    model = named()
    pf.load_weights(model, weights.to_torch(tiny(seed=1)))  # other weights, of which nothing is known
    assert fields(model.info) == fields(ModelInfo())


def test_what_does_not_hold_any_more_is_left_out(tmp_path):
    pf.save_weights(named(), tmp_path / "a.safetensors")
    other_classes = pf.create_model(weights=tmp_path / "a.safetensors", num_classes=4).info
    not_measured = {"data": "insects", "step": 7}  # another model than that of the accuracy
    assert fields(other_classes) == {**fields(INFO), "class_names": None, "facts": not_measured}
    assert fields(pf.create_model(weights=tmp_path / "a.safetensors", num_classes=3).info) == fields(INFO)
    other_size = pf.create_model(weights=tmp_path / "a.safetensors", img_size=64).info
    assert fields(other_size) == {**fields(INFO), "preprocess": None, "facts": not_measured}


def test_it_belongs_to_no_program(tmp_path):
    one, other = nnx.split(named())[0], nnx.split(tiny())[0]
    assert one == other and hash(one) == hash(other)
    traced = []
    call = jax.jit(lambda graphdef, x: traced.append(graphdef) or x, static_argnums=0)
    call(one, 1), call(other, 1)
    assert len(traced) == 1
    assert fields(nnx.merge(*nnx.split(named())).info) == fields(INFO)
    assert fields(copy.deepcopy(named()).info) == fields(INFO)
    assert fields(nnx.clone(named()).info) == fields(INFO)


def official(num_classes, dataset, tmp_path):
    config = {} if dataset is None else {"config": {"DATA": {"DATASET": dataset}}}
    content = {"model": weights.to_torch(tiny(num_classes=num_classes)), "epoch": 299, **config}
    return write_pth(tmp_path / "a.pth", content)


@pytest.mark.parametrize(
    ("num_classes", "dataset", "known"),
    [(1000, None, True), (1000, "imagenet", True), (1000, "my", False), (3, None, False)],
)
def test_official_weights_have_the_classes_of_imagenet(num_classes, dataset, known, tmp_path):
    path = official(num_classes, dataset, tmp_path)
    assert weights.read_file(path).class_names is None  # it does not say so
    model = pf.create_model(weights=path)
    assert (model.info.class_names is not None) == known
    assert model.info.facts["epoch"] == 299
    if dataset == "imagenet":  # a converted file has them
        conversion.convert(path, tmp_path / "a.safetensors")
        assert weights.read_file(tmp_path / "a.safetensors").class_names == model.info.class_names
        (result,) = pf.predict(model, jnp.zeros((32, 32, 3), jnp.uint8), top=1000)
        assert {found["class"]: found["name"] for found in result["predictions"]}[281] == "tabby, tabby cat"


def test_the_classes_of_imagenet_are_in_the_order_of_its_labels():
    import tensorflow_datasets

    listed = Path(tensorflow_datasets.__file__).parent / "datasets/imagenet2012/labels.txt"
    assert list(imagenet.classes()) == listed.read_text().split()
    assert imagenet.in_words(["n01440764", "a cat"]) == ("tench, Tinca tinca", "a cat")
    assert Path(imagenet.__file__).with_name("imagenet_classes.txt").stat().st_size < 40_000


def test_sequence_models_keep_what_belongs_to_their_task(tmp_path):
    model = pf.PolaSequence(
        vocabulary=8, max_length=8, dim=8, depth=1, num_heads=2, mlp_dim=8, head_dim=8, num_classes=2, rngs=nnx.Rngs(0)
    )
    model.info = ModelInfo(other={"task": '{"name": "text"}'})
    pf.save_weights(model, tmp_path / "a.safetensors")
    assert pf.create_model(weights=tmp_path / "a.safetensors").info.other == {"task": '{"name": "text"}'}


def test_small_models_know_nothing():
    assert fields(small_models.build("pvt").info) == fields(ModelInfo())
