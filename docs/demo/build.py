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

HERE = Path(__file__).parent
PAGE = ("index.html", "demo.js", "pixels.js")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build(source: str, out: Path) -> None:
    """Writes the page and the model of a file of weights to the folder `out`."""
    model = pf.create_model(weights=source)
    out.mkdir(parents=True, exist_ok=True)
    metadata = pf.export.onnx(model, out / "model.onnx", preprocess=True, maps=last_linear_block(model))
    (out / "model.json").write_text(json.dumps(metadata, indent=2))
    for name in PAGE:
        shutil.copy(HERE / name, out / name)
    (out / "ort").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "package.json", folder)
        command = ["npm", "install", "--omit=dev", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
        subprocess.run(command, cwd=folder, check=True)
        for name in RUNTIME:
            shutil.copy(Path(folder, "node_modules/onnxruntime-web/dist", name), out / "ort" / name)


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
