"""Situations of paths, options and data."""

import json
import os
import shutil
from pathlib import Path

import safetensors

from tests.campaigns.users.situation import Situation, files_below, situation

# --- paths that people have


@situation("paths")
def a_workdir_in_brackets(path: Path) -> None:
    here = Situation(path / "a [1]*?")
    here.trained()
    again = here.train()
    assert again.status == 0 and not (here.run / "damaged_checkpoints").exists(), again.err
    assert "resuming from the checkpoint of step 8" in again.err
    assert json.loads(here.evaluate().out)["images"] == 24
    assert here("export", f"--workdir={here.run}", here.folder / "[a].safetensors").status == 0
    assert (here.folder / "[a].safetensors").exists()


@situation("paths")
def an_empty_path(path: Path) -> None:
    here = Situation(path)
    before = files_below(path) | {"out", "err"}
    for words in (
        ("train", "--config", here.recipe, "--workdir="),
        ("eval", "--workdir="),
        ("export", "--workdir=", "a.safetensors"),
        ("train", "--config", here.recipe, "--config.data.data_dir=", f"--workdir={here.run}"),
        ("train", "--config", here.recipe, "--config.init.weights=", f"--workdir={here.run}"),
        ("prepare", "sklearn_digits", "--data-dir="),
        ("convert", "a.pth", "--out-dir="),
        ("predict", "--weights=", "a.png"),
    ):
        outcome = here(*words)
        assert outcome.status in (1, 2) and outcome.is_message and "the path is empty" in outcome.err, (words, outcome)
    assert files_below(path) == before


@situation("paths")
def a_path_of_another_storage(path: Path) -> None:
    here = Situation(path)
    for scheme in ("s3://bucket/run", "https://example.org/run", "hdfs://a/b", "file:///tmp/run", "gs:/bucket/run"):
        for words in (
            ("train", "--config", here.recipe, f"--workdir={scheme}"),
            ("eval", f"--workdir={scheme}"),
            ("prepare", "sklearn_digits", f"--data-dir={scheme}"),
            ("predict", "--weights", f"{scheme}.safetensors", "a.png"),
        ):
            outcome = here(*words)
            assert outcome.status in (1, 2) and outcome.is_message and scheme in outcome.err, (words, outcome)


@situation("paths")
def a_path_below_the_home_folder(path: Path) -> None:
    here = Situation(path)
    home = path / "home"
    home.mkdir()
    outcome = here.train(workdir="~/run", before=lambda: os.environ.update(HOME=str(home)))
    assert outcome.status == 0, outcome.err
    assert (home / "run" / "eval.json").exists() and not (path / "~").exists()
    outcome = here.train(workdir="~nobody-of-this-name/run")
    assert outcome.status == 1 and "no such user" in outcome.err, outcome


# --- options that may be None


@situation("options")
def none_for_a_number(path: Path) -> None:
    here = Situation(path)
    here.write_recipe(classes=1000)
    here.trained("--config.model.num_classes=None", "--config.checkpoint.every_minutes", "None")
    config = json.loads((here.run / "config.json").read_text())
    assert config["model"]["num_classes"] == 3 and config["checkpoint"]["every_minutes"] is None


@situation("options")
def a_value_after_none(path: Path) -> None:
    here = Situation(path)
    words = ("--config.train.steps=None", "--config.train.steps=4", "--config.ema.decay=0.5", "--config.ema.decay=None")
    here.trained(*words)
    config = json.loads((here.run / "config.json").read_text())
    assert config["train"]["steps"] == 4 and config["ema"]["decay"] is None


@situation("options")
def a_recipe_that_does_not_work(path: Path) -> None:
    here = Situation(path)
    for text, said in (
        ("def get_config(): pass", "returns a NoneType"),
        ("import no_such_package", "imports 'no_such_package'"),
        ("def get_config(:", "line 1: SyntaxError"),
        ("get_config = 3", "not callable"),
        (
            "from polaformer_jax.config import defaults\ndef get_config():\n    c = defaults().lock()\n"
            "    c.optimizer.lrr = 1\n    return c",
            "line 4: AttributeError",
        ),
        ("def get_config():\n    return {}['optimizer']", "line 2: KeyError: optimizer"),
    ):
        here.recipe.write_text(text)
        outcome = here.train()
        message = outcome.err.strip()
        assert outcome.status == 1 and outcome.is_message and said in message, (text, outcome)
        assert "\n" not in message and "\\n" not in message and "\\'" not in message and "'\"" not in message, message
    for words, said in (
        (("--config", path), "a folder"),
        (("--config", here.recipe, "--config.optimzer.lr=1"), "is not a recipe"),
        (("--config", "digits", "--config.optimzer.lr=1"), "Did you mean optimizer"),
        (("--config", "digits", "--config.train.steps=many"), "--config.train.steps"),
    ):
        here.recipe.write_text("")
        outcome = here("train", *words, f"--workdir={here.run}")
        message = outcome.err.strip()
        assert outcome.status == 1 and outcome.is_message and said in message, (words, outcome)
        assert "\n" not in message and "\\n" not in message, message


# --- the data is part of a run


@situation("data")
def a_class_that_was_renamed(path: Path) -> None:
    here = Situation(path)
    here.trained("--config.checkpoint.keep_last=9")
    for split in ("train", "val"):
        (here.data / split / "cat").rename(here.data / split / "zebra")
    for outcome in (here.evaluate(), here.train()):
        assert outcome.status == 1 and outcome.is_message, outcome
        assert "cat, dog, owl" in outcome.err and "dog, owl, zebra" in outcome.err, outcome
    weights = path / "a.safetensors"
    assert here("export", f"--workdir={here.run}", weights).status == 0
    outcome = here("eval", "--config", here.recipe, f"--config.init.weights={weights}")
    assert outcome.status == 1 and "cat, dog, owl" in outcome.err and "dog, owl, zebra" in outcome.err, outcome
    with safetensors.safe_open(weights, "numpy") as file:
        assert json.loads(file.metadata()["classes"]) == ["cat", "dog", "owl"]


@situation("data")
def images_added_before_a_resume(path: Path) -> None:
    here = Situation(path)
    epochs = (
        "--config.train.steps=None",
        "--config.train.epochs=2",
        "--config.schedule.warmup=0",
        "--config.eval.every=1",
    )
    here.trained(*epochs)  # 2 x 48 / 8 steps
    for step in here.steps()[1:]:
        shutil.rmtree(here.run / "checkpoints" / str(step))
    for number in range(60):
        here.add_image("train", "cat", f"more{number}.png", seed=number)
    outcome = here.train(*epochs)
    assert outcome.status == 1 and "48 examples" in outcome.err and "108 examples" in outcome.err, outcome
    outcome = here.train(*epochs, "--config.data.on_change=accept")
    assert outcome.status == 0 and "goes on with it in as many steps as before" in outcome.err, outcome
    assert here.steps()[-1] == 12
    assert json.loads((here.run / "data.json").read_text())["changes"][0]["now"]["examples"] == 108


@situation("data")
def a_mount_with_constant_times(path: Path) -> None:
    here = Situation(path, classes=[f"class{label:02}" for label in range(12)])

    def constant() -> None:
        for folder, _, _ in os.walk(here.data):
            os.utime(folder, (1_600_000_000, 1_600_000_000))

    from polaformer_jax.data.folder_source import FolderSource

    constant()
    assert len(FolderSource(here.data, "train")) == 12 * 16
    here.add_image("train", "class05", "new.png")
    constant()
    assert len(FolderSource(here.data, "train")) == 12 * 16 + 1


@situation("data")
def a_broken_image(path: Path) -> None:
    here = Situation(path)
    broken = here.data / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    outcome = here.train()
    assert outcome.status == 1 and outcome.is_message and str(broken) in outcome.err, outcome
    outcome = here.train("--config.data.on_error=skip")
    assert outcome.status == 0, outcome.err
    fewer = here.steps()[0]
    for step in here.steps():
        if step > fewer:
            shutil.rmtree(here.run / "checkpoints" / str(step))
    outcome = here.train()
    assert outcome.status == 1 and str(broken) in outcome.err, outcome
    outcome = here.train("--config.data.on_error=skip")
    assert outcome.status == 0 and "data.on_error: 'stop' there, 'skip' now" in outcome.err, outcome
