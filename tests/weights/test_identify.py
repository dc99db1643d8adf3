"""Which model a file holds, from the shapes of its tensors alone."""

import json

import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax import weights
from polaformer_jax.models import registry
from polaformer_jax.models.initializers import AbstractKeys
from polaformer_jax.models.model_config import differences
from polaformer_jax.weights import WeightsFile, creation, rules
from tests.support import small_models
from tests.support.golden_models import FULL, SMALL


def file_of(shapes, *, layout="torch", metadata=None, config=None, buffers=True) -> WeightsFile:
    """A file whose tensors have these shapes, and take no memory."""
    tensors = {
        name: np.broadcast_to(np.float32(0), tuple(shape))
        for name, shape in shapes.items()
        if buffers or name.rsplit(".", 1)[-1] not in rules.BUFFERS
    }
    return WeightsFile("a.pth", layout, tensors, metadata or {}, {} if config is None else {"config": config})


def official_shapes(model) -> dict:
    return {name: array.shape for name, array in weights.to_torch(model).items()}


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("name", FULL)
def test_official_models_are_recognised(name, buffers):
    config, assumed = weights.identify(file_of(FULL[name]["shapes"], buffers=buffers))
    assert registry.name_of(config) == name
    assert (config.img_size, config.num_classes) == (224, 1000)
    assert assumed == ["alpha: 4, as in all official models"]


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_block_is_recognised(name):
    spec = SMALL[name]["spec"]
    config = {"MODEL": {"LA": {"ALPHA": spec["alpha"]}, "DROP_PATH_RATE": 0.3, "SWIN": {"DEPTHS": [9, 9, 9, 9]}}}
    found, _ = weights.identify(file_of(SMALL[name]["shapes"], config=config))
    wanted = {key: value for key, value in spec.items() if key not in ("family", "patch_size", "norm_eps")}
    kind = {"pola_pvt": pf.PolaPVT, "pola_swin": pf.PolaSwin}[spec["family"]].Config
    assert differences(found, kind(**wanted)) == []
    assert found.drop_path_rate == 0.3


ZOO = [name for name in registry.list_models() if name != "pola_sequence"]
LARGE = ("pola_pp_b2", "pola_pp_b3", "pola_pp_b4", "pola_pp_b5")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in ZOO])
def test_every_model_of_the_zoo_is_recognised(name):
    model = pf.create_model(name, rngs=AbstractKeys())
    flat = weights.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    shapes = {rules.official_name(k, v.ndim): rules.official_shape(k, v.shape) for k, v in flat.items()}
    config, _ = weights.identify(file_of(shapes))
    assert differences(config, model.config) == []
    assert registry.name_of(config) == name


@pytest.mark.parametrize("family", small_models.FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"qkv_bias": False}, {"kernel_size": 3}, {"img_size": 64}])
def test_changed_models_are_recognised(family, changes):
    if family == "swin" and "img_size" in changes:
        changes = {**changes, "window_size": 8}
    model = small_models.build(family, **changes)
    found = weights.identify(file_of(official_shapes(model), config={"MODEL": {"LA": {"ALPHA": 4}}}))
    if family == "pvt":  # no shape shows the heads of a softmax stage
        assert found.assumed == ["num_heads of the softmax stage 2: 2, as in the official models"]
    assert differences(found.config, model.config) == []


def test_swin_of_softmax_alone_needs_an_image_size():
    model = small_models.build("swin", attn_type="SSSS", softmax_window_size=1, ape=False)
    shapes = official_shapes(model)
    message = r"image size is needed \(img_size\), since the tensors do not show it"
    with pytest.raises(weights.WeightsError, match=message):
        weights.identify(file_of(shapes))
    assert weights.identify(file_of(shapes), img_size=32).config.img_size == 32
    config = {"DATA": {"IMG_SIZE": 64}}
    assert weights.identify(file_of(shapes, config=config)).config.img_size == 64


def test_our_files_are_checked_against_what_they_say():
    model = small_models.build("pvt")
    flat = weights.flatten(nnx.to_pure_dict(nnx.state(model)))
    metadata = weights.model_metadata(model)
    file = WeightsFile("a", "ours", {name: np.asarray(leaf) for name, leaf in flat.items()}, metadata, {})
    assert weights.identify(file).config == model.config
    for change in ({"depths": [1, 1, 1, 2]}, {"img_size": 64}, {"num_classes": 4}, {"attn_type": "LLLL"}):
        edited = {**metadata, "arguments": json.dumps({**model.config.to_dict(), **change})}
        with pytest.raises(weights.WeightsError, match=f"contradicts itself: .*{next(iter(change))}"):
            weights.identify(WeightsFile("a", "ours", file.tensors, edited, {}))
    for arguments in ("[]", "nonsense", "null", '{"num_heads": 3}', '{"attn_type": 5}', '{"attn_type": {"a": 1}}'):
        with pytest.raises(weights.WeightsError, match="not a JSON object|cannot be understood|contradicts itself"):
            weights.identify(WeightsFile("a", "ours", file.tensors, {**metadata, "arguments": arguments}, {}))


def test_other_tensors_are_refused():
    with pytest.raises(weights.WeightsError, match="neither a Pola-PVT .* its 1 tensors begin with conv1.weight"):
        weights.identify(file_of({"conv1.weight": (64, 3, 7, 7)}))
    shapes = dict(FULL["pola_pvt_t"]["shapes"])
    del shapes["pos_embed1"]
    with pytest.raises(weights.WeightsError, match="no complete model: pos_embed1 is missing, expected 3 axes"):
        weights.identify(file_of(shapes))


@pytest.mark.parametrize("number", ["7", "2000000000", "99999999999999999999"])
def test_absurd_depths_are_refused(number):
    shapes = {**FULL["pola_swin_t"]["shapes"], f"layers.0.blocks.{number}.norm1.weight": (96,)}
    file = file_of(shapes)
    if len(number) > 8:  # no number of a block: what is left is complete, and strict loading finds the stray tensor
        with pytest.raises(weights.WeightsError, match=f"1 unexpected: layers.0.blocks.{number}"):
            pf.create_model(weights=file)
    else:
        with pytest.raises(
            weights.WeightsError, match="has 3 blocks, the last being number 7; expected numbers from 0"
        ):
            weights.identify(file)


@pytest.mark.parametrize("name", ["pola_pvt_t", "swin_mixed"])
def test_whatever_the_shapes_there_is_a_model_or_an_error(name):
    """Random edits of names and shapes: nothing but a WeightsError comes out, soon."""
    rng = np.random.default_rng(0)
    original = {key: tuple(shape) for key, shape in {**FULL, **SMALL}[name]["shapes"].items()}
    recognised = 0
    for _ in range(300):
        shapes = dict(original)
        for key in rng.choice(sorted(shapes), size=rng.integers(1, 4), replace=False):
            shape = shapes.pop(key)
            match rng.integers(6):
                case 0:
                    continue  # missing
                case 1:
                    shape = shape[1:]
                case 2:
                    shape = (*shape, 1)
                case 3:
                    key = key.replace(".0.", f".{rng.integers(9)}.", 1)
                case 4:
                    key = key.replace("attn.", "mlp.")
                case _:
                    shape = tuple(int(side * rng.choice([0, 1, 2, 3])) for side in shape)
            shapes[str(key)] = shape
        try:
            weights.identify(file_of(shapes))
            recognised += 1
            if recognised == 1:
                creation.abstract_model(file_of(shapes), None, {})  # each takes a second
        except weights.WeightsError:
            pass
    assert 0 < recognised < 300


def test_models_that_cannot_be_are_refused():
    shapes = dict(FULL["pola_pvt_t"]["shapes"])
    shapes["block1.0.attn.power"] = (1, 3, 1, 64)  # 64 channels over three heads
    with pytest.raises(weights.WeightsError, match=r"(?s)cannot be built: .*num_heads"):
        pf.create_model(weights=file_of(shapes))
