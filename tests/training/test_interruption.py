"""A run that is interrupted again and again ends as one that never was: state, metrics, best checkpoint."""

import jax
import numpy as np
import pytest

from polaformer_jax.errors import Interrupted
from polaformer_jax.training import loop
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.experiment import Experiment
from polaformer_jax.training.programs import ProgramCache
from polaformer_jax.training.signals import StopRequests
from tests.support.recipes import dense_digits
from tests.support.runs import TIMES, written


class StopAtLook(StopRequests):
    """Asks for a stop when it is looked at for the n-th time: once a step, once an evaluation batch."""

    def __init__(self, n):
        self._looks, self._deferred = n, False

    @property
    def requested(self):
        self._looks -= 1
        return self._looks < 0


@pytest.fixture(scope="module")
def compiled_once():
    """Every run here has the same programs: they are compiled once."""
    programs, compile_now = {}, ProgramCache.program

    def program(step, batch):
        key = step.name, *((name, leaf.shape) for name, leaf in batch.items())
        if key not in programs:
            programs[key] = compile_now(step, batch)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramCache, "program", program)
        yield


def settings(digits_dir):
    """Two dense layers on one device; `test_processes` and `campaigns/faults` interrupt a PolaFormer."""
    return dense_digits(digits_dir, **{"log.pictures": False, "mesh.data": 1})


@pytest.fixture(scope="module")
def straight(digits_dir, compiled_once, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    loop.train(settings(digits_dir), workdir)
    return workdir


def interrupted_until_done(config, workdir, looks):
    """Runs that are each stopped at the next number of `looks`, until one ends; how many were stopped."""
    for count, look in enumerate(looks):
        try:
            loop.train(config, workdir, stop=StopAtLook(look))
            return count
        except Interrupted:
            pass
    loop.train(config, workdir)
    return len(looks)


def final_state(config, workdir):
    with Checkpoints(workdir / "checkpoints", keep_last=1, best_metric="accuracy", read_only=True) as checkpoints:
        return checkpoints.restore(Experiment(config).states.abstract), checkpoints.best()


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param(range(1, 12), id="1-2-3", marks=pytest.mark.slow),
        pytest.param([4] * 6, id="every-4", marks=pytest.mark.slow),
        pytest.param([14, 2, 7], id="late"),
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(digits_dir, straight, compiled_once, tmp_path, looks):
    config = settings(digits_dir)
    assert interrupted_until_done(config, tmp_path, looks) > 1
    (wanted, wanted_best), (found, best) = final_state(config, straight), final_state(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.state, wanted.state)
    assert best == wanted_best
    before, after = written(straight), written(tmp_path)
    assert before.keys() == after.keys() and before["eval_ema_loss"]
    for name in before.keys() - TIMES:
        assert after[name] == before[name], name
    for name in TIMES:
        assert [step for step, _ in after[name]] == [step for step, _ in before[name]], name


def test_a_stop_before_the_first_step_saves_the_initial_state(digits_dir, straight, compiled_once, tmp_path):
    with pytest.raises(Interrupted, match="checkpoint of step 0 of 8 is saved"):
        loop.train(settings(digits_dir), tmp_path, stop=StopAtLook(0))
    assert final_state(settings(digits_dir), tmp_path)[0].state.step == 0


@pytest.mark.slow
def test_a_stop_in_an_evaluation_leaves_it_for_later(digits_dir, straight, compiled_once, tmp_path):
    with pytest.raises(Interrupted, match="checkpoint of step 4"):
        loop.train(settings(digits_dir), tmp_path, stop=StopAtLook(7))  # start, 4 steps, 2 batches of evaluation
    assert "eval_loss" not in written(tmp_path)
    assert not final_state(settings(digits_dir), tmp_path)[0].evaluated
    with pytest.raises(Interrupted):
        loop.train(settings(digits_dir), tmp_path, stop=StopAtLook(14))
    assert [step for step, _ in written(tmp_path)["eval_loss"]] == [4]
    assert final_state(settings(digits_dir), tmp_path)[1] == 4


@pytest.mark.slow
def test_saves_by_the_clock(digits_dir, straight, compiled_once, tmp_path):
    config = settings(digits_dir)
    config.checkpoint.every_steps, config.checkpoint.every_minutes, config.checkpoint.keep_last = 1000, 1e-9, 100
    config.eval.every = 8.0
    loop.train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep_last=100, best_metric="accuracy", read_only=True) as checkpoints:
        assert checkpoints.steps() == [*range(1, 9)]


def test_what_a_killed_run_wrote_of_later_steps_is_taken_back(digits_dir, straight, compiled_once, tmp_path):
    class Killed(BaseException):
        pass

    config = settings(digits_dir)
    for killed_at in (2, 6):  # before the first checkpoint, and behind the one of step 4
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            progress = loop.Progress.report

            def report(self, step, metrics, *, progress=progress, killed_at=killed_at):
                progress(self, step, metrics)
                if step == killed_at:
                    raise Killed

            patch.setattr(loop.Progress, "report", report)
            loop.train(config, tmp_path)
    assert "eval_loss" in written(tmp_path)
    loop.train(config, tmp_path)
    before, after = written(straight), written(tmp_path)
    for name in before.keys() - TIMES:
        assert after[name] == before[name], name
    for name in TIMES:
        assert [step for step, _ in after[name]] == [step for step, _ in before[name]], name
