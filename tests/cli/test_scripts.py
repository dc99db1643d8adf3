"""The entry points as a user calls them: their output and exit status, and the scripts as real processes."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tensorstore as ts

from polaformer_jax.cli import train
from tests.support import ROOT
from tests.support.quick import FLAGS

TINY = (
    "--config.model.kernel_size=1",  # compiles sooner
    "--config.train.epochs=None",
    "--config.train.steps=40",
    "--config.train.batch_size=8",
    "--config.schedule.warmup=2.0",
    "--config.eval.every=20",
    "--config.checkpoint.every_steps=5",
    "--config.log.every=5",
)


QUICKLY = os.environ | {"XLA_FLAGS": FLAGS}  # the programs run for a few steps


def command(script, *arguments):
    return [sys.executable, script, *map(str, arguments)]


def run(script, *arguments):
    return subprocess.run(command(script, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def train_command(digits_dir, workdir):
    return command(
        "train.py", "--config=configs/digits.py", f"--config.data.data_dir={digits_dir}", f"--workdir={workdir}", *TINY
    )


def processes_of_group(group):
    """Processes of a process group that still live (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def parameters(workdir, step):
    """All parameters of a checkpoint as bytes, read without this project's code."""
    spec = {"driver": "ocdbt", "base": f"file://{workdir}/checkpoints/{step}/params/"}
    store = ts.KvStore.open(spec).result()
    keys = sorted(store.list().result())
    return {key: store.read(key).result().value for key in keys}


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_end_and_leaves_no_process(digits_dir, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = {"env": QUICKLY, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(train_command(digits_dir, straight), **options)
    assert done.returncode == 0, done.stderr
    assert "images         360" in done.stdout

    killed = subprocess.Popen(
        train_command(digits_dir, broken),
        env=QUICKLY,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not (broken / "checkpoints/10").exists() and time.monotonic() < deadline:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    while processes_of_group(killed.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of_group(killed.pid) == []
    killed.stderr.close()

    again = subprocess.run(train_command(digits_dir, broken), **options)
    assert again.returncode == 0, again.stderr
    assert "resuming from the checkpoint of step" in again.stderr
    one, two = parameters(straight, 40), parameters(broken, 40)
    assert one.keys() == two.keys() and len(one) > 50
    assert one == two
    assert (
        json.loads((straight / "eval.json").read_text())["accuracy"]
        == (json.loads((broken / "eval.json").read_text())["accuracy"])
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/digits.py", "--config.optimizer.learning_rate=1"], "learning_rate"),
        (["--config=configs/digits.py:pvt,epoch=3"], "unknown config option 'epoch=3'; the options are: epochs="),
        (
            ["--config=configs/none.py", "--config.seed=1"],
            "no such file; expected the path of a Python file, or a packaged",
        ),
        (
            ["--config=configs/none.py"],
            "no such file; expected the path of a Python file, or a packaged",
        ),
        (["--config=polaformer_jax/errors.py"], "it has no get_config"),
        (["--config=configs/digits.py", "--config.augment.crop_area[7]=0.5"], "tuples are set whole"),
        (["--config=configs/digits.py", "--config.seed=None"], "--config.seed=None: this field must have a value"),
        (["--config=configs/digits.py:resnet"], "no model 'resnet'; it has pvt, swin"),
        (["--config=configs/digits.py", "--config.train.steps=5"], "exactly one of them must be given"),
        (["--config=configs/digits.py"], "polaformer prepare sklearn_digits --data-dir"),
        (["--config=configs/pola_pvt.py:t"], "polaformer prepare imagenet2012 --data-dir"),
        ([], "--config"),
    ],
)
def test_bad_input_ends_with_one_message_and_a_status(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    if any(argument.startswith("--config=") for argument in arguments):
        arguments = [*arguments, f"--config.data.data_dir={tmp_path}/empty"]
    assert train.main([*arguments, "--workdir", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err and not shown.out
    assert not (tmp_path / "run").exists()


def test_the_script_ends_with_the_message_and_the_status_of_the_command():
    ended = run("train.py", "--config=configs/digits.py")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: --workdir is needed") and not ended.stdout


def test_an_image_size_that_the_windows_cannot_take(digits_dir, tmp_path, capsys):
    ended = train.main([
        "--config=pola_swin:t", "--config.model.img_size=250", "--config.eval.resize=256", "--config.eval.crop=250",
        f"--config.data.data_dir={digits_dir}", "--config.data.name=sklearn_digits", "--config.data.eval_split=test",
        "--config.model.num_classes=10", "--workdir", str(tmp_path / "run"),
    ])  # fmt: skip
    shown = capsys.readouterr().err
    assert ended == 1
    assert "250" in shown and "224" in shown and "Traceback" not in shown


def test_evaluating_what_is_not_there(tmp_path):
    ended = run("eval.py", "--workdir", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("one just begun")


def test_progress_on_a_terminal_is_a_bar():
    program = """
import time
from polaformer_jax.training.progress import Progress
with Progress(total=3, start=1) as progress:
    progress.step()
    progress.report(2, {"loss": 1.25, "images_per_second": 10.0, "skipped": 0})
    progress.step()
"""
    terminal, process_side = pty.openpty()
    termios.tcsetwinsize(process_side, (24, 100))
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=process_side, stderr=process_side
    ) as process:
        os.close(process_side)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the other side has closed
            pass
    os.close(terminal)
    assert process.returncode == 0
    assert b"3/3" in shown and b"step/s" in shown


@pytest.mark.parametrize("script", ["train", "eval"])
def test_an_entry_script_imports_nothing_heavy(script):
    """Processes that read data import the main script again."""
    program = f"import sys, {script}\nprint([m for m in ('jax', 'flax', 'tensorflow', 'orbax') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr
