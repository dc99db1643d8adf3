"""Weights by their address on the Hugging Face Hub: downloaded once, verified, and refused with a reason."""

import os
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import cli, weights
from polaformer_jax.errors import UserError, WeightsError
from tests.support import small_models
from tests.support.stub_hub import COMMIT, hub
from tests.support.tiny_weights import assert_same, pure, tiny


@pytest.fixture(autouse=True)
def empty_hub(tmp_path, monkeypatch):
    """An empty Hub and cache for each test."""
    from huggingface_hub import constants

    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def put(model, repo="user/name", file="model.safetensors", *, tmp_path, **how):
    weights.save_weights(model, tmp_path / "put.safetensors", **how)
    hub.files.setdefault(repo, {})[file] = (tmp_path / "put.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "repo", "file", "revision"),
    [
        ("hf://user/name", "user/name", "model.safetensors", None),
        ("hf://user/name@v1", "user/name", "model.safetensors", "v1"),
        ("hf://user/name/a.pth", "user/name", "a.pth", None),
        ("hf://user/na.me-2_x/sub/a.pth@refs/pr/1", "user/na.me-2_x", "sub/a.pth", "refs/pr/1"),
    ],
)
def test_an_address_is_read(text, repo, file, revision):
    assert weights.hub.Address.parse(text) == (repo, file, revision)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://name", "hf://user/", "hf://user/name@", "hf://user/name/../a", "hf://u s/n"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(WeightsError, match="expected hf://OWNER/REPOSITORY/FILE"):
        weights.read_file(text)


@pytest.mark.parametrize("small", [False, True])
def test_a_file_is_fetched_once_and_read_as_a_local_one(small, tmp_path):
    model = tiny()
    put(model, tmp_path=tmp_path)
    if small:
        hub.small.add("user/name")
    for _ in range(2):
        found = tiny(seed=1)
        weights.load_weights(found, "hf://user/name")
        assert_same(pure(found), pure(model))
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "HEAD"]
    hub.requests.clear()
    weights.read_file(f"hf://user/name@{COMMIT}")
    assert not hub.requests  # a commit does not change


def test_an_official_checkpoint_is_read_by_the_safe_reader(tmp_path):
    from tests.support.torch_files import write_pth

    model = small_models.build("pvt")
    write_pth(tmp_path / "a.pth", {"model": weights.to_torch(model), "epoch": 3})
    hub.files["ZachMeng/PolaFormer"] = {"a.pth": (tmp_path / "a.pth").read_bytes()}
    found = small_models.build("pvt")
    pf.load_weights(found, "hf://ZachMeng/PolaFormer/a.pth@main")
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, found)))
    assert weights.read_file("hf://ZachMeng/PolaFormer/a.pth").facts == {"epoch": 3}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://nobody/nothing", "there is no such repository, or it is private: check the name, or log in"),
        ("hf://user/gated", "the repository is gated: accept its terms on its page, then log in"),
        ("hf://user/name@v7", "the repository has no revision 'v7'"),
        ("hf://user/name/none.pth", "the repository has no file 'none.pth'"),
    ],
)
def test_what_is_not_there_is_named(address, message, tmp_path):
    put(tiny(), tmp_path=tmp_path)
    hub.gated.add("user/gated")
    with pytest.raises(WeightsError, match=message) as error:
        weights.read_file(address)
    assert str(error.value).startswith("hf://")


def test_offline_the_cache_is_used(tmp_path, monkeypatch):
    from huggingface_hub import constants

    put(tiny(), tmp_path=tmp_path)
    weights.read_file("hf://user/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert weights.read_file("hf://user/name").layout == "ours"
    with pytest.raises(WeightsError, match="it is not in the cache, and the Hub cannot be reached"):
        weights.read_file("hf://user/other")
    assert not hub.requests


def test_a_damaged_file_is_refused_on_the_way_and_in_the_cache(tmp_path):
    put(tiny(), tmp_path=tmp_path)
    hub.broken = True
    with pytest.raises(WeightsError, match="hf://user/name/model.safetensors is damaged in the cache"):
        weights.read_file("hf://user/name")


def test_the_token_of_the_environment_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    put(tiny(), tmp_path=tmp_path)
    weights.read_file("hf://user/name")
    assert hub.token == "hf_secret"


def test_a_model_in_one_call(tmp_path):
    model = small_models.build("pvt", num_classes=3)
    put(model, tmp_path=tmp_path, metadata={"classes": '["a", "b", "c"]'})
    for found in (pf.create_model("hf://user/name"), pf.create_model(weights="hf://user/name")):
        assert found.config == model.config
    with pytest.raises(UserError, match="both name weights: give one of them"):
        pf.create_model("hf://user/name", weights="a.safetensors")
    assert weights.read_file("hf://user/name").class_names == ("a", "b", "c")


def test_the_converter_writes_to_the_current_folder(tmp_path, monkeypatch, capsys):
    put(small_models.build("pvt"), file="sub/a.safetensors", tmp_path=tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["convert", "hf://user/name/sub/a.safetensors@main"]) == 0
    assert os.listdir() == ["a.safetensors"]
    assert "hf://user/name/sub/a.safetensors@main -> a.safetensors" in capsys.readouterr().out


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r'pip install "polaformer_jax\[hub\]"'):
        weights.read_file("hf://user/name")
