"""Resizing and affine maps have Pillow's pixels, bit for bit."""

import numpy as np
import pytest
from PIL import Image

from polaformer_jax.data.images import resampling

BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image, size):
    """One pass at a time, horizontally first: Pillow from 13 on would choose another order for tall images."""
    height, width = size
    return Image.fromarray(image).resize((width, image.shape[0]), BICUBIC).resize((width, height), BICUBIC)


@pytest.mark.parametrize(
    "before",
    [(375, 500), (500, 375), (64, 64), (1, 1), (1, 90), (90, 1), (31, 64), (64, 33), (7, 301), (65, 63), (2, 3)],
)
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (40, 96)])
def test_resizing_has_the_pixels_of_pillow(before, size):
    image = noise(*before)
    np.testing.assert_array_equal(resampling.resize(image, size), by_pillow(image, size))


def test_extremes_are_clipped_as_pillow_clips_them():
    image = np.where(noise(50, 70) > 127, 255, 0).astype(np.uint8)
    for size in ((31, 31), (120, 120)):
        np.testing.assert_array_equal(resampling.resize(image, size), by_pillow(image, size))


def test_any_strides_and_read_only_images_are_taken():
    whole = noise(60, 80)
    whole.flags.writeable = False
    for part in (whole, whole[3:50, 7:70], whole[:, ::-1], whole[::2, 1::3], whole.transpose(1, 0, 2)):
        np.testing.assert_array_equal(
            resampling.resize(part, (20, 24)), by_pillow(np.ascontiguousarray(part), (20, 24))
        )
        map_ = (1, 0.2, 0, 0, 1, 0)
        expected = resampling.affine(np.ascontiguousarray(part), map_, FILL)
        np.testing.assert_array_equal(resampling.affine(part, map_, FILL), expected)


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (1, 1), (3, 2)])
def test_affine_maps_have_the_pixels_of_pillow(size):
    image, rng = noise(*size), np.random.default_rng(1)
    for _ in range(20):
        u = rng.uniform(-0.3, 0.3)
        shears = [(1, u, 0, 0, 1, 0), (1, 0, 0, u, 1, 0)]
        shifts = [(1, 0, u * size[1], 0, 1, 0), (1, 0, 0, 0, 1, u * size[0]), (1, 0, round(9 * u), 0, 1, round(-9 * u))]
        for matrix in [*shears, *shifts, tuple(rng.uniform(-1.5, 1.5, 6))]:
            expected = Image.fromarray(image).transform(
                (size[1], size[0]), Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL
            )
            np.testing.assert_array_equal(resampling.affine(image, matrix, FILL), expected, err_msg=str(matrix))


@pytest.mark.parametrize("degrees", [0, 0.5, -3.7, 30, -30, 90, 180, 270, 359.9])
def test_rotations_have_the_pixels_of_pillow(degrees):
    for image in (noise(33, 33), noise(32, 32)):
        expected = Image.fromarray(image).rotate(degrees, resample=BICUBIC, fillcolor=FILL)
        np.testing.assert_array_equal(resampling.rotate(image, degrees, FILL), expected)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_other_arrays_are_refused(image):
    for call in (lambda: resampling.resize(image, (2, 2)), lambda: resampling.affine(image, (1, 0, 0, 0, 1, 0), FILL)):
        with pytest.raises(ValueError, match=r"expected uint8 \(height, width, 3\)"):
            call()


def test_no_side_may_be_zero():
    with pytest.raises(ValueError, match="expected no side of 0"):
        resampling.resize(np.zeros((0, 4, 3), np.uint8), (2, 2))
