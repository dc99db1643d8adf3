"""The preview shows the training's own examples, a row for each kind of augmentation that the config uses."""

import numpy as np
import pytest

from polaformer_jax.analysis import augmentation
from polaformer_jax.files import figures
from polaformer_jax.training.experiment import Experiment
from tests.support.recipes import digits

FULL = ["as stored", "crop", "RandAugment", "random erasing", "mixup", "CutMix"]


@pytest.fixture
def config(digits_dir):
    config = digits("recipe=full")
    config.data.data_dir = digits_dir
    config.data.workers = 0
    return config


def test_there_is_a_row_for_every_kind(config):
    rows, left_out = augmentation.augmentations(Experiment(config), 8)
    assert [row.name.startswith(name) for row, name in zip(rows, FULL, strict=True)] == [True] * 6
    assert left_out == ["flip"]
    assert [len(row.images) for row in rows] == [8] * 6
    assert rows[0].images[0].shape == (8, 8, 3)
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for row in rows[1:] for image in row.images)


def test_the_host_rows_are_what_training_reads(config):
    experiment = Experiment(config)
    stream = experiment.inputs.train_batches(0)
    batch = next(stream)
    stream.close()
    rows, _ = augmentation.augmentations(experiment, 8)
    np.testing.assert_array_equal(rows[2].images, batch["image"][:8])
    assert rows[0].titles == [str(label) for label in batch["label"][:8]]
    config.augment.rand_augment = None
    stream = Experiment(config).inputs.train_batches(0)
    np.testing.assert_array_equal(rows[1].images, next(stream)["image"][:8])
    stream.close()


def test_every_image_is_erased_and_mixed_whatever_the_probability(config):
    config.augment.erase_prob = config.augment.mix_prob = 0.01
    rows, _ = augmentation.augmentations(Experiment(config), 8)
    for row in rows[3:]:
        assert all((after != before).any() for after, before in zip(row.images, rows[2].images, strict=True))


def test_mixed_targets_name_both_classes_and_their_shares(config):
    config.train.label_smoothing = 0.0
    rows, _ = augmentation.augmentations(Experiment(config), 8)
    for row in rows[4:]:
        for title, own, partner in zip(row.titles, rows[0].titles, rows[0].titles[::-1], strict=True):
            shares = dict(line.removesuffix(" %").split(": ") for line in title.split("\n"))
            assert list(shares) == list(dict.fromkeys((own, partner)))
            assert abs(sum(map(int, shares.values())) - 100) <= 1  # rounded


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"mixup": 0.0}, ["flip", "mixup"]),
        ({"switch_prob": 1.0}, ["flip", "mixup"]),
        ({"mix_prob": 0.0, "flip": 0.5}, ["mixup", "CutMix"]),
        ({"rand_augment": None, "erase_prob": 0.0}, ["flip", "RandAugment", "random erasing"]),
    ],
)
def test_kinds_that_are_turned_off_are_left_out_and_named(config, changes, missing):
    config.augment.update(changes)
    rows, left_out = augmentation.augmentations(Experiment(config), 4)
    assert left_out == missing
    assert len(rows) == 6 - len([kind for kind in missing if kind != "flip"])
    figure = augmentation.preview(config, examples=4)
    assert f"turned off in the config: {', '.join(missing)}" in figure.get_suptitle()


def test_the_picture_is_a_png(config, tmp_path):
    figures.save(augmentation.preview(config, examples=3), tmp_path / "new" / "out.png")
    assert (tmp_path / "new" / "out.png").read_bytes().startswith(b"\x89PNG")
