"""What a step of a segmentation computes, where it starts from, and settings that are refused."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.models.maps import resize_bilinear
from polaformer_jax.models.segmenter import Scores
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.sharding import to_devices
from tests.support import mask_folders
from tests.support.golden_models import GOLDEN_FOLDER, SMALL
from tests.support.log_messages import logged
from tests.support.recipes import means_segmentation as config_of
from tests.support.recipes import recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mask_folders.write(tmp_path_factory.mktemp("masks"))


@pytest.mark.parametrize("pixels", ["all", "labelled"])
def test_the_loss_is_divided_by_all_pixels_or_the_labelled_ones(folder, pixels, x64):
    task = Experiment(config_of(folder, **{"train.loss_pixels": pixels, "model.dtype": "float64"})).task
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (2, 32, 32)).astype(np.uint8)
    label[0, 5:] = 255
    label[1, :, :20] = 255
    batch = {
        "image": rng.integers(0, 256, (2, 32, 32, 3), np.uint8),
        "label": label,
        "size": np.array([[32, 32], [10, 8]], np.int32),
        "mask": np.ones(2, bool),
    }
    augmented = task.augment({name: jnp.asarray(array) for name, array in batch.items()}, None)
    assert not np.asarray(augmented["inputs"])[1, 10:].any() and not np.asarray(augmented["inputs"])[1, :, 8:].any()
    logits, auxiliary = (jnp.asarray(rng.standard_normal((2, size, size, 3))) for size in (8, 2))
    losses = np.asarray(task.losses(Scores(logits, auxiliary), augmented))

    def expected(logits):
        logs = np.asarray(jax.nn.log_softmax(resize_bilinear(logits, (32, 32))))
        each = -np.take_along_axis(logs, np.where(label < 255, label, 0)[..., None].astype(int), -1)[..., 0]
        total = np.where(label < 255, each, 0).sum((1, 2))
        return total / (32 * 32 if pixels == "all" else (label < 255).sum((1, 2)))

    np.testing.assert_allclose(losses, expected(logits) + 0.4 * expected(auxiliary), rtol=1e-12)
    if pixels == "labelled":
        assert augmented["weight"].tolist() == [160, 384]
    right = (np.asarray(resize_bilinear(logits, (32, 32))).argmax(-1) == label) & (label < 255)
    assert task.metrics(Scores(logits, None), augmented)["accuracy"] == (right.sum(), 544)


def test_only_the_heads_are_trained_behind_a_frozen_backbone(folder, tmp_path):
    experiment = Experiment(config_of(folder, **{"init.freeze_backbone": True}))
    state = experiment.states.initial()
    before = jax.tree.map(np.asarray, state.params)
    batch = next(iter(experiment.inputs.train_batches(0)))
    after, _ = experiment.train_step(state, to_devices(batch, experiment.mesh))
    jax.tree.map(np.testing.assert_array_equal, before["backbone"], after.params["backbone"])
    assert (before["decode_head"]["conv_seg"]["kernel"] != after.params["decode_head"]["conv_seg"]["kernel"]).any()
    # Running statistics of the heads are taken up, not trained.
    norm = "scale_heads", 0, 0, "bn", "mean"
    old, new = before["decode_head"], after.params["decode_head"]
    for key in norm:
        old, new = old[key], new[key]
    assert (old != np.asarray(new)).any()


@pytest.mark.slow
def test_a_step_is_the_same_on_any_mesh(folder):
    """Losses, gradients and running statistics are those of the whole batch, however it and the state are split."""
    found = []
    for data, fsdp in ((1, 1), (4, 2)):
        config = config_of(folder, **{"mesh.data": data, "mesh.fsdp": fsdp, "optimizer.lr": 1e-2})
        experiment = Experiment(config)
        batch = next(iter(experiment.inputs.train_batches(0)))
        batch["mask"] = np.arange(8) != 3
        state, sums = experiment.train_step(experiment.states.initial(), to_devices(batch, experiment.mesh))
        found.append((jax.device_get(state.params), jax.device_get(sums)))
    (params, sums), (others, other_sums) = found
    assert float(sums["loss"][1]) == 7
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-5), sums, other_sums)
    statistics = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key in ("mean", "var")]
    assert len(statistics) == 14  # of the seven normalisations of the head
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4), params, others)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_a_step_of_a_real_model_with_all_that_a_recipe_may_have(folder):
    """Auxiliary head, micro-batches, labelled pixels, moving average; rematerialised and sharded, or neither."""
    found = []
    for data, fsdp, remat in ((1, 1, False), (2, 2, True)):
        changes = {"mesh.data": data, "mesh.fsdp": fsdp, "model.remat": remat, "model.head": "upernet"}
        changes |= {
            "train.accumulate": 2,
            "train.loss_pixels": "labelled",
            "ema.decay": 0.5,
            "model.name": "pola_swin_nano",
        }
        experiment = Experiment(config_of(folder, **changes))
        batch = next(iter(experiment.inputs.train_batches(0)))
        state, sums = experiment.train_step(experiment.states.initial(), to_devices(batch, experiment.mesh))
        found.append((jax.device_get((state.params, state.ema)), jax.device_get(sums)))
    (params, sums), (others, other_sums) = found
    assert float(sums["loss"][1]) == (batch["label"] < 255).sum()
    np.testing.assert_allclose(sums["loss"][0], other_sums["loss"][0], rtol=1e-4)
    np.testing.assert_allclose(sums["grad_norm"][0], other_sums["grad_norm"][0], rtol=1e-3)
    # Adam's first step is the sign of a gradient: where that is about zero, either one.
    differences = [np.abs(one - two).max() for one, two in zip(*map(jax.tree.leaves, (params, others)), strict=True)]
    assert np.median(differences) < 1e-4 and max(differences) < 5e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.head": None}, "model.head=None: with task.name='segmentation' it is semantic_fpn or upernet"),
        ({"data.source": "folder"}, "data.source='folder': with task.name='segmentation' it is tfds or masks"),
        ({"checkpoint.best_metric": "accuracy"}, "of segmentation it is miou or loss"),
        ({"augment.mixup": 0.8}, "they are of classification"),
        ({"augment.ratio": (2.0, 0.5)}, r"augment.ratio=\(2.0, 0.5\): it is a pair \(low, high\)"),
        ({"eval.scale": (512,)}, r"eval.scale=\(512,\): it is a pair of sides in pixels"),
        ({"eval.scales": ("a",)}, r"eval.scales=\('a',\): positive numbers, each once"),
        ({"model.auxiliary_channels": 4}, "auxiliary_channels=4: only head='upernet' has an auxiliary head"),
        ({"eval.scales": ()}, r"eval.scales=\(\): positive numbers, each once"),
        ({"eval.window": 50}, "eval.window=50: it must be a multiple of 32"),
        ({"eval.stride": 32}, "eval.stride=32: it must be a multiple of 32, and at most eval.window=None"),
        ({"train.label_smoothing": 0.1}, "train.label_smoothing=0.1: of segmentation it is 0"),
        ({"train.loss_pixels": "some"}, "train.loss_pixels='some': it is one of all, labelled"),
        ({"augment.max_class_share": 0.0}, r"augment.max_class_share=0.0: it must be in \(0, 1\]"),
        ({"task.name": "image"}, "model.head='semantic_fpn': it is of segmentation, and task.name='image'"),
        ({"model.num_classes": 4}, "num_classes is 4, but .* names 3 classes"),
        ({"model.name": "pola_sequence"}, "sequence models and data belong to sequence tasks"),
    ],
)
def test_configs_that_cannot_work(folder, changes, message):
    with pytest.raises(UserError, match=message):
        Experiment(config_of(folder, **changes)).check_training()


def test_the_named_backbone_of_a_recipe_can_be_changed():
    config = recipe("segmentation", "ade20k,model=pola_pvt_s,head=semantic_fpn,steps=40")
    assert (config.model.name, config.model.head, config.train.steps) == ("pola_pvt_s", "semantic_fpn", 40)
    assert registry.model_config(config.model.name).family == "PolaPVT" and config.model.window_size is None
    with pytest.raises(UserError, match="config option head=fpn: it is one of semantic_fpn, upernet"):
        recipe("segmentation", "ade20k,head=fpn")


def test_a_training_starts_from_the_weights_of_a_classifier(folder, tmp_path):
    classifier = pf.create_model("pola_swin_nano", img_size=64, num_classes=7, rngs=nnx.Rngs(1))
    pf.save_weights(classifier, tmp_path / "c.safetensors")
    config = config_of(folder, **{"init.weights": str(tmp_path / "c.safetensors"), "model.img_size": 64})
    config.model.name, config.model.window_size = "pola_swin_nano", 8
    experiment = Experiment(config)
    with logged() as messages:
        params = experiment.params.initial()
    assert params["backbone"]["layers"][0]["blocks"][0]["attn"]["positional_encoding"].shape[1] == 64
    for name in ("patch_embed", "norm"):
        jax.tree.map(
            np.testing.assert_array_equal, params["backbone"][name], nnx.to_pure_dict(nnx.state(classifier))[name]
        )
    drawn = Experiment(config_of(folder, **{"model.img_size": 64, "model.name": "pola_swin_nano"})).params.initial()
    jax.tree.map(np.testing.assert_array_equal, params["decode_head"], drawn["decode_head"])
    told = "\n".join(messages)
    assert "the backbone; drawn from the seed: decode_head, neck, norms" in told
    assert "head: classifier of shape (256, 7): omitted" in told
    assert "positional_encoding: resized from 4x4 to 8x8 (bicubic)" in told
    # To evaluate it, it must be a segmenter.
    with pytest.raises(UserError, match="holds the weights of a PolaSwin, and the model is a Segmenter; a training"):
        experiment.params.read(str(tmp_path / "c.safetensors"))


def test_a_training_starts_from_an_official_checkpoint(folder):
    spec = {name: value for name, value in SMALL["pvt_llll"]["spec"].items() if name in pf.PolaPVTConfig.names()}
    path = str(GOLDEN_FOLDER / "official_pvt_llll.pth")
    classifier = pf.PolaPVT(**spec, rngs=nnx.Rngs(0))
    pf.load_weights(classifier, path)
    official = {"official": classifier.config}
    with mock.patch.dict(registry._MODELS, official), logged() as messages:
        changes = {"model.name": "official", "model.img_size": 2 * spec["img_size"], "init.weights": path}
        params = Experiment(config_of(folder, **changes)).params.initial()
    found, expected = params["backbone"], nnx.to_pure_dict(nnx.state(classifier))
    jax.tree.map(np.testing.assert_array_equal, found["patch_embed1"], expected["patch_embed1"])
    np.testing.assert_array_equal(found["block4"][0]["attn"]["power"], expected["block4"][0]["attn"]["power"])
    assert found["pos_embed1"].shape[1] == 4 * expected["pos_embed1"].shape[1]
    told = "\n".join(messages)
    assert "pos_embed1: resized from" in told and "(bilinear)" in told and "omitted" in told


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_stochastic_depth_and_dropout_draw_from_the_keys():
    config = registry.segmenter_config("pola_pvt_nano", head="semantic_fpn", head_channels=4, drop_path=0.5)
    assert config.drop_path_rate == 0.5
    graphdef, state = nnx.split(pf.Segmenter(dataclasses.replace(config, dropout=0.0), rngs=nnx.Rngs(0)))
    images = jnp.ones((4, 32, 32, 3))

    @jax.jit
    def scores(state, seed):
        return nnx.merge(graphdef, state)(images, train=True, rngs=nnx.Rngs(dropout=jax.random.key(seed))).logits

    first, again, other = (scores(state, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != other).any()
    assert len({image.tobytes() for image in np.asarray(first)}) > 1  # equal images drop other branches
