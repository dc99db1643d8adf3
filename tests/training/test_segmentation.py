"""Segmentation, from folders of images and masks to mean IoU, on a backbone that costs little to compile."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import polaformer_jax as pf
from polaformer_jax.cli import predict
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.errors import UserError
from polaformer_jax.files.palette import palette
from polaformer_jax.inference import segmentation
from polaformer_jax.models import registry
from polaformer_jax.models.maps import resize_bilinear
from polaformer_jax.models.segmenter import Scores
from polaformer_jax.training import evaluation, loop
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.metrics import read_scalars
from polaformer_jax.training.sharding import to_devices
from tests.support import dense_backbone, mask_folders
from tests.support.forked_scripts import Group
from tests.support.log_messages import logged
from tests.support.recipes import recipe
from tests.support.runs import final_arrays


@pytest.fixture(scope="module", autouse=True)
def means_registered():
    with dense_backbone.registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mask_folders.write(tmp_path_factory.mktemp("masks"))


def config_of(folder, **changes):
    config = recipe("segmentation", "digits")
    config.model.name = dense_backbone.NAME
    config.model.num_classes = 3
    config.model.img_size = 32
    config.model.head_channels = 4
    config.data.source, config.data.data_dir, config.data.workers = "masks", str(folder), 0
    config.data.train_split, config.data.eval_split = "training", "validation"
    config.mesh.data = 2
    config.train.steps, config.train.batch_size = 4, 8
    config.schedule.warmup = 1.0
    config.eval.every, config.eval.batch_size = 2.0, 2
    config.checkpoint.every_steps, config.log.every = 2, 2
    config.update_from_flattened_dict(changes)
    return config


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


@pytest.mark.slow
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
        label = pixels(folder / f"annotations/validation/{index:02}.png")
        right = (image.labels == label)[label < 255].mean()
        assert right == pytest.approx(result.evaluation.outputs["accuracy"][index], abs=2e-3)
        assert sum(share["share"] for share in image.shares()) == pytest.approx(1)
        assert image.probability.min() >= 1 / 3 - 1e-6
    assert source.class_names == found[0].class_names


KINDS = ("labels", "colours", "overlay")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_predicted_masks_are_written(trained, folder, tmp_path, capsys):
    files = [str(folder / f"images/validation/{i:02}.jpg") for i in (0, 3)]
    arguments = ["--weights", str(exported(trained[1])), "--out", str(tmp_path / "masks"), *files]
    assert predict.main(["--task", "segmentation", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, (height, width), image in zip(("00", "03"), ((20, 30), (64, 31)), found, strict=True):
        labels, colours, overlay = (pixels(tmp_path / "masks" / f"{name}_{kind}.png") for kind in KINDS)
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
def test_predictions_that_are_refused(trained, folder, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("no image")
    arguments = [argument.replace("OWN", "own.txt") for argument in arguments]
    image = str(folder / "images/validation/00.jpg")
    assert predict.main(["--weights", str(exported(trained[1])), image, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_images_that_cannot_be_segmented(trained, monkeypatch):
    path = str(exported(trained[1]))
    with pytest.raises(UserError, match="1 of 1 images cannot be read:\n  image 0: 1 x 9000 pixels, expected at most"):
        segmentation.segment(path, [np.zeros((1, 9000, 3), np.uint8)])
    with pytest.raises(UserError, match="2 class names, but the model has 3 classes"):
        segmentation.segment(path, [np.zeros((1, 1, 3), np.uint8)], class_names=("a", "b"))
    with pytest.raises(UserError, match="the model is a PolaPVT, which does not segment images"):
        segmentation.segment(pf.create_model("pola_pvt_nano", rngs=nnx.Rngs(0)), [])
    with pytest.raises(UserError, match="the model segments images: pf.segment"):
        pf.predict(pf.create_model(weights=path), [np.zeros((1, 1, 3), np.uint8)])
    with pytest.raises(UserError, match="input would have 9,048,064 pixels, .*: give a scale, such as 2048,512"):
        segmentation.segment(path, [np.zeros((2991, 2991, 3), np.uint8)])
    (pixel,) = segmentation.segment(path, np.zeros((1, 1, 3), np.uint8))
    assert pixel.labels.shape == (1, 1) and pixel.shares()[0]["share"] == 1


def test_the_named_backbone_of_a_recipe_can_be_changed():
    config = recipe("segmentation", "ade20k,model=pola_pvt_s,head=semantic_fpn,steps=40")
    assert (config.model.name, config.model.head, config.train.steps) == ("pola_pvt_s", "semantic_fpn", 40)
    assert registry.model_config(config.model.name).family == "PolaPVT" and config.model.window_size is None
    with pytest.raises(UserError, match="config option head=fpn: it is one of semantic_fpn, upernet"):
        recipe("segmentation", "ade20k,head=fpn")
