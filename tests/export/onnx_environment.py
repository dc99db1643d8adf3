"""The environment that has what writes ONNX files (`make .venv-onnx/.ready`): not that of the other tests."""

from tests.support import ROOT

PYTHON = ROOT / ".venv-onnx/bin/python"
