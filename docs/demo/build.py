"""Builds the page: a folder of static files that any web server can serve.

    python docs/demo/build.py --source mine.safetensors --out site

It runs where the extra `onnx` is installed, and takes ONNX Runtime for browsers from npm.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import polaformer_jax as pf
from polaformer_jax.analysis.attention_maps import last_linear_block
from polaformer_jax.errors import UserError
from polaformer_jax.models.backbone import Backbone

HERE = Path(__file__).parent
PAGE = ("index.html", "demo.js", "pixels.js")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build(source: str, out: Path) -> None:
    """Writes the page and the model of a file of weights to the folder `out`."""
    if shutil.which("npm") is None:
        raise UserError("npm is needed, for ONNX Runtime in browsers: install Node.js")
    model = pf.create_model(weights=source)
    if not isinstance(model, Backbone):
        raise UserError(f"{source} holds a {type(model).__name__}, and the page shows image classifiers")
    out.mkdir(parents=True, exist_ok=True)
    _copy_runtime(out / "ort")
    metadata = pf.export.onnx(model, out / "model.onnx", preprocess=True, maps=last_linear_block(model))
    (out / "model.json").write_text(json.dumps(metadata, indent=2))
    for name in PAGE:
        shutil.copy(HERE / name, out / name)


def _copy_runtime(folder: Path) -> None:
    """Copies ONNX Runtime for browsers, from npm."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        shutil.copy(HERE / "package.json", aside)
        command = ["npm", "install", "--omit=dev", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
        done = subprocess.run(command, cwd=aside, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"npm cannot install ONNX Runtime: {done.stderr.strip()[-500:]}")
        for name in RUNTIME:
            shutil.copy(Path(aside, "node_modules/onnxruntime-web/dist", name), folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, help=".safetensors, .pth or hf://...")
    parser.add_argument("--out", required=True, type=Path, help="folder for the page")
    arguments = parser.parse_args()
    try:
        build(arguments.source, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"the page is {arguments.out / 'index.html'}; serve it: python -m http.server --directory {arguments.out}")
