"""The page of docs/demo, in a real browser: the same pixels, probabilities and maps as in Python."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import polaformer_jax as pf
from polaformer_jax.data.images.normalisation import normalise
from polaformer_jax.export.maps import mean_maps
from polaformer_jax.inference.images import evaluation_transform, read_image
from polaformer_jax.models.model_info import ModelInfo
from tests.support import ROOT, small_models
from tests.support.onnx_environment import python

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [name for name, found in {"chromium": CHROMIUM, "npm": shutil.which("npm")}.items() if not found]
NAMES = ("<b>ant</b>", "bee", "cat", "dog", "eel")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a static server of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def browse(url: str, images: list[Path], folder: Path) -> dict:
    """What the page answers to each image that is picked on it."""
    for name in ("package.json", "test.mjs"):
        shutil.copy(ROOT / "docs/demo" / name, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    subprocess.run(install, cwd=folder, check=True)
    command = ["node", "test.mjs", url, *map(str, images)]
    environment = {**os.environ, "CHROMIUM": CHROMIUM}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model():
    model = small_models.perturbed(small_models.build("swin"), scale=0.1)
    model.info = ModelInfo(class_names=NAMES, preprocess={"resize": 41, "crop": 32})  # an odd margin
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs, and images of unusual shapes and kinds."""
    folder = tmp_path_factory.mktemp("images")
    china, flower = load_sample_images().images
    Image.fromarray(china).save(folder / "china.png")
    Image.fromarray(flower).save(folder / "flower.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera that was held upright; ignored, as by the official code
    Image.fromarray(china).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(china[:1, :1]).save(folder / "pixel.png")
    Image.fromarray(china[:3, :500]).save(folder / "flat.png")
    Image.fromarray(china).convert("L").save(folder / "grey.png")
    Image.fromarray(np.kron(china, np.ones((6, 6, 1), np.uint8))).save(folder / "large.jpg")
    (folder / "text.png").write_text("no image")
    return sorted(folder.iterdir())


def test_the_browser_answers_as_python_does(model, images, tmp_path):
    pf.save_weights(model, tmp_path / "a.safetensors")
    build = [
        str(python()),
        "docs/demo/build.py",
        "--source",
        str(tmp_path / "a.safetensors"),
        "--out",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (tmp_path / "browser").mkdir()
    with served(tmp_path / "site") as url:
        found = browse(url, images, tmp_path / "browser")
    assert found["problems"] == []
    compute = jax.jit(lambda m, x: (jax.nn.softmax(m(x)), *mean_maps(m, x, stage=2, block=0)))
    for path, answer in zip(images, found["answers"], strict=True):
        if path.name == "text.png":
            assert (answer["state"], answer["hidden"]) == ("failed", True)
            assert "no image that the browser can decode" in answer["text"]
            continue
        assert answer["state"] == "done" and not answer["hidden"], answer["text"]
        pixels = read_image(path, evaluation_transform(model))
        np.testing.assert_array_equal(answer["pixels"], pixels.ravel(), err_msg=path.name)
        probabilities, *maps = compute(model, normalise(pixels[None]))
        np.testing.assert_allclose(answer["probabilities"], probabilities[0], atol=1e-5)
        for one, expected in zip(answer["maps"], maps, strict=True):
            np.testing.assert_allclose(one, np.ravel(expected), rtol=1e-4, atol=1e-5)
        best_first = [NAMES[label] for label in np.argsort(-np.asarray(answer["probabilities"]))]
        assert answer["shown"] == best_first  # as text, markup included


def test_a_page_without_its_model_says_so(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "docs/demo", site)
    (site / "ort").mkdir()
    (tmp_path / "browser").mkdir()
    (site / "ort/ort.wasm.min.mjs").write_text("export const env = { wasm: {} };")
    with served(site) as url:
        found = browse(url, [], tmp_path / "browser")
    assert found["first"]["state"] == "failed" and "cannot be loaded (404)" in found["first"]["text"]
