"""A model goes to the Hugging Face Hub and comes back bit for bit, with all that belongs to it."""

import json
import os
import re
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import polaformer_jax as pf
from polaformer_jax import cli, weights
from polaformer_jax.errors import UserError
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.model_info import ModelInfo
from polaformer_jax.weights import imagenet
from tests.support import small_models
from tests.support.stub_hub import COMMIT, hub
from tests.support.tiny_weights import assert_same, official, pure, tiny

INFO = ModelInfo(
    class_names=("ant", "bee", "c|at"),
    preprocess={"resize": 36, "crop": 32},
    facts={"data": "insects", "step": 7, "kind": "ema"},
)
EVALUATION = {"data": "insects", "split": "test", "accuracy": 0.9375, "accuracy_top5": 1.0, "images": 32}


@pytest.fixture(autouse=True)
def empty_hub(tmp_path, monkeypatch):
    """An empty Hub and cache for each test, and a token of an owner."""
    from huggingface_hub import constants

    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def named(**changes):
    model = tiny(**changes)
    model.info = INFO
    return model


def test_it_comes_back_bit_for_bit_with_names_and_preprocessing():
    model = named()
    address = pf.push_to_hub(model, "user/name", evaluation=EVALUATION, license="mit", official_layout=True)
    assert address.endswith(f"/user/name/commit/{COMMIT}") and hub.token == "hf_secret"
    names = {"README.md", "config.json", "model.safetensors", "pytorch.safetensors"}
    assert hub.commits == [("Upload PolaPVT with polaformer_jax", names)]
    found = pf.create_model("hf://user/name")
    assert found.config == model.config
    assert_same(pure(found), pure(model))
    assert (found.info.class_names, found.info.preprocess, found.info.facts) == (
        INFO.class_names, INFO.preprocess, INFO.facts,
    )  # fmt: skip
    theirs = weights.read_file("hf://user/name/pytorch.safetensors")
    for name, tensor in official(model).items():
        np.testing.assert_array_equal(theirs.tensors[name], tensor)
    pf.push_to_hub(model, "hf://user/name", message="again")  # which exists now
    assert hub.commits[1] == ("again", names - {"pytorch.safetensors"})


def test_the_config_is_in_the_form_of_timm(tmp_path):
    pf.push_to_hub(named(), "user/name", dry_run=tmp_path / "folder")
    content = json.loads((tmp_path / "folder/config.json").read_text())
    assert (content["architecture"], content["num_classes"], content["num_features"]) == ("PolaPVT", 3, 8)
    assert content["label_names"] == ["ant", "bee", "c|at"] and "label_descriptions" not in content
    assert pf.PolaPVTConfig(**content["model_args"], num_classes=3) == tiny().config
    assert content["pretrained_cfg"] == {
        "custom_load": False,
        "input_size": [3, 32, 32],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 32 / 36,
        "crop_mode": "squash",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 3,
        "pool_size": [1, 1],
        "classifier": "head",
    }


@pytest.mark.parametrize("name", ["pola_pvt_nano", "pola_swin_nano", "pola_swin_t"])
def test_registered_models_are_named(name):
    from polaformer_jax.export.repository import timm_config

    model = pf.create_model(name, rngs=AbstractKeys())
    content = timm_config(model)
    assert content["architecture"] == name
    assert content["num_features"] == model.head.in_features


def test_the_card_has_data_accuracy_licence_and_a_snippet_that_runs(tmp_path):
    pf.push_to_hub(named(), "user/name", evaluation=EVALUATION, license="mit")
    card = hub.files["user/name"]["README.md"].decode()
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "polaformer_jax", "image-classification")
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "accuracy": 0.9375, "accuracy_top5": 1.0,
    }  # fmt: skip
    assert "| data | split | examples | top-1 | top-5 |\n|---|---|---|---|---|\n" in card
    assert "\n| insects | test | 32 | 93.75 % | 100.00 % |" in card
    assert "- Data: insects\n- Step: 7\n- Weights: moving average" in card
    assert "ant; bee; c\\|at" in card and "## Licence\n\nmit" in card
    assert "resized to 36 x 36 pixels" in card and "4,127 parameters" in card
    (snippet,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.jpg")
    printed = []
    folder = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(snippet, {"print": printed.append})
    finally:
        os.chdir(folder)
    assert printed[0][0]["predictions"][0]["name"] in INFO.class_names


def test_no_folder_of_the_machine_that_trained_is_published(tmp_path):
    model = named()
    config = {"DATA": {"DATA_PATH": "/home/alice/imagenet"}, "OUTPUT": "/home/alice/runs"}
    model.info = ModelInfo(facts={"epoch": 299, "config": config})
    pf.push_to_hub(model, "user/name", dry_run=tmp_path / "folder", official_layout=True)
    for path in (tmp_path / "folder").iterdir():
        assert b"alice" not in path.read_bytes(), path.name
    assert pf.create_model(weights=tmp_path / "folder").info.facts == {"epoch": 299}
    assert model.info.facts["config"] is config


def test_a_branch_is_named_in_the_snippet_and_must_exist():
    pf.push_to_hub(named(), "user/name")
    pf.push_to_hub(named(), "user/name", revision="main")
    assert 'pf.create_model("hf://user/name@main")' in hub.files["user/name"]["README.md"].decode()
    with pytest.raises(UserError, match="hf://user/other: there is no such repository"):
        pf.push_to_hub(named(), "user/other", revision="main")
    assert "user/other" not in hub.files


def test_nothing_is_uploaded_offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nothing can be uploaded while HF_HUB_OFFLINE is set"):
        pf.push_to_hub(named(), "user/name")
    assert not hub.requests


def test_what_is_not_known_is_not_claimed(tmp_path):
    pf.push_to_hub(tiny(), "user/name", dry_run=tmp_path / "folder")
    card = (tmp_path / "folder/README.md").read_text()
    assert "Not stated.\n\nNot evaluated." in card and "## Licence\n\nNot stated." in card
    assert "## Classes" not in card and "license" not in card.split("---")[1]
    assert not hub.requests and not hub.commits
    found = pf.create_model(weights=tmp_path / "folder")  # a folder is read as the repository is
    assert_same(pure(found), pure(tiny()))


def test_classes_of_imagenet_are_described(tmp_path):
    model = tiny(num_classes=1000)
    model.info = ModelInfo(class_names=tuple(imagenet.classes()))
    pf.push_to_hub(model, "user/name", dry_run=tmp_path / "folder")
    content = json.loads((tmp_path / "folder/config.json").read_text())
    assert content["label_names"][281] == "n02123045"
    assert content["label_descriptions"]["n02123045"] == "tabby, tabby cat"
    assert "and 980 more, see `config.json`" in (tmp_path / "folder/README.md").read_text()


@pytest.mark.parametrize("build", [lambda: small_models.build("swin", num_classes=0), lambda: sequence()])
def test_models_that_classify_no_images(build, tmp_path):
    model = build()
    pf.push_to_hub(model, "user/name", dry_run=tmp_path / "folder")
    found = pf.create_model(weights=tmp_path / "folder")
    assert found.config == model.config
    assert_same(pure(found), pure(model))
    card = (tmp_path / "folder/README.md").read_text()
    if found.config.family == "PolaSwin":
        assert "pipeline_tag: image-feature-extraction" in card
        assert 'model.features(pf.preprocess(model, "photo.jpg"))' in (tmp_path / "folder/README.md").read_text()
        assert pf.preprocess(found, np.zeros((8, 8, 3), np.uint8)).shape == (1, 32, 32, 3)


def sequence():
    sizes = {"vocabulary": 8, "max_length": 8, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8, "head_dim": 8}
    return pf.PolaSequence(**sizes, num_classes=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("name", {}, "repo: 'name': expected OWNER/NAME"),
        ("user/na me", {}, "expected OWNER/NAME"),
        ("hf://user/name/file", {}, "expected OWNER/NAME"),
        ("user/name", {"evaluation": {"loss": 1.0}}, "evaluation: the evaluation has loss; expected accuracy"),
        ("user/name", {"evaluation": {**EVALUATION, "accuracy": 93.75}}, "expected accuracy between 0 and 1"),
        ("user/name", {"license": ""}, "license: '': expected the name of a licence on the Hub, such as mit"),
        ("stranger/name", {}, "hf://stranger/name: the Hub refuses it: log in"),
        ("user/name", {"revision": "v2"}, "hf://user/name: there is no such repository"),
        ("user/name", {"dry_run": "{full}"}, "dry_run: .* exists, and is no empty folder"),
        ("user/name", {"dry_run": "{full}/file"}, "dry_run: .* exists, and is no empty folder"),
        ("user/name", {"dry_run": "/proc/none/folder"}, "dry_run: repository '/proc/none/folder' cannot be written"),
        ("user/name", {"dry_run": "s3://bucket"}, "dry_run: s3://bucket: s3:// is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_named(repo, options, message, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    if "dry_run" in options:
        options = {"dry_run": options["dry_run"].format(full=tmp_path / "full")}
    with pytest.raises(UserError, match=message):
        pf.push_to_hub(named(), repo, **options)
    assert not hub.commits and os.listdir(tmp_path / "full") == ["file"]


def test_the_command_pushes_a_file_with_its_evaluation(tmp_path, capsys):
    pf.save_weights(named(), tmp_path / "a.safetensors")
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    words = ["push", "user/name", "--source", str(tmp_path / "a.safetensors"), "--license=mit"]
    assert cli.main([*words, "--evaluation", str(tmp_path / "eval.json")]) == 0
    assert capsys.readouterr().out.strip().endswith(f"/user/name/commit/{COMMIT}")
    assert "93.75 %" in hub.files["user/name"]["README.md"].decode()
    (tmp_path / "eval.json").write_text("[]")
    assert cli.main([*words, "--evaluation", str(tmp_path / "eval.json")]) == 1
    assert "holds a list, expected the result of `polaformer eval`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which model? Give --workdir DIR"),
        (["--workdir", "a", "--source", "b"], "which model? Give --workdir DIR"),
        (["--source", "b", "--checkpoint", "best"], "--checkpoint and --weights say which weights of a training"),
        (["--workdir", "a", "--model", "b"], "a training knows its own"),
        (["--source", "none.pth"], "there is no weights file none.pth"),
        (["--workdir", "none"], "none"),
    ],
)
def test_the_command_names_what_is_wrong(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["push", "user/name", *words]) in (1, 2)
    assert message in capsys.readouterr().err and not hub.commits


def test_without_the_library_the_extra_is_named_before_any_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["push", "user/name", "--source", "none.pth"]) == 2
    assert 'pip install "polaformer_jax[hub]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "choice, linear, said",
    [
        ({}, True, None),
        ({"attention": "relu", "gate": False}, True, "Its attention is not the paper's: relu attention, no gate."),
        ({"attention": "softmax"}, False, "Its attention is not the paper's: softmax attention."),
    ],
)
def test_the_card_says_which_attention_it_is(choice, linear, said):
    pf.push_to_hub(named(**choice), "user/name", license="mit")
    card = hub.files["user/name"]["README.md"].decode()
    assert ("- linear-attention\n" in card) == linear
    assert "not the paper's" not in card if said is None else said in card
    assert pf.create_model("hf://user/name").config.attention == choice.get("attention", "polarity")


def test_what_has_no_official_layout_is_not_uploaded():
    with pytest.raises(weights.WeightsError, match="a model with softmax attention has no official layout"):
        pf.push_to_hub(named(attention="softmax"), "user/name", official_layout=True)
    assert hub.commits == []
