"""`benchmark model` measures whole models, and the official code beside them in a process of its own."""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import polaformer_jax as pf
from polaformer_jax.benchmark import model
from polaformer_jax.benchmark.model import Row, table
from polaformer_jax.benchmark.ours import Case, Subject, cases, experiment
from polaformer_jax.benchmark.timing import Timing
from polaformer_jax.cli.benchmark import main
from polaformer_jax.hardware.costs import product_flops

pytestmark = pytest.mark.usefixtures("shallow")
TINY = ("--models=pola_pvt_nano", "--batch-sizes=8", "--calls=2", "--seconds=0")


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
def test_every_mode_is_measured_and_written(tmp_path, capsys):
    modes, path = ("forward", "gradient", "step"), tmp_path / "model.csv"
    assert main(["model", *TINY, "--modes", *modes, "--devices=1", f"--csv={path}"]) == 0
    rows = rows_of(path)
    assert tuple(row["mode"] for row in rows) == modes
    for row in rows:
        assert (row["model"], row["img_size"], row["batch"], row["devices"]) == ("pola_pvt_nano", "32", "8", "1")
        assert (row["code"], row["calls"], row["memory_by"], row["mfu"]) == ("ours", "2", "compiler", "")
        least, median, greatest = (float(row[f"images_per_s{end}"]) for end in ("_least", "", "_greatest"))
        assert 0 < least <= median <= greatest
        assert float(row["compile_s"]) > 0
    memory = [float(row["memory_gib"]) for row in rows]
    assert memory == sorted(memory)  # gradients, and then the moments, come on top
    forward, gradient, step = (float(row["gflops"]) for row in rows)
    model = pf.create_model("pola_pvt_nano", rngs=nnx.Rngs(0))
    flops = product_flops(jax.make_jaxpr(model)(jnp.zeros((8, 32, 32, 3))).jaxpr)
    assert forward == pytest.approx(flops / 1e9, rel=1e-4)
    assert 2.9 < gradient / forward < 3  # the images need no gradient
    assert step == pytest.approx(gradient, rel=0.01)
    printed = capsys.readouterr().out
    for text in ("images/s", "(least - greatest)", "compile s", "GFLOPs", "MFU", "gradient"):
        assert text in printed


def test_the_step_is_that_of_the_training():
    """Traced, not run: its state comes out as it went in, with moments of all parameters."""
    case = Case("pola_pvt_nano", 32, 8, "float32")
    made = experiment(case, jax.devices()[:1])
    state, sums = made.train_step.trace(made.abstract_batch(case.batch)).out_info
    assert jax.tree.structure(state) == jax.tree.structure(made.states.abstract)
    assert {"loss", "grad_norm", "learning_rate"} <= sums.keys()
    augment = made.config.augment
    assert (augment.mixup, augment.cutmix, augment.erase_prob) == (0.8, 1.0, 0.25)


@pytest.mark.slow
def test_the_batch_lies_on_all_devices(tmp_path):
    path = tmp_path / "model.csv"
    assert main(["model", *TINY, "--modes=forward", f"--csv={path}"]) == 0
    (row,) = rows_of(path)
    assert row["devices"] == str(jax.device_count())


def test_models_batches_and_types_are_combined():
    args = argparse.Namespace(
        models=["pola_pvt_t", "pola_swin_b_384"], batch_sizes=[8, 16, 8], dtypes=["bfloat16"], img_size=None
    )
    assert cases(args) == [
        Case("pola_pvt_t", 224, 8, "bfloat16"),
        Case("pola_pvt_t", 224, 16, "bfloat16"),
        Case("pola_swin_b_384", 384, 8, "bfloat16"),
        Case("pola_swin_b_384", 384, 16, "bfloat16"),
    ]


def test_the_utilisation_is_of_the_published_peak():
    case = Case("pola_pvt_t", 224, 64, "bfloat16")
    subject = Subject(run=lambda: 0.0, compile_s=None, memory=None, memory_by="", flops=989e12)
    row = Row(case, "step", "ours", 4, "NVIDIA H100 80GB HBM3", subject, Timing(0.5, 0.4, 0.8, 10))
    assert row.mfu == pytest.approx(0.5)
    assert row.images_per_s == 128
    assert row.record()["images_per_s_least"] == "80"
    assert row._replace(device_kind="cpu").mfu is None
    assert "50.0%" in table([row])


# --- the official code

TORCH = '''
"""As much of PyTorch as the process uses, without any arithmetic; it writes down what is done."""
import contextlib
import types

__version__ = "0.fake"
bfloat16 = "bfloat16"
done = []
set_num_threads = lambda count: done.append(f"threads {count}")
manual_seed = set_float32_matmul_precision = lambda value: None
randn = lambda *shape, device: shape
randint = lambda low, high, shape, device: shape
compile = lambda model: done.append("compile") or model

@contextlib.contextmanager
def _within(name):
    done.append(name)
    yield

no_grad = lambda: _within("no_grad")
autocast = lambda device_type, dtype, enabled: _within(f"autocast {enabled}")

class Loss:
    def backward(self):
        done.append("backward")

functional = types.SimpleNamespace(cross_entropy=lambda logits, labels: Loss())
nn = types.SimpleNamespace(functional=functional, LayerNorm=object)
'''
OFFICIAL = '''
"""A model that writes down how it was made and called."""
import json
import pathlib
import torch

print("a greeting on standard output, which is no answer")
LOG = pathlib.Path(__file__).with_name("log.json")

class PyramidVisionTransformer:
    NAMES = "img_size patch_size num_classes embed_dims num_heads mlp_ratios qkv_bias drop_rate drop_path_rate " \\
        "norm_layer depths sr_ratios la_sr_ratios alpha kernel_size attn_type"

    def __init__(self, **arguments):
        if unknown := arguments.keys() - set(self.NAMES.split()):
            raise TypeError(f"unexpected arguments {unknown}")
        arguments.pop("norm_layer")
        self.arguments = arguments

    def to(self, device):
        torch.done.append(f"to {device}")
        return self

    def eval(self):
        torch.done.append("eval")

    def train(self):
        torch.done.append("train")

    def zero_grad(self, set_to_none):
        torch.done.append("zero_grad")

    def __call__(self, images):
        torch.done.append(f"call {images}")
        LOG.write_text(json.dumps({"arguments": self.arguments, "done": torch.done}))
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of an official code that computes nothing, and a PyTorch for it."""
    for name, text in {
        "torch/__init__.py": TORCH,
        "checkout/models/__init__.py": "",
        "checkout/models/pola_pvt.py": OFFICIAL,
        "checkout/models/pola_swin.py": "raise ImportError('no module of this name')",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return tmp_path / "checkout"


@pytest.mark.slow
def test_the_official_model_of_the_same_sizes_takes_turns_with_ours(checkout, tmp_path, capsys):
    path = tmp_path / "model.csv"
    given = [*TINY, "--modes=forward", "--dtypes=bfloat16", "--threads=3", "--devices=2", f"--csv={path}"]
    given += [f"--official={checkout}", f"--official-python={sys.executable}", "--official-by", "compiled", "eager"]
    assert main(["model", *given]) == 0
    rows = rows_of(path)
    assert [(row["mode"], row["code"], row["calls"], row["devices"]) for row in rows] == [
        ("forward", "ours", "2", "2"),
        ("forward", "official, compiled", "2", "1"),
        ("forward", "official", "2", "1"),
    ]
    assert rows[1]["compile_s"] != ""
    assert (rows[2]["compile_s"], rows[2]["memory_gib"], rows[2]["gflops"]) == ("", "", "")
    log = json.loads((checkout / "models/log.json").read_text())
    expected = {"embed_dims": [32, 64, 128, 160], "depths": [1, 1, 1, 1], "img_size": 32, "num_classes": 1000}
    assert log["arguments"].items() >= {**expected, "drop_path_rate": 0.05, "patch_size": 4}.items()
    assert "attention_impl" not in log["arguments"]
    one = ["eval", "no_grad", "autocast True", "call (8, 3, 32, 32)"]
    assert log["done"] == ["threads 3", "to cpu", *one * 4]  # twice to warm up, twice timed
    assert "pola_pvt_nano 32 x 32, batch 8, bfloat16, forward: " in capsys.readouterr().out


def test_the_official_gradient_is_of_one_loss_in_training_mode(checkout):
    from polaformer_jax.benchmark.official import Official

    case = Case("pola_pvt_nano", 32, 4, "float32")
    options = {"python": sys.executable, "platform": "cpu", "threads": 1, "compiled": True}
    with Official(str(checkout), case, modes=("forward", "gradient"), **options) as official:
        assert official.version == "0.fake"
        assert official.subjects["gradient"].compile_s > 0  # of `torch.compile`, its first call
        before = len(json.loads((checkout / "models/log.json").read_text())["done"])
        assert 0 < official.subjects["gradient"].run() < math.inf
        done = json.loads((checkout / "models/log.json").read_text())["done"]
    assert done[before:] == ["backward", "train", "zero_grad", "autocast False", "call (4, 3, 32, 32)"]
    assert "compile" in done


def test_an_official_code_that_fails_says_why(checkout, capsys):
    given = ["--models=pola_swin_nano", "--batch-sizes=8", "--modes=forward", "--devices=1"]
    assert main(["model", *given, f"--official={checkout}"]) == 1
    error = capsys.readouterr().err
    assert "ImportError: no module of this name" in error and "--official-python" in error


def test_an_official_process_that_dies_says_its_last_words(checkout, capsys):
    (checkout / "models/pola_pvt.py").write_text("import os, sys\nprint('so long', file=sys.stderr)\nos._exit(3)\n")
    assert main(["model", *TINY, "--modes=forward", "--devices=1", f"--official={checkout}"]) == 1
    assert "it ended with status 3, saying 'so long'" in capsys.readouterr().err


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models=pola_pvt_x"], "unknown model 'pola_pvt_x'"),
        (["--models=pola_sequence"], "pola_sequence is a model of sequences, expected one of images"),
        (["--img-size=33"], "img_size"),
        (["--batch-sizes=7"], "cannot be split evenly over 8 devices"),
        (["--batch-sizes=0"], "--batch-sizes has 0: expected more than 0"),
        (["--calls=0"], "--calls has 0"),
        (["--seconds=-1"], "--seconds is -1"),
        (["--devices=9"], "--devices is 9, but there are 8"),
        (["--official=/nonexistent"], "there is no models/pola_pvt.py in it; expected a checkout"),
    ],
)
def test_what_cannot_be_is_an_error(options, message, capsys):
    assert main(["model", *TINY, *options]) == 1
    assert message in capsys.readouterr().err


def test_the_official_code_has_one_accelerator(checkout, capsys, monkeypatch):
    gpus = [SimpleNamespace(platform="gpu")] * 2
    monkeypatch.setattr(model, "_devices", lambda count: gpus)
    assert main(["model", *TINY, f"--official={checkout}"]) == 1
    assert "--official runs on one device, but there are 2: add --devices 1" in capsys.readouterr().err


def test_the_official_code_has_a_python(checkout, capsys):
    assert main(["model", *TINY, "--devices=1", f"--official={checkout}", "--official-python=no_such_python"]) == 1
    assert "--official-python no_such_python: there is no such program" in capsys.readouterr().err


def test_the_process_imports_nothing_of_this_package():
    text = Path("polaformer_jax/benchmark/official_worker.py").read_text()
    assert "polaformer_jax" not in text and "jax" not in text.replace("JAX", "")
