"""What a training says of itself while it runs, and what it does about numbers that are not finite."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polaformer_jax.hardware import chips
from polaformer_jax.training import loop, metrics, runtime
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.inputs import Inputs
from polaformer_jax.training.metrics import read_scalars
from polaformer_jax.training.tasks.images import ImageClassification
from tests.support.log_messages import logged
from tests.support.recipes import dense_digits

CHIP = chips.Chip("a CPU", "cpu", 1e12, 8e9, 20e9, 1e9)
POISONED = 1  # step whose loss is NaN


def settings(digits_dir, **changes):
    few = {"mesh.data": 1, "train.steps": 4, "schedule.warmup": 1.0, "eval.every": 4.0, "log.pictures": False}
    few |= {"log.every": 1, "checkpoint.every_steps": 1}
    return dense_digits(digits_dir, **few | changes)


def poison(patch):
    """The loss of a batch that has one class alone is NaN, and so is a step's batch."""
    batches, losses = Inputs.train_batches, ImageClassification.losses

    def poisoned_batches(inputs, start):
        with contextlib.closing(batches(inputs, start)) as stream:
            for step, batch in enumerate(stream, start):
                yield batch | {"label": np.full_like(batch["label"], 3)} if step == POISONED else batch

    def poisoned_losses(task, logits, batch):
        alone = jnp.all(batch["label"] == batch["label"][0])
        return losses(task, logits, batch) + jnp.where(alone, jnp.nan, 0)

    patch.setattr(Inputs, "train_batches", poisoned_batches)
    patch.setattr(ImageClassification, "losses", poisoned_losses)


@pytest.fixture(scope="module")
def watched(digits_dir, tmp_path_factory):
    """A run on a device whose peak is known, with a trace of step 2, that skips what is not finite.

    Under a guard too: a transfer within a step that the loop did not ask for would end it.
    """
    workdir = tmp_path_factory.mktemp("watched")
    config = settings(
        digits_dir,
        **{
            "train.on_nonfinite": "skip",
            "log.profile_start": 2,
            "log.profile_stop": 3,
            "debug.transfer_guard": "disallow",
            "checkpoint.keep_last": 9,
        },
    )
    with logged() as messages, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chips, "CHIPS", (*chips.CHIPS, CHIP))
        poison(patch)
        loop.train(config, workdir)
    return config, workdir, read_scalars(workdir), messages


# --- numbers that are not finite


def test_a_skipped_step_is_counted_and_leaves_the_state_alone(watched):
    config, workdir, scalars, messages = watched
    assert scalars["nonfinite_steps"][1].tolist() == [0, 1, 0, 0]
    assert scalars["loss"][0].tolist() == [1, 3, 4] and np.isfinite(scalars["loss"][1]).all()
    assert any(m.startswith("step 1: loss nan") and "the step is skipped (its batch: " in m for m in messages)
    states, experiment = [], Experiment(config)
    with Checkpoints(workdir / "checkpoints", keep_last=9, best_metric="accuracy", read_only=True) as checkpoints:
        for step in (1, 2, 3):
            states.append(checkpoints.restore_params(experiment.params.abstract, step)[0])
    before, after, later = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(s)]) for s in states)
    assert np.array_equal(before, after) and not np.array_equal(after, later)


def test_without_skipping_the_run_ends_and_its_last_good_state_stays(digits_dir, tmp_path, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(loop.NonFiniteError, match=r"step 1: loss nan.*; its batch: .* and 12 more"):
        loop.train(settings(digits_dir), tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep_last=9, best_metric="accuracy", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert read_scalars(tmp_path)["loss"][0].tolist() == [1]  # what was seen before is written


# --- debug.*


@pytest.mark.slow
def test_nans_are_found_where_they_arise(digits_dir, tmp_path, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(FloatingPointError, match="nan"):
        loop.train(settings(digits_dir, **{"debug.nans": True}), tmp_path)


def test_transfers_that_nobody_asked_for_are_refused_while_the_guard_lasts():
    def add_one():
        return jax.jit(lambda x: x + 1)(np.float32(1))

    config = types.SimpleNamespace(nans=False, transfer_guard="disallow")
    with (
        runtime.checked(config),
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"),
    ):
        add_one()
    assert add_one() == 2


def test_deterministic_operations_are_a_matter_of_gpus(monkeypatch):
    config = types.SimpleNamespace(deterministic=True)
    assert runtime.compiler_options(config) == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert runtime.compiler_options(config) == {"xla_gpu_deterministic_ops": True}
    assert runtime.compiler_options(types.SimpleNamespace(deterministic=False)) == {}


def test_a_trace_is_written_for_the_profiler(watched):
    _, workdir, _, messages = watched
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert any(message.startswith("the trace of steps 2 to 2 is in") for message in messages)


# --- use of the devices


def test_mfu_is_the_model_s_work_over_what_the_chip_could_do(watched):
    config, _, scalars, messages = watched
    experiment = Experiment(config)
    work = experiment.step_flops(experiment.abstract_batch(config.train.batch_size))
    seconds = scalars["seconds"][1]
    np.testing.assert_allclose(scalars["mfu"][1], work / (seconds * CHIP.flops), rtol=1e-5)
    assert any("  MFU " in message for message in messages)


def test_a_chip_that_is_not_in_the_table_has_no_mfu(digits_dir):
    experiment = Experiment(settings(digits_dir))
    meter = metrics.Utilisation(experiment.step_flops, experiment.mesh)
    meter.step({})
    assert meter.reset(1.0) == {}


@pytest.mark.slow
def test_neither_recomputation_nor_a_kernel_s_zeros_are_progress(digits_dir, shallow):
    plain, remat, kernel = (
        Experiment(settings(digits_dir, **{"model.name": "pola_pvt_nano", "model.kernel_size": 1, **changes}))
        for changes in ({}, {"model.remat": True}, {"model.attention_impl": "pallas"})
    )
    batch = plain.abstract_batch(16)
    assert plain.step_flops(batch) == remat.step_flops(batch) == kernel.step_flops(batch)
    assert len(str(remat.train_step.trace(batch).jaxpr)) > len(str(plain.train_step.trace(batch).jaxpr))


def test_the_fullest_device_counts():
    def device(peak):
        return types.SimpleNamespace(
            device_kind="?", memory_stats=lambda: {"peak_bytes_in_use": peak * 2**30, "bytes_limit": 16 * 2**30}
        )

    devices = [device(3), device(4)]
    mesh = types.SimpleNamespace(size=2, devices=np.array(devices), local_devices=devices)
    meter = metrics.Utilisation(lambda batch: 1.0, mesh)
    assert meter.reset(1.0) == {"device_memory_gib": 4.0, "device_memory_share": 0.25}
