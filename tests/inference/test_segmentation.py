"""Masks of images: what `polaformer predict` writes, and what is refused."""

import json

import numpy as np
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.cli import predict
from polaformer_jax.errors import UserError
from polaformer_jax.files.palette import palette
from polaformer_jax.inference import segmentation
from polaformer_jax.models import registry
from polaformer_jax.models.model_info import ModelInfo
from tests.support import dense_backbone, mask_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mask_folders.write(tmp_path_factory.mktemp("masks"), splits=("validation",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights of a segmenter on the cheap backbone."""
    with dense_backbone.registered():
        config = registry.segmenter_config(dense_backbone.NAME, head="semantic_fpn", num_classes=3, head_channels=4)
        model = registry.create(config, rngs=nnx.Rngs(0))
        model.info = ModelInfo(class_names=mask_folders.CLASSES)
        path = tmp_path_factory.mktemp("weights") / "means.safetensors"
        pf.save_weights(model, path)
        yield str(path)


KINDS = ("labels", "colours", "overlay")


def test_predicted_masks_are_written(saved, folder, tmp_path, capsys):
    files = [str(folder / f"images/validation/{i:02}.jpg") for i in (0, 3)]
    arguments = ["--weights", saved, "--out", str(tmp_path / "masks"), *files]
    assert predict.main(["--task", "segmentation", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, (height, width), image in zip(("00", "03"), ((20, 30), (64, 31)), found, strict=True):
        labels, colours, overlay = (mask_folders.pixels(tmp_path / "masks" / f"{name}_{kind}.png") for kind in KINDS)
        assert labels.shape == (height, width) and colours.shape == overlay.shape == (height, width, 3)
        np.testing.assert_array_equal(colours, palette(3)[labels])
        shares = {share["class"]: share["share"] for share in image["classes"]}
        assert shares == {int(label): (labels == label).mean() for label in np.unique(labels)}
        assert image["classes"][0]["name"] in mask_folders.CLASSES
    assert predict.main(arguments) == 0  # the weights say what they are for
    assert "2 images in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "segmentation"], "--task segmentation writes masks: give --out DIR"),
        ([], "the weights are of a segmenter, which writes masks: give --out DIR"),
        (["--out", "masks", "--task", "classification"], "--task classification: the weights are of a Segmenter"),
        (
            ["--out", "masks", "--picture", "p.png"],
            "--out, --scale and --flip are of a segmentation, --picture of",
        ),
        (["--out", "OWN"], "is a file: name a folder"),
        (["--out", "masks", "--scale", "5"], "--scale 5: expected two sides in pixels, such as 2048,512"),
        (["--out", "masks", "--batch-size", "2"], "--batch-size: images are segmented one after the other"),
        (["--out", "masks", "OWN"], "1 of 2 images cannot be read"),
        (["--out", "masks", "elsewhere/00.png"], "several images are called 00, up to folder and suffix"),
    ],
)
def test_predictions_that_are_refused(saved, folder, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("no image")
    arguments = [argument.replace("OWN", "own.txt") for argument in arguments]
    image = str(folder / "images/validation/00.jpg")
    assert predict.main(["--weights", saved, image, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_images_that_cannot_be_segmented(saved):
    with pytest.raises(UserError, match="1 of 1 images cannot be read:\n  image 0: 1 x 9000 pixels, expected at most"):
        segmentation.segment(saved, [np.zeros((1, 9000, 3), np.uint8)])
    with pytest.raises(UserError, match="2 class names, but the model has 3 classes"):
        segmentation.segment(saved, [np.zeros((1, 1, 3), np.uint8)], class_names=("a", "b"))
    with pytest.raises(UserError, match="the model is a PolaPVT, which does not segment images"):
        segmentation.segment(pf.create_model("pola_pvt_nano", rngs=nnx.Rngs(0)), [])
    with pytest.raises(UserError, match="the model segments images: pf.segment"):
        pf.predict(pf.create_model(weights=saved), [np.zeros((1, 1, 3), np.uint8)])
    with pytest.raises(UserError, match="input would have 9,048,064 pixels, .*: give a scale, such as 2048,512"):
        segmentation.segment(saved, [np.zeros((2991, 2991, 3), np.uint8)])
    (pixel,) = segmentation.segment(saved, np.zeros((1, 1, 3), np.uint8))
    assert pixel.labels.shape == (1, 1) and pixel.shares()[0]["share"] == 1
