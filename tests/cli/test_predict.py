"""From image files to classes, names and pictures."""

import io
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import polaformer_jax as pf
from polaformer_jax.cli import predict
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.errors import UserError, WeightsError
from polaformer_jax.files import figures
from polaformer_jax.inference import pictures, prediction
from polaformer_jax.inference.images import evaluation_transform
from polaformer_jax.models.model_info import ModelInfo
from tests.support.small_models import build

NAMES = ("ant", "bee", "cat", "dog", "eel")
PREPROCESS = {"preprocess": '{"resize": 40, "crop": 32}'}
INFO = ModelInfo(preprocess={"resize": 40, "crop": 32})


@pytest.fixture(scope="module")
def model():
    model = build("swin")
    model.info = INFO
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three images of other sizes than the model's."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate([(50, 70), (32, 32), (20, 90)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def results(model, files):
    return prediction.predict(model, files, class_names=NAMES, top=9, batch_size=2)


def test_predictions_are_the_models_own(model, files, results):
    images = [Image.open(path).resize((40, 40), Image.Resampling.BICUBIC).crop((4, 4, 36, 36)) for path in files]
    expected_all = jax.jit(lambda model, x: jax.nn.softmax(model(normalise(x))))(model, np.stack(images))
    for path, result, expected in zip(files, results, np.asarray(expected_all), strict=True):
        assert result["image"] == path
        assert [found["class"] for found in result["predictions"]] == np.argsort(-expected).tolist()
        found = [found["probability"] for found in result["predictions"]]
        np.testing.assert_allclose(found, np.sort(expected)[::-1], rtol=1e-4)
        assert all(found["name"] == NAMES[found["class"]] for found in result["predictions"])


def test_results_survive_json(results):
    assert json.loads(json.dumps(results)) == results


def test_no_more_classes_are_named_than_there_are(results):
    for result in results:
        assert sorted(found["class"] for found in result["predictions"]) == [0, 1, 2, 3, 4]
        assert sum(found["probability"] for found in result["predictions"]) == pytest.approx(1)


def test_without_names_classes_go_by_their_numbers(model, files, results):
    for result in prediction.predict(model, files, top=9, batch_size=2):
        assert all(found["name"] == str(found["class"]) for found in result["predictions"])


def test_all_unreadable_images_are_named_in_one_error(model, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(Path(files[0]).read_bytes()[:500])
    bad = [tmp_path / "none.png", tmp_path / "text.png", tmp_path / "half.png", tmp_path]
    with pytest.raises(UserError) as raised:
        prediction.predict(model, [files[0], *bad, files[1]], batch_size=2)
    assert str(raised.value).startswith("4 of 6 images cannot be read")
    for path, reason in zip(bad, ["No such file", "of no known format", "truncated", "Is a directory"], strict=True):
        assert f"{path}: " in str(raised.value) and reason in str(raised.value)


def test_the_table_names_an_image_once(results):
    lines = prediction.table(results).splitlines()
    assert lines[0].split() == ["image", "probability", "class", "name"]
    assert len(lines) == 1 + 3 * 5
    assert [lines.index(line) for line in lines if ".png" in line] == [1, 6, 11]
    best = results[0]["predictions"][0]
    assert lines[1].split() == [
        results[0]["image"], f"{100 * best['probability']:.2f}", "%", str(best["class"]), best["name"],
    ]  # fmt: skip


@pytest.mark.parametrize("size, resize", [(224, 256), (384, 384), (32, 37), (448, 448), (320, 366)])
def test_the_official_rule_of_resize_and_crop(model, size, resize, monkeypatch):
    resized = types.SimpleNamespace(img_size=size, num_classes=5)
    monkeypatch.setattr(model, "config", resized)
    monkeypatch.setattr(model, "info", ModelInfo())
    transform = evaluation_transform(model)
    assert (transform.resize, transform.crop, transform.num_classes) == (resize, size, 5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "metadata preprocess: not valid JSON"),
        ('{"resize": 40}', "expected integers"),
        ('{"resize": 40, "crop": "32"}', "expected integers"),
        ('{"resize": 256, "crop": 224}', "its crop does not fit the model's img_size, 32"),
    ],
)
def test_refuses_preprocessing_that_cannot_be(model, text, message, tmp_path):
    pf.save_weights(model, tmp_path / "a.safetensors", metadata={"preprocess": text})
    with pytest.raises(WeightsError, match=message):
        pf.predict(tmp_path / "a.safetensors", np.zeros((32, 32, 3), np.uint8))


def test_a_model_without_classifier_predicts_nothing():
    with pytest.raises(UserError, match="no classifier"):
        pf.predict(build("pvt", num_classes=0), np.zeros((32, 32, 3), np.uint8))


def test_names_come_from_a_file_or_a_data_set(tmp_path, digits_dir):
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(10)) + "\n")
    found = prediction.read_class_names(10, file=tmp_path / "names.txt")
    assert found == tuple(f"name {i}" for i in range(10))
    found = prediction.read_class_names(10, data="sklearn_digits", data_dir=digits_dir)
    assert found == tuple("0123456789")
    assert prediction.read_class_names(10) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"file": "{dir}/two.txt"}, "two.txt names 2 classes, but the model has 5"),
        ({"file": "{dir}/none.txt"}, "class names .*none.txt: .*No such file"),
        ({"file": "{dir}/two.txt", "data": "x", "data_dir": "y"}, "both name the classes"),
        ({"data": "sklearn_digits"}, "data and data_dir belong together"),
        ({"data": "sklearn_digits", "data_dir": "{dir}"}, "is not prepared below"),
    ],
    ids=str,
)
def test_refuses_names_that_do_not_fit(arguments, message, tmp_path):
    (tmp_path / "two.txt").write_text("a\nb\n")
    arguments = {key: value.format(dir=tmp_path) for key, value in arguments.items()}
    with pytest.raises(UserError, match=message):
        prediction.read_class_names(5, **arguments)


@pytest.mark.parametrize(
    "chosen, panels, marked",
    [
        ({}, 3, False),
        ({"stage": 0, "block": 1, "token": ("2", "7")}, 3, True),
        ({"stage": 1, "token": (0, 0)}, 2, True),
    ],
    ids=["last linear block", "linear", "softmax"],
)
def test_a_picture_has_a_row_an_image_and_a_panel_a_stream(chosen, panels, marked, model, results, tmp_path):
    where = pictures.choose(model, **chosen)
    files = [result["image"] for result in results[:2]]
    figure = pictures.draw(model, files, results[:2], where=where)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 2 * panels
    assert [len(axes.patches) for axes in drawn] == [int(marked)] * len(drawn)
    assert drawn[0].get_title().startswith("0.png\n") and drawn[panels].get_title().startswith("1.png\n")
    assert all("nats" in axes.get_title() for axes in drawn[1:panels])
    if not chosen:  # once is enough
        figures.save(figure, tmp_path / "a" / "picture.png")
        with Image.open(io.BytesIO((tmp_path / "a/picture.png").read_bytes())) as picture:
            assert min(picture.size) > 500


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stage": 4}, "stage 4: expected an integer from 0 to 3"),
        ({"block": 7}, "block 7: expected an integer from 0 to 0"),
        ({"stage": 0, "token": ("8", "0")}, "token row 8: expected an integer from 0 to 7"),
        ({"stage": 0, "token": ("1",)}, "expected .row, column."),
        ({"stage": 0, "token": ("1", "a")}, "token 1,a: expected ROW,COLUMN, two integers"),
    ],
    ids=str,
)
def test_refuses_to_show_what_is_not_there(arguments, message, model):
    with pytest.raises(UserError, match=message):
        pictures.choose(model, **arguments)


@pytest.mark.parametrize(
    "path, images, message",
    [("a.jpg", 1, "expected the name of a .png file"), ("a.png", 33, "shows at most 32 images, found 33")],
)
def test_refuses_a_picture_before_any_work(path, images, message):
    with pytest.raises(UserError, match=message):
        pictures.check_request(path, images=images)


def test_the_command(model, files, results, tmp_path, capsys):
    metadata = {**PREPROCESS, "classes": json.dumps(NAMES)}
    pf.save_weights(model, tmp_path / "w.safetensors", metadata=metadata)
    assert predict.main([files[0], "--weights", str(tmp_path / "w.safetensors"), "--json", "--top=2", files[1]]) == 0
    for found, expected in zip(json.loads(capsys.readouterr().out), results[:2], strict=True):
        assert found["image"] == expected["image"]
        for one, other in zip(found["predictions"], expected["predictions"][:2], strict=True):
            assert one == {**other, "probability": pytest.approx(other["probability"], rel=1e-4)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.png"], "the following arguments are required: --weights"),
        (["--weights=w.pth"], "the following arguments are required: IMAGE"),
        (["a.png", "--weights=w.pth", "--top=0"], "0: expected at least 1"),
        (["a.png", "--weights=w.pth", "--stage=1"], "say what --picture shows: give --picture OUT.png"),
        (["a.png", "--weights=w.pth"], "there is no weights file w.pth"),
    ],
)
def test_wrong_flags_end_with_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = predict.main(arguments)
    except SystemExit as ended:  # argparse
        status = ended.code
    captured = capsys.readouterr()
    assert status in (1, 2) and captured.out == ""
    assert message in captured.err


def test_an_unknown_model_ends_with_one_message(model, files, tmp_path, capsys):
    pf.save_weights(model, tmp_path / "w.safetensors")
    assert predict.main([str(files[0]), "--weights", str(tmp_path / "w.safetensors"), "--model", "pola_swim_t"]) == 1
    assert "Did you mean pola_swin_t" in capsys.readouterr().err
