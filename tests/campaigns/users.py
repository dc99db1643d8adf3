"""What users do that nobody planned for: each situation with the right outcome, on a tiny folder of images.

    python -m tests.campaigns.users
    python -m tests.campaigns.users --only path --keep /tmp/users

A situation is one or a few commands, each in a process of its own: forked from this one, in which everything is
imported but no device opened, or started anew where the process itself is what is tested. The model is two dense
layers. A situation that this machine cannot make (another user, a small /dev/shm) is reported as left out.
"""

import argparse
import concurrent.futures
import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import safetensors
from PIL import Image
from tqdm import tqdm

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
            _in_child(words, out, err, self.folder, before)
        return Outcome(_ended(child), *(_text(path) for path in (out, err)))

    def start(self, *words: str, before: Callable[[], None] | None = None) -> int:
        child = os.fork()
        if not child:
            _in_child(words, self.folder / "out", self.folder / "err", self.folder, before)
        return child

    def small_weights(self, classes: list[str]) -> Path:
        """The file of a small PolaFormer with random weights and classes of these names."""
        path = self.folder / "small.safetensors"

        def write() -> None:
            from flax import nnx

            import polaformer_jax as pf

            model = pf.create_model("pola_pvt_nano", num_classes=len(classes), rngs=nnx.Rngs(0))
            pf.save_weights(model, path, metadata={"classes": json.dumps(classes)})

        assert self("--version", before=write).status == 0, _text(self.folder / "err")
        return path

    def steps(self, workdir: Path | None = None) -> list[int]:
        folder = (self.run if workdir is None else workdir) / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="backslashreplace")


def _in_child(words, out: Path, err: Path, folder: Path, before) -> None:
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


# --- names that are not plain


@situation("names")
def classes_with_any_names(path: Path) -> None:
    byte = os.fsdecode(b"caf\xe9")
    here = Situation(path, classes=["$a$b", "\n new", byte])
    here.trained("--config.log.pictures=True")
    assert {"confusion.png", "predictions.png", "curves.png"} <= files_below(here.run / "pictures")
    table = path / "table.csv"
    outcome = here.evaluate(f"--predictions={table}", f"--save-weights={path / 'a.safetensors'}")
    assert outcome.status == 0, outcome
    assert "caf\\xe9" in table.read_text() and "$a$b" in table.read_text() and "\\n new" in table.read_text()
    image = here.data / "val" / byte / "1.png"
    weights = here.small_weights(["$a$b", "\n new", byte])
    outcome = here("predict", "--weights", weights, f"--picture={path / 'maps.png'}", image)
    assert outcome.status == 0 and "caf\\xe9/1.png" in outcome.out and "caf\\xe9\n" in outcome.out, outcome
    assert (path / "maps.png").exists()


@situation("names")
def a_picture_that_cannot_be_drawn(path: Path) -> None:
    here = Situation(path)

    def broken() -> None:
        from polaformer_jax.training import reports

        reports.confusion = mock.Mock(side_effect=ValueError("no such colour"))

    outcome = here.train("--config.log.pictures=True", before=broken)
    assert outcome.status == 0 and "test accuracy" in outcome.out and "confusion.png was not drawn" in outcome.err, (
        outcome
    )
    assert {"curves.png", "predictions.png"} <= files_below(here.run / "pictures")


# --- results are never lost


def _limited(size: int) -> Callable[[], None]:
    """Files cannot become larger, as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@situation("results")
def a_disk_that_is_full(path: Path) -> None:
    here = Situation(path)
    here.trained()
    shutil.copy(here.run / "eval.json", path / "before.json")
    outcome = here.evaluate(before=_limited(1000))  # nothing can be written: known before the work
    assert outcome.status == 1 and outcome.is_message and not outcome.out and "cannot be written" in outcome.err, (
        outcome
    )
    table = path / "table.csv"

    def full_at_the_end() -> None:
        from polaformer_jax.training import evaluation

        evaluation.write_json = mock.Mock(
            side_effect=evaluation.UserError("result 'eval.json' cannot be written: full")
        )

    outcome = here.evaluate(f"--predictions={table}", before=full_at_the_end)
    assert outcome.status == 1 and outcome.is_message and json.loads(outcome.out)["images"] == 24, outcome
    assert table.exists()


@situation("results")
def a_folder_that_cannot_be_written(path: Path) -> None:
    here = Situation(path)
    here.trained()
    (here.run / "eval.json").unlink()
    (here.run / "eval.json").mkdir()
    outcome = here.evaluate()
    assert outcome.status == 1 and outcome.is_message and "is a folder" in outcome.err, outcome
    outcome = here.evaluate(f"--json={here.recipe / 'a.json'}")
    assert outcome.status == 1 and outcome.is_message and "cannot be written" in outcome.err, outcome


@situation("results")
def output_that_goes_nowhere(path: Path) -> None:
    here = Situation(path)
    here.trained()

    def to_a_full_device() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    def to_a_closed_pipe() -> None:
        receive, send = os.pipe()
        os.close(receive)
        os.dup2(send, 1)

    outcome = here.evaluate(before=to_a_full_device)
    assert outcome.status == 1 and outcome.is_message and "the output cannot be written" in outcome.err, outcome
    outcome = here.evaluate(before=to_a_closed_pipe)
    assert outcome.status == 1 and "Traceback" not in outcome.err and "error" not in outcome.err, outcome


# --- surroundings


@situation("surroundings")
def a_file_system_without_locks(path: Path) -> None:
    here = Situation(path)

    def no_locks() -> None:
        import fcntl

        fcntl.flock = mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))

    outcome = here.train(before=no_locks)
    assert outcome.status == 0 and "cannot be locked (Function not implemented)" in outcome.err, outcome


@situation("surroundings")
def a_small_shared_memory(path: Path) -> None:
    here = Situation(path)
    mount = 'mount -t tmpfs -o size=3m tmpfs /dev/shm && exec "$@"'
    unshare = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        raise LeftOut("no mounts of one's own")
    here.recipe.write_text(here.recipe.read_text().replace("dense_digits(", "_digits("))
    here.recipe.write_text(_DIGITS + here.recipe.read_text())
    words = [sys.executable, "-m", "polaformer_jax.cli", "train", "--config", str(here.recipe), f"--workdir={here.run}"]
    outcome = process([*unshare, *words, "--config.data.workers=2"], cwd=path, env={"JAX_PLATFORMS": "cpu"})
    assert outcome.status == 1 and outcome.is_message, outcome
    assert "/dev/shm has 2 MiB free" in outcome.err and "--shm-size" in outcome.err, outcome


_DIGITS = """
from polaformer_jax.training import recipes

def _digits(data):
    config = recipes.load("digits")
    config.data.data_dir = data
    config.data.prefetch = 64
    return config
"""


@situation("surroundings")
def no_such_device(path: Path) -> None:
    here = Situation(path)
    words = [sys.executable, "-m", "polaformer_jax.cli", "train", "--config", "digits", f"--workdir={here.run}"]
    outcome = process(words, cwd=path, env={"JAX_PLATFORMS": "cuda"})
    assert outcome.status == 1 and outcome.is_message and "JAX_PLATFORMS=cuda" in outcome.err, outcome
    assert outcome.err.count("\n") == 1, outcome


@situation("surroundings")
def a_user_without_a_home(path: Path) -> None:
    here = Situation(path)
    image = here.data / "val" / "cat" / "1.png"
    here.trained(f"--workdir={here.run}")
    weights = path / "a.safetensors"
    assert here("export", f"--workdir={here.run}", weights).status == 0
    script = path / "script.py"
    script.write_text(
        "import sys\n"
        "from polaformer_jax.data.folder_source import FolderSource\n"
        "from polaformer_jax.data.images.resampling import resize\n"
        "import numpy as np\n"
        f"source = FolderSource({os.fspath(here.data)!r}, 'train')\n"
        "print(len(source), resize(np.zeros((9, 9, 3), np.uint8), (4, 4)).shape)\n"
    )
    del image
    for folder in (path, *path.parents):
        if not os.stat(folder).st_mode & 1:
            raise LeftOut(f"{folder} is closed to other users")
    for index in here.data.glob(".polaformer_index*"):
        index.unlink()
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "env", "-u", "HOME"]
    if shutil.which("setpriv") is None or subprocess.run([*user, "true"], capture_output=True).returncode:
        raise LeftOut("no right to become another user")
    if subprocess.run([*user, sys.executable, "-c", "import numpy"], capture_output=True).returncode:
        raise LeftOut("another user cannot run this Python")
    outcome = process([*user, sys.executable, str(script)], cwd=Path("/"))
    assert outcome.status == 0 and outcome.out == "48 (4, 4, 3)\n", outcome
    assert not (path / "~").exists()


@situation("surroundings")
def a_terminal_that_closes(path: Path) -> None:
    here = Situation(path)
    long = ("train", "--config", here.recipe, f"--workdir={here.run}", "--config.train.steps=100000")
    child, terminal = os.forkpty()
    if not child:
        _in_child(long, None, None, path, None)
    _wait_for(here.run / "checkpoints" / "3")
    os.close(terminal)  # from here on, whatever the run says is an error of its own
    assert _ended(child) == STOPPED
    saved = here.steps()[-1]
    child = here.start(*long, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # nohup
    _wait_for(here.run / "checkpoints" / str(saved + 3 - saved % 3))
    os.kill(child, signal.SIGHUP)
    _wait_for(here.run / "checkpoints" / str(saved + 12 - saved % 3))
    os.kill(child, signal.SIGTERM)
    assert _ended(child) == STOPPED, _text(path / "err")


def _ended(child: int) -> int:
    """The exit status of a child, or minus the signal that ended it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("a process did not end")


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


@situation("surroundings")
def a_program_without_a_main_guard(path: Path) -> None:
    here = Situation(path)
    program = (
        "from polaformer_jax.training import loop, recipes\n"
        f"config = recipes.load({os.fspath(here.recipe)!r})\n"
        "from tests.support import dense_model\n"
        "with dense_model.registered():\n"
        "    config.data.workers = 1\n"
        f"    loop.train(config, {os.fspath(here.run)!r})\n"
    )
    (path / "program.py").write_text(program)
    with concurrent.futures.ThreadPoolExecutor() as side_by_side:
        outcomes = [
            side_by_side.submit(process, [sys.executable, *words], cwd=path, env={"JAX_PLATFORMS": "cpu"}, text=text)
            for words, text in (
                (["program.py"], None),
                (["-"], program.replace(os.fspath(here.run), os.fspath(path / "other"))),
            )
        ]
    for outcome in (future.result() for future in outcomes):
        last = outcome.err.strip().splitlines()[-1]
        assert outcome.status == 1 and "__main__" in last and "standard input" in last, outcome


# --- bad numbers and wrong files


@situation("numbers")
def weights_that_are_not_finite(path: Path) -> None:
    here = Situation(path)
    here.trained()
    file = path / "a.safetensors"
    assert here("export", f"--workdir={here.run}", file, "--layout=ours").status == 0
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    tensors["head.bias"] = np.full_like(tensors["head.bias"], np.nan)
    bad = path / "bad.safetensors"
    save_file(tensors, bad)
    small = here.small_weights(["a", "b"])
    tensors = load_file(small)
    tensors["head.bias"] = np.full_like(tensors["head.bias"], np.inf)
    save_file(tensors, small)
    for words in (
        ("predict", "--model=pola_pvt_nano", "--weights", small, here.data / "val" / "cat" / "1.png"),
        ("convert", small, path / "converted.safetensors"),
        ("eval", "--config", here.recipe, f"--config.init.weights={bad}"),
        ("train", "--config", here.recipe, f"--config.init.weights={bad}", f"--workdir={path / 'other'}"),
    ):
        outcome = here(*words)
        assert outcome.status == 2 and outcome.is_message and "not finite" in outcome.err, (words, outcome)


@situation("numbers")
def files_that_are_no_weights(path: Path) -> None:
    here = Situation(path)
    for text, said in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("<!DOCTYPE html><html>", "a web page"),
        ('{"error": "not found"}', "JSON"),
        ("", "empty"),
    ):
        for suffix in (".safetensors", ".pth"):
            file = path / f"a{suffix}"
            file.write_text(text)
            outcome = here("predict", "--weights", file, here.data / "val" / "cat" / "1.png")
            assert outcome.status == 2 and outcome.is_message and said in outcome.err, (text, suffix, outcome)


@situation("numbers")
def images_of_many_bits(path: Path) -> None:
    from polaformer_jax.data.images.transforms import decode
    from polaformer_jax.data.records import CorruptRecordError

    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    content = io.BytesIO()
    Image.fromarray(ramp).save(content, "png")
    pixels = decode(content.getvalue())
    assert np.abs(pixels[..., 0].astype(int) - ramp / 257).max() <= 0.5 and len(np.unique(pixels)) > 200
    content = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(content, "tiff")
    try:
        decode(content.getvalue())
    except CorruptRecordError as error:
        assert "floats" in str(error)
    else:
        raise AssertionError("floats were taken")
    path.mkdir()


@situation("numbers")
def files_that_are_left_out(path: Path) -> None:
    here = Situation(path)
    (here.data / "train" / "cat" / "a.webp").write_bytes(b"x")
    (here.data / "train" / "dog" / "notes.txt").write_bytes(b"x")
    (here.data / "train" / "dog" / "more").mkdir()
    outcome = here.trained()
    assert "left out" in outcome.err and "1 .txt files, 1 .webp files, 1 folders" in outcome.err, outcome.err


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
    _wait_for(here.run / "checkpoints" / "3")
    outcome = here.train("--config.train.steps=100000")
    os.kill(first, signal.SIGTERM)
    assert _ended(first) == STOPPED
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
    _wait_for(here.run / "checkpoints" / "3")
    here.run.rename(path / "moved")
    outcome = _ended(child)
    said = _text(path / "err")
    assert outcome == 1 and "Traceback" not in said and "error: " in said, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds and situations whose names contain this")
    parser.add_argument("--keep", metavar="FOLDER", help="folder to work in, which is kept [a temporary one]")
    args = parser.parse_args()
    chosen = [
        (kind, function)
        for kind, functions in SITUATIONS.items()
        for function in functions
        if args.only in f"{kind} {function.__name__}"
    ]
    import clu.metric_writers  # noqa: F401
    import tensorflow  # noqa: F401

    import polaformer_jax.training.export  # noqa: F401
    import polaformer_jax.training.loop  # noqa: F401

    failed, left_out = [], []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["XLA_FLAGS"] = FLAGS
        for kind, function in tqdm(chosen, unit="situation", disable=None):
            name = f"{kind}: {function.__name__.replace('_', ' ')}"
            started = time.monotonic()
            try:
                function(folder / function.__name__)
            except LeftOut as reason:
                left_out.append(name)
                tqdm.write(f"left out  {name}: {reason}")
            except Exception:
                failed.append(name)
                tqdm.write(f"FAILED    {name}\n{traceback.format_exc()}")
            else:
                tqdm.write(f"as wanted {name} ({time.monotonic() - started:.1f} s)")
    print(
        f"{len(chosen)} situations in {time.monotonic() - began:.0f} s: {len(failed)} failed, {len(left_out)} left out"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
