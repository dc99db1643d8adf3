"""The means of the campaign: a folder with data and a recipe, commands in processes of their own, and the register."""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.campaigns.processes import wait
from tests.support import ROOT, dense_model
from tests.support.forked_scripts import cache_all_programs
from tests.support.quick import FLAGS

CLASSES = ("cat", "dog", "owl")
RECIPE = """
from tests.support.recipes import dense_digits

def get_config():
    config = dense_digits({data!r})
    config.data.source, config.data.name = "folder", "animals"
    config.data.eval_split = config.data.train_split = "train"
    config.data.eval_split = "val"
    config.model.num_classes = {classes}
    config.train.batch_size, config.eval.batch_size, config.mesh.data = 8, 8, 1
    config.log.pictures = False
    return config
"""
STOPPED = 75
LIMIT_S = 60  # for a command to end


class LeftOut(Exception):
    """This machine cannot make the situation."""


class Outcome(NamedTuple):
    """How a command ended: exit status, or minus the signal; stdout; stderr."""

    status: int
    out: str
    err: str

    @property
    def is_message(self) -> bool:
        """Whether it ended by one message, not by a traceback."""
        return "Traceback" not in self.err and "error: " in self.err


class Situation:
    """A folder with data, a recipe and no run yet, and the means to try things there."""

    def __init__(self, folder: Path, *, classes=CLASSES):
        self.folder = folder
        folder.mkdir(parents=True)
        self.data, self.run = folder / "data", folder / "run"
        for split, count in (("train", 16), ("val", 8)):
            for label, name in enumerate(classes):
                for number in range(count):
                    self.add_image(split, name, f"{number}.png", label=label, seed=1000 * label + number)
        self.recipe = folder / "recipe.py"
        self.write_recipe(len(classes))

    def write_recipe(self, classes: int) -> None:
        self.recipe.write_text(RECIPE.format(data=os.fspath(self.data), classes=classes))

    def add_image(self, split: str, name: str, file: str, *, label: int = 0, seed: int = 0) -> Path:
        """A noisy image whose colour is that of its class."""
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 60, (20, 24, 3))
        pixels[..., label % 3] += 150
        path = self.data / split / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    def train(self, *words: str, workdir: object = None, **how) -> Outcome:
        workdir = self.run if workdir is None else workdir
        return self("train", "--config", str(self.recipe), f"--workdir={workdir}", *words, **how)

    def evaluate(self, *words: str, **how) -> Outcome:
        return self("eval", f"--workdir={self.run}", *words, **how)

    def trained(self, *words: str) -> Outcome:
        outcome = self.train(*words)
        assert outcome.status == 0, outcome.err
        return outcome

    def __call__(self, *words: str, before: Callable[[], None] | None = None) -> Outcome:
        """A command of `polaformer`, in a forked process, which first calls `before`."""
        out, err = self.folder / "out", self.folder / "err"
        child = os.fork()
        if not child:
            in_child(words, out, err, self.folder, before)
        return Outcome(wait(child, LIMIT_S), *(text_of(path) for path in (out, err)))

    def start(self, *words: str, before: Callable[[], None] | None = None) -> int:
        child = os.fork()
        if not child:
            in_child(words, self.folder / "out", self.folder / "err", self.folder, before)
        return child

    def small_weights(self, classes: list[str]) -> Path:
        """The file of a small PolaFormer with random weights and classes of these names."""
        path = self.folder / "small.safetensors"

        def write() -> None:
            from flax import nnx

            import polaformer_jax as pf

            model = pf.create_model("pola_pvt_nano", num_classes=len(classes), rngs=nnx.Rngs(0))
            pf.save_weights(model, path, metadata={"classes": json.dumps(classes)})

        assert self("--version", before=write).status == 0, text_of(self.folder / "err")
        return path

    def steps(self, workdir: Path | None = None) -> list[int]:
        folder = (self.run if workdir is None else workdir) / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="backslashreplace")


def in_child(words, out: Path, err: Path, folder: Path, before) -> None:
    status = 70
    try:
        for number, path in ((1, out), (2, err)) if out else ():
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        os.chdir(folder)
        cache_all_programs()
        if before is not None:
            before()
        from polaformer_jax import cli

        with dense_model.registered():
            status = cli.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def process(words: list[str], *, cwd: Path, env: dict[str, str] | None = None, text: str | None = None) -> Outcome:
    """A process started anew."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS, **(env or {})}
    ended = subprocess.run(words, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=120)
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


SITUATIONS: dict[str, list[Callable[[Path], None]]] = {}


def situation(kind: str):
    """Registers a function that gets a path for a folder of its own, and raises AssertionError or LeftOut."""

    def register(function: Callable[[Path], None]):
        SITUATIONS.setdefault(kind, []).append(function)
        return function

    return register


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)
