"""A wheel of the project in environments without the checkout: what it holds, and that it works there."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import polaformer_jax
from tests.support import ROOT
from tests.support.quick import FLAGS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA_", "JAX_"))}
CLEAN |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("polaformer_jax-*.whl")
    return path


def make_environment(folder: Path) -> Path:
    """A new environment without anything in it; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def install(python: Path, *what: str) -> None:
    """Installs into another environment."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *what]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def site_packages(python: Path) -> Path:
    (folder,) = python.parent.parent.glob("lib/python*/site-packages")
    return folder


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that these requirements need, directly or not."""
    found, pending = {}, [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate()]
    while pending:
        requirement = pending.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras
        if extras <= found.get(name, frozenset({None})) - {None} and name in found:
            continue
        found[name] = found.get(name, set()) | extras
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *found[name]}):
                pending.append(needed)
    return set(found)


def link(distributions: set[str], target: Path) -> None:
    """Makes the installed files of these distributions, and of no others, importable from another folder."""
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (target / top).exists():
                (target / top).symlink_to(distribution.locate_file(top))


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs the console command of an environment."""
    command = [str(python.parent / "polaformer"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=600)


def test_it_holds_the_package_and_the_recipes_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = {
        str(path.relative_to(ROOT))
        for folder in ("polaformer_jax", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == {re.sub("^configs/", "polaformer_jax/configs/", name) for name in here}
    assert {"polaformer_jax/py.typed", "polaformer_jax/configs/digits.py"} <= names


def test_requirements_are_those_of_the_package_and_its_training():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    both = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    assert {str(Requirement(line)) for line in lines} == {str(Requirement(line)) for line in both}


@pytest.mark.slow
def test_models_weights_and_prediction_need_only_the_base_dependencies(wheel, tmp_path):
    """In an environment that has those and nothing else, outside the checkout."""
    python = make_environment(tmp_path / "environment")
    install(python, "--no-deps", "--no-index", str(wheel))
    base = closure(PROJECT["dependencies"])
    assert not {"tensorflow", "tensorflow-cpu", "grain", "clu", "scikit-learn", "tensorboard"} & base
    link(base, site_packages(python))
    program = """
import numpy as np
from flax import nnx
from PIL import Image
import polaformer_jax as pf
print(pf.__file__)
assert "pola_swin_t" in pf.list_models()
model = pf.create_model("pola_pvt_nano", num_classes=3, rngs=nnx.Rngs(0))
pf.save_weights(model, "nano.safetensors", metadata={"classes": '["a", "b", "c"]'})
Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("black.png")
"""
    done = subprocess.run([python, "-c", program], cwd=tmp_path, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    done = run(python, "predict", "--weights", "nano.safetensors", "--json", "black.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert {found["name"] for found in result["predictions"]} == {"a", "b", "c"}
    done = run(python, "train", "--config", "digits", "--workdir", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this command needs packages that are not installed"), done.stderr
    assert 'pip install "polaformer_jax[train]"' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_everything_works_with_the_training_extra_alone(wheel, tmp_path):
    """Every command but the long ones, outside any checkout, with what the wheel and its extra require."""
    python = make_environment(tmp_path / "environment")
    install(python, "--no-deps", "--no-index", str(wheel))
    link(closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]), site_packages(python))
    data = ("--data-dir", "data")

    def does(*words: str) -> str:
        done = run(python, *words, cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    assert does("--version") == f"polaformer_jax {polaformer_jax.__version__}\n"
    assert "train 1437, test 360" in does("prepare", "sklearn_digits", *data)
    trained = does("train", "--config", "digits:pvt,epochs=2.0", "--workdir", "run")
    assert "images         360" in trained
    assert json.loads(does("eval", "--workdir", "run"))["images"] == 360
    does("export", "--workdir", "run", "digits.safetensors")
    does("convert", "digits.safetensors", "torch.safetensors", "--layout", "torch")
    does("preview", "--config", "digits:recipe=full", "--out", "preview.png")
    predicted = does("predict", "--weights", "torch.safetensors", "--json", "--picture", "maps.png", "preview.png")
    assert len(json.loads(predicted)[0]["predictions"]) == 5
    does("benchmark", "ceilings", "--side=16", "--mib=1", "--calls=1", "--seconds=0")
    assert "pola_pvt_nano, batch 64 on 2 chips" in does("aot", "--config", "digits", "--topology", "cpu:2")
    does("prepare", "lra_listops_short", *data, "--num-examples", "2000", "--processes", "1")
    does("train", "--config", "lra:listops_short,steps=2", "--workdir", "listops", "--config.train.batch_size=2")
    does("results", "--dir", "results", "add", "listops")
    assert "ListOps of up to 255 symbols" in does("results", "--dir", "results")
    does("entropy", "listops", "--examples", "2", "--plot", "entropy.png")
    does("lra-baseline", "--task", "listops_short", *data)
    does("lra-sheet", "--output", "sheet.png", "--examples", "2")
    for picture in ("preview.png", "maps.png", "entropy.png", "sheet.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
