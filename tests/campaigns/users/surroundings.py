"""Situations of surroundings, and of bad numbers and wrong files."""

import concurrent.futures
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from tests.campaigns.processes import wait
from tests.campaigns.users.situation import (
    LIMIT_S,
    STOPPED,
    LeftOut,
    Situation,
    in_child,
    process,
    situation,
    text_of,
    wait_for,
)

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
        in_child(long, None, None, path, None)
    wait_for(here.run / "checkpoints" / "3")
    os.close(terminal)  # from here on, whatever the run says is an error of its own
    assert wait(child, LIMIT_S) == STOPPED
    saved = here.steps()[-1]
    child = here.start(*long, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # nohup
    wait_for(here.run / "checkpoints" / str(saved + 3 - saved % 3))
    os.kill(child, signal.SIGHUP)
    wait_for(here.run / "checkpoints" / str(saved + 12 - saved % 3))
    os.kill(child, signal.SIGTERM)
    assert wait(child, LIMIT_S) == STOPPED, text_of(path / "err")


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
