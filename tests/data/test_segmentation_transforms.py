"""Transforms of images with masks: the numbers of mmsegmentation, and what holds for any draw.

`golden/segmentation.npz` was written by mmsegmentation 1.2.2 (mmcv-lite 2.1.0, OpenCV 5.0.0): its own transforms, with
the random numbers that are stored beside their results.
"""

from pathlib import Path

import numpy as np
import pytest

from polaformer_jax.data.images.transforms import decode
from polaformer_jax.data.segmentation import distortion, labels, resizing
from polaformer_jax.data.segmentation.transforms import (
    EvalSegmentationTransform,
    random_crop_box,
    random_scale,
)
from tests.support import mask_folders
from tests.support.mask_folders import png, record
from tests.support.mask_folders import train_transform as train

GOLDEN = np.load(Path(__file__).parents[1] / "golden/segmentation.npz")


class Fixed:
    """Stands for a random generator: gives these numbers, whatever is asked for."""

    def __init__(self, *, random=(), uniform=(), integers=()):
        self.left = {"random": list(random), "uniform": list(uniform), "integers": list(integers)}

    def random(self, size=None):
        return np.array([self.left["random"].pop(0) for _ in range(size)])

    def uniform(self, low, high):
        return float(self.left["uniform"].pop(0))

    def integers(self, *bounds):
        return self.left["integers"].pop(0)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- the reference


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_distortion_is_that_of_mmsegmentation(name):
    change = getattr(distortion, f"change_{name}")
    for value, expected in zip(GOLDEN[f"{name}_values"].tolist(), GOLDEN[name], strict=True):
        np.testing.assert_array_equal(change(GOLDEN["image"], value), expected)


@pytest.mark.parametrize(
    ("name", "uniform", "steps", "contrast_second"),
    [("whole_first", (-13.7, 1.31, 0.7), 9, 0.1), ("whole_last", (20.2, 0.66, 1.4), -11, 0.9)],
)
def test_distortions_are_chained_as_in_mmsegmentation(name, uniform, steps, contrast_second):
    draws = Fixed(random=[0.1] * 4 + [contrast_second], uniform=uniform, integers=[steps])
    found = distortion.photometric_distortion(GOLDEN["image"], draws)
    np.testing.assert_array_equal(found, GOLDEN[name])


def test_each_distortion_is_left_out_half_of_the_times():
    grey = np.full((1, 1, 3), 128, np.uint8)  # without colour: neither saturation nor hue change it
    draws = rng()
    same = [(distortion.photometric_distortion(grey, draws) == grey).all() for _ in range(1000)]
    assert 0.2 < np.mean(same) < 0.3  # a quarter: neither brightness nor contrast


def test_as_many_numbers_are_drawn_whatever_is_distorted():
    states = set()
    for size in ((1, 1), (5, 7)):
        draws = rng()
        for _ in range(10):
            distortion.photometric_distortion(np.zeros((*size, 3), np.uint8), draws)
        states.add(str(draws.bit_generator.state))
    assert len(states) == 1


def test_sizes_are_rounded_as_in_mmcv():
    for size, row in zip(GOLDEN["sizes"].tolist(), GOLDEN["fitted"].tolist(), strict=True):
        for ratio, expected in zip(GOLDEN["ratios"], row, strict=True):
            found = random_scale(tuple(size), Fixed(uniform=[ratio]), scale=(2048, 512), ratio_range=(0.5, 2.0))
            assert list(found) == expected


@pytest.mark.parametrize("number", [0, 1, 2])
def test_images_and_labels_are_resized_as_in_mmsegmentation(number):
    size = resizing.fitted_size(GOLDEN["label"].shape, tuple(GOLDEN["boxes"][number].tolist()))
    np.testing.assert_array_equal(resizing.resize(GOLDEN["image"], size), GOLDEN[f"resized_{number}"])
    np.testing.assert_array_equal(resizing.resize_labels(GOLDEN["label"], size), GOLDEN[f"resized_label_{number}"])


@pytest.mark.parametrize("number", [0, 1])
def test_images_are_prepared_for_evaluation_as_in_mmsegmentation(number):
    transform = EvalSegmentationTransform(tuple(GOLDEN["boxes"][number].tolist()), num_classes=5)
    np.testing.assert_array_equal(transform.prepared(GOLDEN["image"])["image"], GOLDEN[f"eval_{number}"])


def test_crops_are_drawn_again_as_often_as_in_mmsegmentation():
    for offsets, chosen, drawn in zip(GOLDEN["offsets"], GOLDEN["chosen"], GOLDEN["drawn"], strict=True):
        draws = Fixed(integers=offsets.ravel())
        rows, columns = random_crop_box(GOLDEN["seg"], 24, draws, max_class_share=0.75)
        assert [rows.start, columns.start] == chosen.tolist()
        assert len(draws.left["integers"]) == 2 * (len(offsets) - drawn)
    assert GOLDEN["drawn"].max() > 5


def test_zero_is_reduced_as_in_mmsegmentation():
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(labels.reduce_zero_label(numbers), GOLDEN["reduced"])
    found = labels.decode_labels(png(np.uint8([[0, 1, 2, 255]])), size=(1, 4), num_classes=2, reduce_zero=True)
    assert found.tolist() == [[255, 0, 1, 255]]


# --- what holds for any draw


def test_an_example_for_training_has_one_shape_whatever_the_image():
    transform = train(scale=(128, 24))
    for seed, size in enumerate([(20, 30), (300, 20), (1, 1), (1, 500), (33, 33)]):
        example = transform(record(size), rng(seed))
        assert {name: (value.shape, value.dtype.name) for name, value in example.items()} == {
            "image": ((32, 32, 3), "uint8"),
            "label": ((32, 32), "uint8"),
            "size": ((2,), "int32"),
            "mask": ((), "bool"),
        }
        height, width = example["size"]
        assert 1 <= min(height, width) and max(height, width) <= 32
        outside = np.ones((32, 32), bool)
        outside[:height, :width] = False
        assert (example["label"][outside] == 255).all() and not example["image"][outside].any()


def test_image_and_labels_are_moved_together():
    colours = rng().integers(0, 256, (3, 3), dtype=np.uint8)
    mask = mask_folders.labels((50, 70))
    mask[mask == 255] = 0
    pixels = colours[mask]
    transform = train(24, scale=None, ratio_range=(1, 1), distortion=False)
    flipped = set()
    for seed in range(20):
        example = transform({"image": png(pixels), "mask": png(mask)}, rng(seed))
        np.testing.assert_array_equal(example["image"], colours[example["label"]])
        (place,) = {
            (top, left, turned)
            for top in range(50 - 24 + 1)
            for left in range(70 - 24 + 1)
            for turned in (False, True)
            if (mask[top : top + 24, left : left + 24][:, :: -1 if turned else 1] == example["label"]).all()
        }
        flipped.add(place[2])
    assert flipped == {False, True}


@pytest.mark.parametrize(("flip", "same"), [(0.0, True), (1.0, False)])
def test_the_probability_of_a_flip_is_respected(flip, same):
    pair = record((32, 32))
    example = train(scale=None, ratio_range=(1, 1), distortion=False, flip=flip)(pair, rng())
    image = decode(pair["image"])
    np.testing.assert_array_equal(example["image"], image if same else image[:, ::-1])


def test_resizing_invents_no_class():
    mask = np.where(np.indices((30, 40)).sum(0) % 2, np.uint8(0), np.uint8(200))
    transform = train(64, num_classes=201, scale=(256, 48))
    for seed in range(10):
        found = np.unique(transform(record((30, 40), mask), rng(seed))["label"])
        assert set(found.tolist()) <= {0, 200, 255}


def test_one_class_fills_less_than_three_quarters_where_a_crop_allows_it():
    mask = np.zeros((40, 120), np.uint8)
    mask[:, 60:] = 1
    mask[:, 100:] = 255  # does not count

    def shares(**options):
        for seed in range(60):
            box = random_crop_box(mask, 40, rng(seed), **options)
            counts = np.bincount(mask[box].ravel(), minlength=256)[:2]
            yield counts.max() / max(1, counts.sum())

    fit = [share < 0.75 for share in shares(max_class_share=0.75)]
    assert np.mean(fit) > 0.8 and np.mean([share < 0.75 for share in shares(max_class_share=1)]) < 0.3


def test_boxes_reach_both_ends():
    boxes = [random_crop_box(np.zeros((6, 3)), 4, rng(seed), max_class_share=1) for seed in range(30)]
    assert {(rows.start, columns.start) for rows, columns in boxes} == {(0, 0), (1, 0), (2, 0)}


def test_the_same_generator_gives_the_same_example():
    first, again, other = (train()(record(), rng(seed)) for seed in (5, 5, 6))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["image"] != other["image"]).any()


# --- evaluation


def test_labels_keep_their_size_in_an_evaluation():
    pair = record((33, 140))
    example = EvalSegmentationTransform((200, 64), num_classes=3)(pair)
    assert example["image"].shape == (64, 224, 3)  # 47 x 200, then up
    assert example["label"].shape == (128, 256) and example["size"].tolist() == [33, 140]
    np.testing.assert_array_equal(example["label"][:33, :140], mask_folders.labels((33, 140)))
    assert (example["label"][33:] == 255).all() and (example["label"][:, 140:] == 255).all()


def test_each_test_time_scale_has_an_array():
    transform = EvalSegmentationTransform((200, 64), scales=(0.5, 1, 1.75), num_classes=3)
    image = rng().integers(0, 256, (33, 140, 3), dtype=np.uint8)
    found = transform.prepared(image)
    assert {name: array.shape for name, array in found.items()} == {
        "image_0.5": (32, 128, 3),
        "image_1.0": (64, 224, 3),
        "image_1.75": (96, 352, 3),
    }
    assert {name: array.shape[:2] for name, array in found.items()} == transform.image_sizes((33, 140))
    single = EvalSegmentationTransform((200, 64), num_classes=3).prepared(image)
    np.testing.assert_array_equal(single["image"], found["image_1.0"])


def test_without_a_scale_images_keep_their_size_up_to_the_multiple():
    transform = EvalSegmentationTransform(None, scales=(1.0, 2.0), num_classes=3)
    assert transform.image_sizes((64, 33)) == {"image_1.0": (64, 64), "image_2.0": (128, 96)}
    image = rng().integers(0, 256, (64, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(transform.prepared(image)["image_1.0"], image)


@pytest.mark.parametrize("size", [(1, 1), (1, 8000), (8000, 1), (40, 8000)])
def test_any_shape_of_image_is_evaluated(size):
    transform = EvalSegmentationTransform((2048, 512), num_classes=3)
    mask = np.zeros(size, np.uint8)
    example = transform({"image": png(np.zeros((*size, 3), np.uint8)), "mask": png(mask)})
    height, width = example["image"].shape[:2]
    assert height % 32 == width % 32 == 0 and max(height, width) <= 2048
    assert (height, width) == transform.image_sizes(size)["image"]


def test_blank_examples_are_like_the_others():
    training, evaluation = train(), EvalSegmentationTransform((64, 48), scales=(0.5, 1.0), num_classes=3)
    for blank, example in (
        (training.blank(7), training(record(), rng())),
        (evaluation.blank_of((20, 30)), evaluation(record())),
    ):
        assert {name: (value.shape, value.dtype) for name, value in blank.items()} == {
            name: (value.shape, value.dtype) for name, value in example.items()
        }
        assert not blank["mask"] and (blank["label"] == 255).all() and not blank["size"].any()
