"""Situations that are in no list of reports."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaigns.processes import wait
from tests.campaigns.users.situation import LIMIT_S, STOPPED, Situation, process, situation, text_of, wait_for

# --- what is in no list


@situation("others")
def a_workdir_that_is_a_file(path: Path) -> None:
    here = Situation(path)
    for workdir in (here.recipe, here.recipe / "run"):
        outcome = here.train(workdir=workdir)
        assert outcome.status == 1 and outcome.is_message and "cannot be written" in outcome.err, outcome


@situation("others")
def a_workdir_behind_a_link(path: Path) -> None:
    here = Situation(path)
    (path / "disk").mkdir()
    (path / "link").symlink_to(path / "disk")
    assert here.train(workdir=path / "link" / ".." / "link" / "r ü n 🦉" / "").status == 0
    assert (path / "disk" / "r ü n 🦉" / "eval.json").exists()
    (path / "dangling").symlink_to(path / "nowhere")
    outcome = here.train(workdir=path / "dangling")
    assert outcome.status == 1 and outcome.is_message, outcome


@situation("others")
def a_name_that_is_too_long(path: Path) -> None:
    here = Situation(path)
    outcome = here.train(workdir=path / ("r" * 300))
    assert outcome.status == 1 and outcome.is_message and "name too long" in outcome.err.lower(), outcome


@situation("others")
def two_trainings_in_one_workdir(path: Path) -> None:
    here = Situation(path)
    first = here.start("train", "--config", here.recipe, f"--workdir={here.run}", "--config.train.steps=100000")
    wait_for(here.run / "checkpoints" / "3")
    outcome = here.train("--config.train.steps=100000")
    os.kill(first, signal.SIGTERM)
    assert wait(first, LIMIT_S) == STOPPED
    assert outcome.status == 1 and outcome.is_message and f"pid {first}" in outcome.err, outcome


@situation("others")
def files_of_a_run_that_are_damaged(path: Path) -> None:
    here = Situation(path)
    here.trained()
    for name in ("config.json", "data.json"):
        content = (here.run / name).read_bytes()
        for damaged in (b"", b"{", content[: len(content) // 2], b"[]", b"\xff\xfe"):
            (here.run / name).write_bytes(damaged)
            for outcome in (here.evaluate(), here.train()):
                assert outcome.status == 1 and outcome.is_message and name in outcome.err, (name, damaged, outcome)
        (here.run / name).write_bytes(content)
    assert here.evaluate().status == 0


@situation("others")
def checkpoints_and_splits_that_are_not_there(path: Path) -> None:
    here = Situation(path)
    here.trained()
    for words, said in (
        (("--checkpoint=7777",), "8"),
        (("--checkpoint=last",), "best, latest or a step"),
        (("--split=test",), "val"),
        (("--split=../data/val",), "no split"),
        (("--weights=ema", "--checkpoint=-1"), "expected best"),
        ((f"--data-dir={path / 'elsewhere'}",), "does not exist"),
    ):
        outcome = here.evaluate(*words)
        assert outcome.status == 1 and outcome.is_message and said in outcome.err, (words, outcome)


@situation("others")
def numbers_that_cannot_be(path: Path) -> None:
    here = Situation(path)
    for word in (
        *("train.steps=0", "train.steps=-3", "train.batch_size=0", "train.batch_size=-8", "eval.batch_size=0"),
        *("optimizer.lr=nan", "optimizer.lr=-1", "optimizer.b1=1", "model.img_size=0", "model.num_classes=0"),
        *("data.workers=-1", "checkpoint.keep_last=0", "seed=-1", "mesh.data=3", "model.num_classes=4"),
        *("augment.crop_area=(0,1)", "model.dtype=float16", "log.every=0", "schedule.warmup=-1"),
    ):
        outcome = here.train(f"--config.{word}")
        assert outcome.status == 1 and outcome.is_message and word.split("=")[0].split(".")[-1] in outcome.err, outcome
    assert not here.run.exists()


@situation("others")
def more_examples_asked_for_than_there_are(path: Path) -> None:
    here = Situation(path)
    outcome = here.train("--config.train.batch_size=500", "--config.eval.batch_size=500", "--config.train.steps=2")
    assert outcome.status == 0 and "images         24" in outcome.out, outcome


@situation("others")
def images_of_every_kind(path: Path) -> None:
    here = Situation(path)
    weights = here.small_weights(["a", "b"])
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (30, 20), np.uint8))
    for mode, suffix in (
        *(("L", "png"), ("1", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg")),
        *(("RGB", "webp"), ("RGB", "bmp"), ("RGB", "tiff"), ("RGB", "ppm"), ("I;16", "png")),
    ):
        grey.convert(mode).save(path / f"{mode.replace(';', '')}.{suffix}")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(path / "one.png")
    Image.fromarray(np.zeros((1, 3000), np.uint8)).save(path / "line.png")
    files = [file for file in path.iterdir() if file.suffix[1:] in ("png", "gif", "jpg", "webp", "bmp", "tiff", "ppm")]
    outcome = here("predict", "--weights", weights, "--json", *files)
    assert outcome.status == 0 and len(json.loads(outcome.out)) == len(files) == 14, outcome
    (path / "empty.png").write_bytes(b"")
    (path / "folder.png").mkdir()
    outcome = here(
        "predict", "--weights", weights, path / "empty.png", path / "folder.png", path / "none.png", files[0]
    )
    assert outcome.status == 1 and outcome.is_message and "3 of 4 images" in outcome.err, outcome


@situation("others")
def links_and_pipes_among_the_images(path: Path) -> None:
    here = Situation(path)
    cats = here.data / "train" / "cat"
    (cats / "z_link.png").symlink_to(cats / "0.png")
    (here.data / "train" / "also_cat").symlink_to(cats)
    (here.data / "val" / "also_cat").symlink_to(here.data / "val" / "cat")
    here.write_recipe(classes=4)
    here.trained()
    os.mkfifo(cats / "pipe.png")
    (cats / "dangling.png").symlink_to(path / "nowhere")
    outcome = here.train(workdir=path / "other")
    assert outcome.status == 1 and outcome.is_message, outcome
    outcome = here.train("--config.data.on_error=skip", workdir=path / "another")
    assert outcome.status == 0 and "could not be decoded" in outcome.err, outcome


@situation("others")
def times_in_the_future(path: Path) -> None:
    here = Situation(path)
    for file in [here.data, *here.data.rglob("*")]:
        os.utime(file, (4e9, 4e9))
    here.trained()
    assert json.loads(here.evaluate().out)["images"] == 24


@situation("others")
def output_in_ascii(path: Path) -> None:
    here = Situation(path, classes=["chat", "hund 🐕", "сова"])
    weights = here.small_weights(["chat", "hund 🐕", "сова"])
    image = here.data / "val" / "сова" / "1.png"
    words = [sys.executable, "-m", "polaformer_jax.cli", "predict", "--weights", str(weights), str(image)]
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX", "JAX_PLATFORMS": "cpu"}
    outcome = process(words, cwd=path, env=ascii_only)
    assert outcome.status == 0 and "\\u0441\\u043e\\u0432\\u0430" in outcome.out, outcome


@situation("others")
def no_output_at_all(path: Path) -> None:
    here = Situation(path)
    here.trained()
    (here.run / "eval.json").unlink()
    script = 'exec "$@" <&- >&- 2>&-'  # as some schedulers start a command
    words = [sys.executable, "-m", "polaformer_jax.cli", "predict", "--weights", str(here.small_weights(["a", "b"]))]
    picture = path / "maps.png"
    words += [f"--picture={picture}", str(here.data / "val" / "cat" / "1.png")]
    outcome = process(["sh", "-c", script, "sh", *words], cwd=path, env={"JAX_PLATFORMS": "cpu"})
    assert outcome.status == 0 and picture.exists(), outcome


@situation("others")
def a_current_folder_that_is_gone(path: Path) -> None:
    here = Situation(path)

    def vanish() -> None:
        (path / "gone").mkdir()
        os.chdir(path / "gone")
        (path / "gone").rmdir()

    outcome = here.train(before=vanish)
    assert outcome.status == 0, outcome
    outcome = here.train(workdir="relative", before=lambda: (vanish(), None)[1])
    assert outcome.status == 1 and outcome.is_message, outcome


@situation("others")
def few_open_files(path: Path) -> None:
    here = Situation(path)
    outcome = here.train(before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert outcome.status == 0 or outcome.is_message, outcome


@situation("others")
def double_precision_by_the_environment(path: Path) -> None:
    here = Situation(path)

    def wide() -> None:
        import jax

        jax.config.update("jax_enable_x64", True)

    here.trained()
    outcome = here.train(before=wide)
    assert outcome.status == 0, outcome
    outcome = here.train("--config.model.dtype=float64", workdir=path / "wide", before=wide)
    assert outcome.status == 0, outcome


@situation("others")
def weights_of_something_else(path: Path) -> None:
    here = Situation(path)
    weights = here.small_weights(["a", "b"])
    outcome = here.train(f"--config.init.weights={weights}")
    assert outcome.status == 2 and outcome.is_message and "the model is a Dense" in outcome.err, outcome
    (path / "folder.safetensors").mkdir()
    outcome = here.train(f"--config.init.weights={path / 'folder.safetensors'}", workdir=path / "other")
    assert outcome.status == 2 and outcome.is_message and "is a folder" in outcome.err, outcome


@situation("others")
def an_export_onto_a_file(path: Path) -> None:
    here = Situation(path)
    here.trained()
    target = path / "a.safetensors"
    target.write_text("mine")
    outcome = here("export", f"--workdir={here.run}", target)
    assert outcome.status == 1 and "--overwrite" in outcome.err and target.read_text() == "mine", outcome
    assert here("export", f"--workdir={here.run}", target, "--overwrite").status == 0 and target.stat().st_size > 1000
    outcome = here("export", f"--workdir={here.run}", target / "b.safetensors")
    assert outcome.status == 1 and outcome.is_message, outcome
    outcome = here("export", f"--workdir={path}", path / "c.safetensors")
    assert outcome.status == 1 and outcome.is_message and "not the work directory" in outcome.err, outcome


@situation("others")
def an_option_given_twice(path: Path) -> None:
    here = Situation(path)
    outcome = here.train(f"--workdir={path / 'second'}")
    assert outcome.status == 0 and (path / "second" / "eval.json").exists() and not here.run.exists(), outcome


@situation("others")
def a_data_set_with_one_class_or_one_image(path: Path) -> None:
    here = Situation(path / "one class", classes=["only"])
    here.trained()
    few = Situation(path / "one image")
    for file in sorted((few.data / "val").rglob("*.png"))[1:]:
        file.unlink()
    outcome = few.train()
    assert outcome.status == 0 and "images         1" in outcome.out, outcome


@situation("others")
def a_workdir_that_vanishes(path: Path) -> None:
    here = Situation(path)
    child = here.start("train", "--config", here.recipe, f"--workdir={here.run}", "--config.train.steps=100000")
    wait_for(here.run / "checkpoints" / "3")
    here.run.rename(path / "moved")
    outcome = wait(child, LIMIT_S)
    said = text_of(path / "err")
    assert outcome == 1 and "Traceback" not in said and "error: " in said, said
