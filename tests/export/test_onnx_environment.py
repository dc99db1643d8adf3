"""The tests of ONNX files, in the environment that can write them."""

import os
import subprocess

import pytest

from tests.support import ROOT
from tests.support.onnx_environment import python


@pytest.mark.slow
def test_onnx_files_in_the_environment_that_writes_them():
    command = [str(python()), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/export/test_onnx.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-20_000:] + done.stderr[-2_000:]
