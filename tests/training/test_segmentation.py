"""Segmentation, from folders of images and masks to mean IoU, on a backbone that costs little to compile."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import polaformer_jax as pf
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.errors import UserError
from polaformer_jax.inference import segmentation
from polaformer_jax.models.maps import resize_bilinear
from polaformer_jax.training import evaluation, loop
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from tests.support import mask_folders
from tests.support.forked_scripts import Group
from tests.support.recipes import means_segmentation as config_of
from tests.support.runs import final_arrays

pytestmark = pytest.mark.slow  # what a step computes: test_segmentation_step.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mask_folders.write(tmp_path_factory.mktemp("masks"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Config, work directory and result of a training."""
    config, workdir = config_of(folder), tmp_path_factory.mktemp("run")
    return config, workdir, loop.train(config, workdir)


def confusion_of(model, source, transform):
    """Pixels of each image by label and prediction, (n, classes, classes), one image after the other."""
    scores = jax.jit(lambda image: model(normalise(image)).logits)
    found = []
    for index in range(len(source)):
        example = transform(source[index])
        image, (height, width) = example["image"], example["size"]
        logits = resize_bilinear(resize_bilinear(scores(image[None]), image.shape[:2]), (int(height), int(width)))
        predicted, label = np.asarray(logits)[0].argmax(-1), example["label"][:height, :width]
        counts = np.zeros((3, 3), int)
        np.add.at(counts, (label[label < 255], predicted[label < 255]), 1)
        found.append(counts)
    return np.array(found)


def test_mean_iou_is_that_of_all_pixels_at_their_own_size(trained):
    config, workdir, result = trained
    experiment = Experiment(config)
    source = experiment.inputs.source("validation")
    model = pf.create_model(weights=exported(workdir))
    each = confusion_of(model, source, experiment.task._eval_transform(source))
    counts = each.sum(0)
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    metrics = result.evaluation.metrics
    # Of 11,000 pixels a few may have two classes whose scores are equal but for rounding.
    assert metrics["miou"] == pytest.approx(np.mean(np.diag(counts) / union), abs=1e-3)
    assert metrics["aacc"] == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-3)
    assert metrics["macc"] == pytest.approx(np.mean(np.diag(counts) / counts.sum(1)), abs=1e-3)
    assert (result.evaluation.counted, result.evaluation.skipped) == (6, 0)
    classes = result.evaluation.details["classes"]
    assert [row["class"] for row in classes] == ["sky", "earth", "sea"]
    assert [row["pixels"] for row in classes] == counts.sum(1).tolist()  # labels are counted exactly
    written = json.loads((workdir / "eval.json").read_text())
    assert written["classes"] == classes and written["miou"] == metrics["miou"]
    right = each.trace(axis1=1, axis2=2) / each.sum((1, 2))
    np.testing.assert_allclose(result.evaluation.outputs["accuracy"], right, atol=2e-3)


def exported(workdir):
    path = workdir / "exported.safetensors"
    if not path.exists():
        evaluation.evaluate(None, workdir, json_path=workdir / "again.json", weights_path=path)
    return path


def test_every_example_counts_once_whatever_the_batch(trained, tmp_path):
    config, workdir, result = trained
    config = config.copy_and_resolve_references()
    config.eval.batch_size, config.mesh.data = 5, 1
    rows = tmp_path / "rows.csv"
    written = evaluation.evaluate(config, workdir, json_path=tmp_path / "e.json", predictions_path=rows)
    assert written["classes"] == result.evaluation.details["classes"]
    assert written["loss"] == pytest.approx(result.evaluation.metrics["loss"], rel=1e-6)
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert [row["record"].rsplit("/", 1)[-1] for row in table] == [f"{i:02}.jpg" for i in range(6)]
    pixels = [height * width for height, width in mask_folders.SIZES]
    assert all(0 < int(row["pixels"]) <= count for row, count in zip(table, pixels, strict=True))
    np.testing.assert_allclose([float(row["miou"]) for row in table], result.evaluation.outputs["miou"], atol=1e-6)


def test_several_sizes_mirrored_images_and_windows(trained, tmp_path):
    config, workdir, _ = trained
    root = mask_folders.write(tmp_path / "data", splits=("validation",), sizes=[(20, 30)] * 2)

    def evaluated(**changes):
        again = config.copy_and_resolve_references()
        again.eval.update(changes)
        return evaluation.evaluate(again, workdir, data_dir=str(root), json_path=tmp_path / "e.json")

    plain, several = evaluated(), evaluated(scales=(1.0, 2.0), flip=True)
    assert [row["pixels"] for row in several["classes"]] == [row["pixels"] for row in plain["classes"]]
    assert several["loss"] != plain["loss"]
    assert evaluated(window=32)["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # of one window


def test_a_run_is_told_drawn_and_logged(trained):
    config, workdir, result = trained
    assert {path.name for path in result.pictures} == {"curves.png", "classes.png", "predictions.png"}
    for path in result.pictures:
        with Image.open(path) as picture:
            assert len(picture.convert("L").getcolors()) > 20  # not blank
    scalars = read_scalars(workdir)
    assert {"eval_miou", "eval_aacc", "eval_macc", "accuracy", "loss"} <= scalars.keys()
    best = int(scalars["eval_miou"][0][scalars["eval_miou"][1].argmax()])
    assert result.step == best


def test_weights_say_what_they_are(trained, tmp_path):
    config, workdir, _ = trained
    model = pf.create_model(weights=exported(workdir))
    assert isinstance(model, pf.Segmenter) and model.info.class_names == ("sky", "earth", "sea")
    assert json.loads(model.info.other["segmentation"]) == {
        **{"scale": None, "scales": [1.0], "window": None, "stride": None, "flip": False}
    }
    again = tmp_path / "again.safetensors"
    pf.save_weights(model, again)
    with pytest.raises(pf.errors.WeightsError, match="there is no official code of segmenters"):
        pf.save_weights(model, again, layout="torch")
    other = pf.create_model(weights=again, num_classes=5)  # a new last layer, zeros
    assert other.config.num_classes == 5 and other.info.class_names is None
    assert not np.asarray(other.decode_head.conv_seg.kernel[...]).any()
    with pytest.raises(pf.errors.WeightsError, match="the weights of a Segmenter, and the model is a PolaPVT"):
        pf.create_model("pola_pvt_nano", weights=again)


def test_a_run_resumes_bit_for_bit(folder, tmp_path):
    config = config_of(folder, **{"ema.decay": 0.9, "eval.weights": "ema", "log.pictures": False})
    loop.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/4")
    loop.train(config, tmp_path / "part")
    arrays, again = (final_arrays(tmp_path / name) for name in ("whole", "part"))
    assert any("'mean'" in name and "ema" in name for name in arrays)
    assert [name for name in arrays if arrays[name].tobytes() != again[name].tobytes()] == []
    one, two = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("whole", "part"))
    assert one["classes"] == two["classes"] and one["kind"] == "ema"


def test_two_processes_count_each_image_once(folder, trained, tmp_path):
    config, workdir, result = trained
    fields = ("task.name", "model.name", "model.img_size", "model.num_classes", "model.head_channels", "data.source")
    fields += (
        "data.data_dir",
        "data.train_split",
        "data.eval_split",
        "data.workers",
        "train.steps",
        "train.batch_size",
    )
    fields += ("schedule.warmup", "eval.every", "eval.batch_size", "checkpoint.every_steps", "log.every")
    values = {field: config[field.split(".")[0]][field.split(".")[1]] for field in fields}
    arguments = [f"--config.{field}={value}" for field, value in values.items()]
    arguments = ["--config=configs/segmentation.py:digits", *arguments, f"--workdir={tmp_path / 'run'}"]
    with Group("train.py", arguments, processes=2, logs=tmp_path / "logs") as running:
        assert running.statuses() == [0, 0], running.errors()
    found = json.loads((tmp_path / "run/eval.json").read_text())
    assert (found["images"], found["skipped"]) == (6, 0)
    assert found["miou"] == pytest.approx(result.evaluation.metrics["miou"], abs=2e-3)
    assert [row["pixels"] for row in found["classes"]] == [
        row["pixels"] for row in result.evaluation.details["classes"]
    ]
    pictures = {path.name for path in (tmp_path / "run/pictures").iterdir()}
    assert pictures == {"curves.png", "classes.png", "predictions.png"}


def test_broken_images_are_skipped_and_broken_masks_never(folder, trained, tmp_path):
    root = mask_folders.write(tmp_path / "data")
    (root / "images/validation/01.jpg").write_bytes(b"no image")
    _, workdir, _ = trained
    with pytest.raises(UserError, match="01.jpg: corrupt image"):
        evaluation.evaluate(None, workdir, data_dir=str(root), json_path=tmp_path / "e.json")
    config = config_of(root, **{"data.on_error": "skip", "init.weights": str(exported(workdir))})
    written = evaluation.evaluate(config, None, predictions_path=tmp_path / "rows.csv")
    assert (written["images"], written["skipped"]) == (5, 1)
    assert (tmp_path / "rows.csv").read_text().splitlines()[2].endswith("01.jpg,,,,")
    (root / "annotations/validation/01.png").write_bytes(mask_folders.png(np.full((33, 40), 7, np.uint8)))
    (root / "images/validation/01.jpg").write_bytes(mask_folders.image((33, 40)))
    with pytest.raises(UserError, match=r"01.jpg: the mask has numbers outside the 3 classes: 7 \(1320 pixels\)"):
        evaluation.evaluate(config, None)
    assert issubclass(CorruptRecordError, UserError)


def test_images_are_segmented_as_in_the_evaluation(trained, folder):
    config, workdir, result = trained
    experiment = Experiment(config)
    source = experiment.inputs.source("validation")
    files = [folder / f"images/validation/{i:02}.jpg" for i in range(6)]
    found = list(segmentation.segment(str(exported(workdir)), files))
    assert [image.labels.shape for image in found] == mask_folders.SIZES
    for index, image in enumerate(found):
        label = mask_folders.pixels(folder / f"annotations/validation/{index:02}.png")
        right = (image.labels == label)[label < 255].mean()
        assert right == pytest.approx(result.evaluation.outputs["accuracy"][index], abs=2e-3)
        assert sum(share["share"] for share in image.shares()) == pytest.approx(1)
        assert image.probability.min() >= 1 / 3 - 1e-6
    assert source.class_names == found[0].class_names
