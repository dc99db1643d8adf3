"""Images of every kind become the model's input, and a model in one call their classes."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import polaformer_jax as pf
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError
from polaformer_jax.models.model_info import ModelInfo
from tests.support.small_models import build


@pytest.fixture(scope="module")
def model():
    model = build("swin")
    model.info = ModelInfo(class_names=("ant", "bee", "cat", "dog", "eel"), preprocess={"resize": 40, "crop": 32})
    return model


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


def every_kind(picture, folder):
    image = Image.fromarray(picture)
    image.save(folder / "a.png")
    alpha = np.full((*picture.shape[:2], 1), 7, np.uint8)
    return {
        "path": folder / "a.png",
        "text": str(folder / "a.png"),
        "bytes": (folder / "a.png").read_bytes(),
        "Pillow": image,
        "opened": Image.open(io.BytesIO((folder / "a.png").read_bytes())),  # decoded only when it is used
        "NumPy": picture,
        "JAX": jnp.asarray(picture),
        "alpha": np.concatenate([picture, alpha], axis=2),
        "view": picture[::-1][::-1],
    }


def test_every_kind_of_image_gives_the_same_pixels(model, picture, tmp_path):
    resized = Image.fromarray(picture).resize((40, 40), Image.Resampling.BICUBIC).crop((4, 4, 36, 36))
    expected = normalise(np.asarray(resized))
    images = every_kind(picture, tmp_path)
    found = pf.preprocess(model, images.values())
    assert found.shape == (len(images), 32, 32, 3) and found.dtype == jnp.float32
    for kind, one in zip(images, found, strict=True):
        np.testing.assert_array_equal(one, expected, err_msg=kind)
    for kind, image in images.items():  # a single one is a batch of one
        np.testing.assert_array_equal(pf.preprocess(model, image), expected[None], err_msg=kind)
    np.testing.assert_array_equal(pf.preprocess(model, np.stack([picture] * 2)), jnp.stack([expected] * 2))


def test_grey_images_are_of_three_equal_channels(model):
    grey = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    expected = pf.preprocess(model, Image.fromarray(grey))
    for image in (grey, grey[..., None], np.stack([grey] * 3, axis=-1)):
        np.testing.assert_array_equal(pf.preprocess(model, image), expected)
    # of 16 bits, which a cut at 255 would make white
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(pf.preprocess(model, sixteen), expected)


def test_a_model_in_one_call(model, picture, tmp_path):
    pf.save_weights(model, tmp_path / "a.safetensors")
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = jax.jit(lambda model, x: jax.nn.softmax(model(x)))(model, pf.preprocess(model, picture))[0]
    for asked in (model, tmp_path / "a.safetensors", pf.weights.read_file(tmp_path / "a.safetensors")):
        named, array = pf.predict(asked, [tmp_path / "a.png", picture], batch_size=1)
        assert named["image"] == str(tmp_path / "a.png") and array["image"] == "image 1"
        assert named["predictions"] == array["predictions"]
        best = named["predictions"][0]
        assert best["name"] == model.info.class_names[best["class"]]
        assert len(named["predictions"]) == 5 and best["class"] == int(jnp.argmax(expected))
        assert best["probability"] == pytest.approx(float(jnp.max(expected)), rel=1e-4)
    assert pf.predict(model, []) == []
    (one,) = pf.predict(model, picture, class_names="vwxyz")
    assert one["predictions"][0]["name"] == "vwxyz"[best["class"]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"array of float32 \(8, 8, 3\), expected uint8 .*, values from 0 to 255"),
        (np.zeros((3, 8, 8), np.uint8), r"array of uint8 \(3, 8, 8\), expected uint8 .*3\), channels last"),
        (np.zeros((8, 0, 3), np.uint8), "array without pixels"),
        (np.zeros(8, np.uint8), r"array of uint8 \(8,\)"),
        (jnp.zeros((8, 8, 2), jnp.uint8), r"array of uint8 \(8, 8, 2\)"),
        (b"text", "corrupt image .4 bytes.: of no known format"),
        (b"", "corrupt image .0 bytes."),
        (Image.fromarray(np.zeros((8, 8), np.float32)), "pixels are floats, whose range is not known"),
        ("none.png", "^1 of 1 images cannot be read:\n  none.png: No such file"),
        ("", "path is empty"),
        (None, "images: images is a NoneType, expected an image or several"),
        ([None], "image 0: a NoneType, expected a path, bytes, a Pillow image or a uint8 array"),
        ([np.zeros((8, 8, 3), np.uint8), 3], "^1 of 2 images cannot be read:\n  image 1: a int, expected a path"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_named(model, image, message):
    for function in (pf.preprocess, pf.predict):
        with pytest.raises(UserError, match=message):
            function(model, image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": 0}, "top: 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ({"class_names": ["a"]}, "names 1 classes, but the model has 5"),
    ],
)
def test_arguments_that_cannot_be_are_refused(model, picture, arguments, message):
    with pytest.raises(UserError, match=message):
        pf.predict(model, picture, **arguments)
