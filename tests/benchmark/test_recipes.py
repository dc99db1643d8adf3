"""`benchmark recipes` measures the training steps of recipes, and writes what the table of the comparison reads."""

import pytest

from polaformer_jax.analysis.results import rows
from polaformer_jax.analysis.results.images import Step, Variant
from polaformer_jax.cli.benchmark import main
from polaformer_jax.training import recipes

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture
def small(monkeypatch):
    """Recipes with batches of eight images."""
    load = recipes.load

    def loaded(text):
        config = load(text)
        config.train.batch_size = 8
        return config

    monkeypatch.setattr(recipes, "load", loaded)


@pytest.mark.slow
def test_steps_are_measured_in_the_order_given_and_can_be_placed(small, tmp_path, capsys):
    given = ["fashion_mnist:pvt,attention=relu,gate=False", "fashion_mnist:pvt,alpha=1"]
    assert main(["recipes", *given, "--calls=2", "--seconds=0", f"--csv={tmp_path / 'steps.csv'}"]) == 0
    found = rows.read(tmp_path / "steps.csv", Step)
    assert [step.config for step in found] == given
    for step in found:
        assert 0 < step.step_ms_least <= step.step_ms <= step.step_ms_greatest
        assert step.calls == 2 and step.batch == 8 and step.memory_mib > 1 and "CPU" in step.hardware
    relu, polarity = (step.place() for step in found)
    assert relu == ("pola_pvt_nano", Variant("relu", None, True, False))
    assert polarity == ("pola_pvt_nano", Variant("polarity", 1.0, True, True))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == given


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "config 'nothing': no such file"),
        (["lra:listops"], "is of the task listops with 10 classes: expected image classification"),
        (["digits", "--calls=0"], "--calls has 0"),
    ],
)
def test_what_cannot_be_measured(arguments, message, capsys):
    assert main(["recipes", *arguments]) == 1
    assert message in capsys.readouterr().err
