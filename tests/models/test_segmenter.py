"""Segmenters: their configs, what they compute of their backbone, and how whole images are segmented."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.errors import UserError
from polaformer_jax.models import registry
from polaformer_jax.models.dense_inference import InferenceMode, by_blocks, label_map, label_maps, score_maps, starts
from polaformer_jax.models.maps import resize_bilinear
from polaformer_jax.models.segmenter import SegmenterConfig
from tests.support import dense_backbone
from tests.support.small_models import PP, PVT, SWIN, noise

BACKBONES = {"pvt": pf.PolaPVTConfig(**PVT), "swin": pf.PolaSwinConfig(**SWIN), "pp": pf.PolaPPConfig(**PP)}


@pytest.fixture(scope="module")
def means():
    """A segmenter of three classes on the cheap backbone."""
    with dense_backbone.registered():
        config = registry.segmenter_config("means", head="semantic_fpn", num_classes=3, head_channels=4)
        yield registry.create(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def scores_of(means):
    """Compiled once for each shape of images."""
    return jax.jit(lambda images: means(images).logits)


@pytest.mark.parametrize(
    "family, head",
    [("pvt", "semantic_fpn"), pytest.param("swin", "upernet", marks=pytest.mark.slow), ("pp", "upernet")],
)
def test_scores_are_those_of_the_head_on_the_normalised_maps(family, head):
    model = pf.Segmenter(
        backbone=BACKBONES[family],
        **{"head": head, "head_channels": 4, "auxiliary_channels": 3 if head == "upernet" else None, "num_classes": 5},
        rngs=nnx.Rngs(0),
    )
    images = noise(1, 32, 64, 3)
    assert [width for width in model.config.backbone.stage_channels] == [norm.num_features for norm in model.norms]

    @jax.jit
    def both(images):
        maps = [norm(x) for norm, x in zip(model.norms, model.backbone.features(images), strict=True)]
        return model(images), model.decode_head(maps if model.neck is None else model.neck(maps))

    scores, expected = both(images)
    assert scores.logits.shape == (1, 8, 16, 5) and scores.auxiliary is None
    np.testing.assert_array_equal(scores.logits, expected)
    graphdef, state = nnx.split(model)
    training = jax.eval_shape(lambda s: nnx.merge(graphdef, s)(images, train=True, rngs=nnx.Rngs(dropout=0)), state)
    assert (training.auxiliary is not None) == (head == "upernet")
    assert training.auxiliary is None or training.auxiliary.shape == (1, 2, 4, 5)


@pytest.mark.parametrize("family", BACKBONES)
def test_configs_survive_json(family):
    config = SegmenterConfig(backbone=BACKBONES[family], num_classes=7, head="upernet")
    assert config.backbone.num_classes == 0 and config.img_size == 32 and config.head_channels == 512
    assert SegmenterConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head": "fpn"}, "head='fpn': expected one of semantic_fpn, upernet"),
        ({"num_classes": 256}, "num_classes=256: at most 255"),
        ({"num_classes": 1}, "num_classes=1: expected an integer >= 2"),
        ({"head_channels": 0}, "head_channels=0: expected an integer >= 1"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a number in \[0, 1\)"),
        ({"backbone": pf.PolaSequenceConfig()}, "backbone: a PolaSequenceConfig, expected a config of PolaPVT"),
        ({"backbone": "pola_swin_t"}, "backbone: a str, expected a config of PolaPVT, PolaSwin, PolaPP"),
        ({"channels": 3}, "Segmenter has no argument channels"),
    ],
)
def test_configs_that_cannot_be_built(changes, message):
    with pytest.raises(UserError, match=message):
        pf.Segmenter(**{"backbone": BACKBONES["pvt"], **changes}, rngs=nnx.Rngs(0))


def test_segmenters_are_made_of_named_backbones_and_changed():
    config = registry.segmenter_config("pola_swin_t", head="upernet", img_size=448)
    assert config.backbone == registry.model_config("pola_swin_t", img_size=448, num_classes=0, padded_windows=True)
    changed = registry.change(config, num_classes=20, img_size=224, drop_path=0.5, head="semantic_fpn", alpha=3)
    assert (changed.num_classes, changed.head, changed.img_size, changed.backbone.alpha) == (20, "semantic_fpn", 224, 3)
    assert changed.backbone.drop_path_rate == 0.5
    assert (changed.head_channels, changed.auxiliary_channels) == (128, 0)
    with pytest.raises(UserError, match="'pola_sequence' is a PolaSequence: a segmenter needs one of"):
        registry.segmenter_config("pola_sequence", head="upernet")


def test_dropout_needs_keys(means):
    with pytest.raises(ValueError, match="dropout draws random numbers: pass rngs"):
        means(noise(1, 32, 32, 3), train=True)


@pytest.mark.parametrize(
    "length, window, stride, expected",
    [
        (64, 64, 64, [0]),
        (32, 64, 64, [0]),
        (96, 64, 32, [0, 32]),
        (96, 64, 64, [0, 32]),
        (160, 64, 32, [0, 32, 64, 96]),
    ],
)
def test_where_windows_begin(length, window, stride, expected):
    assert starts(length, window, stride) == expected  # as in mmsegmentation's `slide_inference`


def resized(scores, inputs, size):
    """The scores at an image's own size, as mmsegmentation resizes them: in two steps."""
    return np.asarray(resize_bilinear(resize_bilinear(scores, inputs), size), np.float64)


def test_classes_at_the_images_own_sizes(means, scores_of):
    images, sizes, shape = noise(3, 64, 64, 3), [(50, 70), (128, 90), (1, 1)], (128, 128)
    labels, probability = label_maps(means, [images], jnp.asarray(sizes, jnp.int32), shape, InferenceMode())
    assert labels.shape == probability.shape == (3, *shape) and labels.dtype == jnp.uint8
    scores = scores_of(images)
    alone = label_map(means, [images[0]], sizes[0], InferenceMode())
    for one, all_of_them in zip(alone, (labels, probability), strict=True):
        np.testing.assert_allclose(one, all_of_them[0, :50, :70], atol=1e-5)
    for i, (height, width) in enumerate(sizes):
        expected = resized(scores[i : i + 1], (64, 64), (height, width))[0]
        found = np.asarray(labels[i, :height, :width])
        # Two classes may be equal but for rounding.
        chosen = np.take_along_axis(expected, found[..., None].astype(int), -1)[..., 0]
        np.testing.assert_allclose(chosen, expected.max(-1), atol=1e-5)
        assert (found == expected.argmax(-1)).mean() > 0.999
        best = jax.nn.softmax(expected).max(-1)
        np.testing.assert_allclose(probability[i, :height, :width], best, rtol=1e-4, atol=1e-5)


def test_probabilities_are_averaged_over_sizes_and_mirrored_images(means, scores_of):
    images = [noise(1, 32, 64, 3), noise(1, 64, 64, 3)]
    size, mode = jnp.asarray([[40, 50]], jnp.int32), InferenceMode(flip=True)

    @jax.jit
    def found(images):
        maps = score_maps(means, images, mode)
        return by_blocks(maps, size, (64, 50), lambda logs, rows: jnp.exp(logs))

    expected = 0
    for image in images:
        for flip in (False, True):
            scores = scores_of(image[:, :, ::-1] if flip else image)
            full = resized(scores, image.shape[1:3], (40, 50))
            expected = expected + jax.nn.softmax(full[:, :, ::-1] if flip else full) / 4
    np.testing.assert_allclose(found(images)[0, 0, :40], expected[0], atol=2e-6)


def test_windows_are_averaged_where_they_overlap(means, scores_of):
    image = noise(1, 64, 96, 3)
    mode = InferenceMode(window=64, stride=32)
    found = jax.jit(lambda x: score_maps(means, [x], mode)[0].scores)(image)
    left, right = (resize_bilinear(scores_of(part), (64, 64)) for part in (image[:, :, :64], image[:, :, 32:]))
    expected = np.concatenate([left[:, :, :32], (left[:, :, 32:] + right[:, :, :32]) / 2, right[:, :, 32:]], axis=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
