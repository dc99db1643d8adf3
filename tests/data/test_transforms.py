"""Host transforms: exact evaluation pixels, the specified random distributions, and broken images."""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from scipy import stats

from polaformer_jax.data.images import resampling, transforms
from polaformer_jax.data.images.transforms import EvalImageTransform, TrainImageTransform
from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.errors import UserError
from tests.support import GOLDEN_FOLDER

GOLDEN = np.load(GOLDEN_FOLDER / "eval_pixels.npz")  # by Pillow, with the official steps
PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"


def photograph(name="china"):
    return (PHOTOGRAPHS / f"{name}.jpg").read_bytes()


def encode(array, mode=None, fmt="png", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def train_transform(**changes):
    options = {"crop_area": (0.08, 1.0), "crop_aspect": (3 / 4, 4 / 3), "flip": 0.5, "num_classes": 2} | changes
    return TrainImageTransform(options.pop("image_size", 32), **options)


@pytest.mark.parametrize("name", ["china", "flower"])
def test_evaluation_pixels_are_exact(name):
    record = {"image": photograph(name), "label": 1}
    cropped = EvalImageTransform(256, 224, num_classes=2)(record)["image"]
    np.testing.assert_array_equal(cropped, GOLDEN[f"{name}/crop"])
    whole = EvalImageTransform(384, 384, num_classes=2)(record)["image"]
    np.testing.assert_array_equal(whole[::3, ::3], GOLDEN[f"{name}/no_crop_384"])


@pytest.mark.parametrize("transform", [train_transform(), EvalImageTransform(40, 32, num_classes=2)])
def test_examples_have_fixed_shapes_and_dtypes(transform):
    example = transform({"image": photograph(), "label": 1}, np.random.default_rng(0))
    for found, mask in ((example, True), (transform.blank(), False)):
        assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
            "image": (np.uint8, (32, 32, 3)),
            "label": (np.int32, ()),
            "mask": (np.bool_, ()),
        }
        assert found["mask"] == mask
    assert example["label"] == 1


def test_crop_is_uniform_in_area_log_uniform_in_aspect_and_uniform_in_place():
    size = 10_000  # so large that rounding to pixels does not matter; half the area fits at every aspect
    rng = np.random.default_rng(0)
    boxes = np.array(
        [transforms.random_crop_box(size, size, rng, area=(0.08, 0.5), aspect=(3 / 4, 4 / 3)) for _ in range(4000)]
    )
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    draws = {
        "area": ((width * height / size**2) - 0.08) / 0.42,
        "log aspect": np.log(width / height) / math.log(4 / 3) / 2 + 0.5,
        "column": left / (size - width),
        "row": top / (size - height),
    }
    for name, values in draws.items():
        assert stats.kstest(values, "uniform").pvalue > 0.01, name
    correlations = np.corrcoef(list(draws.values())) - np.eye(4)
    assert np.abs(correlations).max() < 0.06


def test_crop_boxes_lie_in_the_image_and_keep_to_area_and_aspect():
    rng = np.random.default_rng(0)
    for width, height in [(500, 375), (375, 500), (333, 40)]:
        for _ in range(300):
            left, top, right, bottom = transforms.random_crop_box(
                width, height, rng, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)
            )
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert 0.73 < (right - left) / (bottom - top) < 1.37
            assert 0.07 < (right - left) * (bottom - top) / (width * height) or width == 333


@pytest.mark.parametrize(("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520))])
def test_crop_falls_back_to_the_central_box_after_ten_tries(size, box):
    rng = np.random.default_rng(0)
    assert transforms.random_crop_box(*size, rng, area=(0.9, 1.0), aspect=(3 / 4, 4 / 3)) == box
    assert rng.bit_generator.state == _after_doubles(20)


def _after_doubles(count):
    rng = np.random.default_rng(0)
    rng.random(count)
    return rng.bit_generator.state


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 500)])
def test_the_smallest_images_are_cropped_too(size):
    record = {"image": encode(noise(*size)), "label": 0}
    for seed in range(20):
        assert train_transform()(record, np.random.default_rng(seed))["image"].shape == (32, 32, 3)


def test_crop_comes_before_the_bicubic_resize():
    image = noise(64, 64)
    found = transforms.random_resized_crop(image, 32, np.random.default_rng(3), area=(0.2, 0.5), aspect=(0.8, 1.25))
    box = transforms.random_crop_box(64, 64, np.random.default_rng(3), area=(0.2, 0.5), aspect=(0.8, 1.25))
    expected = resampling.resize(np.ascontiguousarray(image[box[1] : box[3], box[0] : box[2]]), (32, 32))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flip_mirrors_with_its_probability(probability):
    pixels = noise(4, 4)
    rng, flips = np.random.default_rng(0), 0
    for _ in range(2000):
        found = transforms.random_flip(pixels, rng, probability=probability)
        flips += not np.array_equal(found, pixels)
        assert np.array_equal(found, pixels) or np.array_equal(found, pixels[:, ::-1])
    assert abs(flips / 2000 - probability) < 0.03 * (0 < probability < 1) + 1e-9


def test_a_generator_in_the_same_state_gives_the_same_pixels():
    transform, record = train_transform(), {"image": photograph(), "label": 0}
    first, again, other = (transform(record, np.random.default_rng(seed))["image"] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "data",
    [
        encode(noise(9, 9), "L"),
        encode(noise(9, 9), "P"),
        encode(noise(9, 9), "RGBA"),
        encode(noise(9, 9), "1"),
        encode(noise(9, 9), "CMYK", "jpeg"),
        encode(noise(9, 9), "L", "jpeg"),
        encode(noise(9, 9)[..., 0].astype(np.uint16) * 256),
    ],
    ids=["grey", "palette", "alpha", "bilevel", "cmyk-jpeg", "grey-jpeg", "16-bit"],
)
def test_every_kind_of_image_becomes_rgb(data):
    found = transforms.decode(data)
    assert found.shape == (9, 9, 3) and found.dtype == np.uint8


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20, "optimize": True}])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(subsampling, options):
    for pixels in (noise(37, 50), np.asarray(Image.open(io.BytesIO(photograph())))):
        data = encode(pixels, fmt="jpeg", subsampling=subsampling, **options)
        np.testing.assert_array_equal(transforms.decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_jpeg_that_pillow_takes_though_libjpeg_warns_is_taken():
    data = photograph()
    entropy = data.index(b"\xff\xda") + 14  # behind the header of the scan
    damaged = data[:-2] + b"junk" + data[-2:], data[:entropy] + b"\x00" * 4 + data[entropy + 4 :]
    for each in damaged:
        np.testing.assert_array_equal(transforms.decode(each), np.asarray(Image.open(io.BytesIO(each))))


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    plain, turned = encode(noise(8, 16), fmt="jpeg"), encode(noise(8, 16), fmt="jpeg", exif=exif)
    np.testing.assert_array_equal(transforms.decode(turned), transforms.decode(plain))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        photograph()[:50_000],
        encode(noise(64, 64))[:3000],
        encode(noise(64, 64)).replace(b"IDAT", b"IDAX"),
        encode(noise(64, 64))[:20],
    ],
    ids=["empty", "text", "truncated-jpeg", "truncated-png", "broken-png-chunk", "header-only"],
)
def test_broken_bytes_raise_one_kind_of_error(data):
    with pytest.raises(CorruptRecordError, match=rf"corrupt image \({len(data)} bytes\)"):
        transforms.decode(data)


@pytest.mark.parametrize("fmt", ["png", "tiff", "ppm"])
def test_grey_images_of_16_bits_are_scaled(fmt):
    """Pillow's `convert` cuts them off at 255."""
    ramp = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, fmt)
    found = transforms.decode(buffer.getvalue())
    np.testing.assert_array_equal(found, np.repeat(np.round(ramp / 257).astype(np.uint8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")])
def test_images_whose_range_is_not_known_are_refused(dtype, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype)).save(buffer, "tiff")
    with pytest.raises(CorruptRecordError, match=f"pixels are {kind}, whose range is not known"):
        transforms.decode(buffer.getvalue())


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for fmt in ("png", "jpeg"):
        with pytest.raises(CorruptRecordError, match="bomb"):
            transforms.decode(encode(noise(64, 64), fmt=fmt))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("label", [-1, 2, 1000])
def test_a_label_outside_the_classes_is_an_error(label, on_error):
    transform = EvalImageTransform(32, 32, num_classes=2, on_error=on_error)
    with pytest.raises(UserError, match=rf"label {label} is outside the 2 classes"):
        transform({"image": photograph(), "label": label})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvalImageTransform(32, 33, num_classes=2), "crop is 33, expected 1 to the resize of 32"),
        (lambda: EvalImageTransform(32, 32, num_classes=0), "num_classes is 0"),
        (lambda: EvalImageTransform(32, 32, num_classes=2, on_error="ignore"), "on_error is 'ignore'"),
        (lambda: train_transform(image_size=0), "image_size is 0"),
        (lambda: train_transform(crop_area=(0.5, 1.5)), "crop_area"),
        (lambda: train_transform(crop_area=(0.0, 1.0)), "crop_area"),
        (lambda: train_transform(crop_aspect=(2, 1)), "crop_aspect"),
        (lambda: train_transform(flip=2), "flip is 2"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("transform", [train_transform(), EvalImageTransform(40, 32, num_classes=2)])
def test_transforms_travel_by_pickle(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_a_skipped_record_keeps_its_label():
    assert train_transform().blank(label=1)["label"] == 1
