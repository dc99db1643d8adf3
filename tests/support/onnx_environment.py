"""The environment that has what writes ONNX files: not that of the other tests, and made when a test needs it."""

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT


def python() -> Path:
    """Its Python. Tests that run at the same time wait for the one that makes it, by `make .venv-onnx/.ready`."""
    with open(ROOT / ".venv-onnx.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", "--silent", f"PYTHON={sys.executable}", ".venv-onnx/.ready"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / ".venv-onnx/bin/python"
