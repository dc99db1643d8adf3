"""Masks and options that transforms of images with masks refuse, each by name."""

import io

import numpy as np
import pytest
from PIL import Image

from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.data.segmentation import labels, resizing
from polaformer_jax.data.segmentation.transforms import (
    EvalSegmentationTransform,
)
from polaformer_jax.errors import UserError
from tests.support import mask_folders
from tests.support.mask_folders import png, record
from tests.support.mask_folders import train_transform as train


def of_mode(mode, fmt="png", **options):
    buffer = io.BytesIO()
    Image.new(mode, (30, 20)).save(buffer, fmt, **options)
    return buffer.getvalue()


def of_grey_bits(bits):
    """A PNG whose header tells of a kind that Pillow does not write."""
    data = bytearray(of_mode("L"))
    data[24] = bits
    return bytes(data)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (of_mode("RGB"), "a PNG of RGB, 8 bits"),
        (of_mode("RGBA"), "a PNG of RGBA, 8 bits"),
        (of_mode("LA"), "grey with transparency"),
        (of_mode("I;16"), "a PNG of grey, 16 bits"),
        (of_mode("1"), "a PNG of grey, 1 bit a channel"),
        (of_grey_bits(2), "a PNG of grey, 2 bits"),
        (of_mode("L", "jpeg"), "of the format JPEG"),
        (of_mode("L", "bmp"), "of the format BMP"),
        (png(np.zeros((30, 20), np.uint8)), r"30 x 20 pixels \(height x width\), but its image has 20 x 30"),
        (png(np.full((20, 30), 3, np.uint8)), r"outside the 3 classes: 3 \(600 pixels\); expected 0 to 2, or 255"),
    ],
)
def test_a_mask_of_another_kind_is_never_skipped(mask, found):
    with pytest.raises(UserError, match=found) as caught:
        train(on_error="skip")({"image": mask_folders.image((20, 30)), "mask": mask}, np.random.default_rng(0))
    assert not isinstance(caught.value, CorruptRecordError)


def test_a_class_too_many_is_named_as_it_is_in_the_file():
    mask = np.zeros((20, 30), np.uint8)
    mask[0, :7], mask[1, :2] = 4, 9
    with pytest.raises(UserError, match=r"4 \(7 pixels\), 9 \(2 pixels\); expected 1 to 3, or 0 or 255"):
        train(reduce_zero_label=True)(record((20, 30), mask), np.random.default_rng(0))


def test_the_numbers_of_a_palette_are_its_indices():
    image = Image.fromarray(mask_folders.labels((20, 30)))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    for options in ({}, {"transparency": 1}):
        buffer = io.BytesIO()
        image.save(buffer, "png", **options)
        assert Image.open(io.BytesIO(buffer.getvalue())).mode == "P"
        np.testing.assert_array_equal(labels.decode_mask(buffer.getvalue()), mask_folders.labels((20, 30)))
    few = np.arange(4, dtype=np.uint8).reshape(2, 2)
    image = Image.fromarray(few)
    image.putpalette(bytes(range(12)))
    buffer = io.BytesIO()
    image.save(buffer, "png", bits=2)
    np.testing.assert_array_equal(labels.decode_mask(buffer.getvalue()), few)


@pytest.mark.parametrize("mask", [b"", b"no image", png(np.zeros((20, 30), np.uint8))[:-30]])
def test_a_broken_mask_is_a_corrupt_record(mask):
    with pytest.raises(CorruptRecordError, match="corrupt mask"):
        labels.decode_mask(mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size is 0"),
        ({"scale": (0, 5)}, "scale is"),
        ({"scale": (5,)}, "scale is"),
        ({"ratio_range": (2, 0.5)}, "ratio_range is"),
        ({"max_class_share": 0}, "max_class_share is 0"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"num_classes": 256}, "num_classes is 256, expected 1 to 255"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_options_are_checked_for_training(options, message):
    with pytest.raises(UserError, match=message):
        train(**options)


@pytest.mark.parametrize("scales", [(), (1.0, 1), (0.0,), (-1.0, 1.0)])
def test_test_time_scales_are_checked(scales):
    with pytest.raises(UserError, match="scales is"):
        EvalSegmentationTransform((64, 48), scales=scales, num_classes=3)


def test_a_missing_opencv_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    resizing.opencv.cache_clear()
    try:
        with pytest.raises(UserError, match=r'segmentation needs OpenCV .*pip install "polaformer_jax\[train\]"'):
            resizing.resize(np.zeros((2, 2, 3), np.uint8), (4, 4))
    finally:
        resizing.opencv.cache_clear()
