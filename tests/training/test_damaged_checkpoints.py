"""A checkpoint that is damaged, empty or truncated is named and set aside, and the one before is used."""

import dataclasses
import gc
import logging
import shutil

import jax
import numpy as np
import pytest

from polaformer_jax.errors import UserError
from polaformer_jax.training.checkpoints import Checkpoints
from polaformer_jax.training.checksums import checksums
from polaformer_jax.training.progress import log
from tests.training.test_checkpoints import abstract, state_of

# Where Orbax fails it leaves coroutines that nobody awaits, and Python says so when it collects them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()  # once, for it takes a second, and here, where the warnings are ignored


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 3 and 5, the state of neither being of equal values."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep_last=3, best_metric="accuracy") as checkpoints:
        for step in (3, 5):
            checkpoints.save(state_of(step), {"accuracy": 0.1 * step}, {"steps": step})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restore(directory):
    with Checkpoints(directory, keep_last=3, best_metric="accuracy") as checkpoints:
        return checkpoints.restore(abstract()), checkpoints.steps()


def data_files(folder):
    """The files that hold numbers, the largest first."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)


def truncate(folder):
    for path in data_files(folder / "params")[:3]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    for path in data_files(folder):
        path.write_bytes(b"")


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def lose_the_optimizer(folder):
    shutil.rmtree(folder / "optimizer")


def lose_the_record(folder):
    shutil.rmtree(folder / "record")


def flip_in_the_record(folder):
    path = max((folder / "record").iterdir(), key=lambda path: path.stat().st_size)
    path.write_text(path.read_text().replace("1", "2", 1))


DAMAGES = [truncate, empty, empty_folder, lose_the_optimizer, lose_the_record, flip_in_the_record]


@pytest.fixture
def messages(caplog):
    log.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        yield caplog
    log.removeHandler(caplog.handler)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_is_used(copy, messages, damage):
    damage(copy / "5")
    restored, steps = restore(copy)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_of(3))
    assert restored.counted == {"steps": 3} and restored.evaluated and steps == [3]
    (aside,) = (copy.parent / "damaged_checkpoints").iterdir()
    assert aside.name.startswith("5_")
    assert str(copy / "5") in messages.text and str(aside) in messages.text


def test_no_flipped_bit_comes_back_unnoticed(tmp_path):
    """Of every file that holds tensors, a few bits: read as if nothing were, or as damaged; never other values."""
    rng, outcomes = np.random.default_rng(0), []
    params = {"kernel": jax.numpy.asarray(rng.normal(size=(60, 60)), "float32")}
    state, copy = dataclasses.replace(state_of(5), params=params), tmp_path / "checkpoints"
    with Checkpoints(copy, keep_last=3, best_metric="accuracy") as checkpoints:
        checkpoints.save(state)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    for path in data_files(copy / "5" / "params")[:3]:
        whole = path.read_bytes()
        for _ in range(4):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            with Checkpoints(copy, keep_last=3, best_metric="accuracy", read_only=True) as checkpoints:
                try:
                    found, _ = checkpoints.restore_params(wanted, 5)
                    jax.tree.map(np.testing.assert_array_equal, found, params)
                    outcomes.append("whole")
                except UserError as error:
                    outcomes.append("other values" if "other values than were saved" in str(error) else "unreadable")
        path.write_bytes(whole)
    assert "other values" in outcomes  # which Orbax alone would have given back


def test_all_damaged(copy, messages):
    truncate(copy / "3")
    empty_folder(copy / "5")
    assert restore(copy) == (None, [])
    assert len([*(copy.parent / "damaged_checkpoints").iterdir()]) == 2


def test_a_checkpoint_of_another_model_is_no_damage(copy):
    wanted = abstract()
    wanted.params["more"] = wanted.params["bias"]
    with Checkpoints(copy, keep_last=3, best_metric="accuracy") as checkpoints:
        with pytest.raises(UserError, match=r"not the arrays that .*\['more'\]: None there, \[\[3\], 'float32'\] here"):
            checkpoints.restore(wanted)
        assert checkpoints.steps() == [3, 5]


def test_metrics_that_come_later_count(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, best_metric="accuracy") as checkpoints:
        checkpoints.save(state_of(1), {"accuracy": 0.3})
        checkpoints.save(state_of(2))
        assert checkpoints.best() == 1
        checkpoints.add_metrics(2, {"accuracy": 0.5})
        assert checkpoints.best() == 2 and checkpoints.restore(abstract()).evaluated
        checkpoints.save(state_of(3))
        assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("fault", ["a file in the way", "removed"])
def test_a_save_that_fails_is_an_error(tmp_path, fault):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep_last=2, best_metric="accuracy")
    checkpoints.save(state_of(1))
    checkpoints.wait()
    shutil.rmtree(directory)
    if fault == "a file in the way":
        directory.write_text("")
    with pytest.raises(UserError, match="could not be written|holds"):
        checkpoints.save(state_of(2))
        checkpoints.wait()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_tell_every_bit_and_every_place(dtype):
    rng = np.random.default_rng(0)
    array = jax.numpy.asarray(rng.integers(0, 2, (5, 7)), dtype)
    seen = {int(checksums(array))}
    for i in range(5):
        for j in range(7):
            seen.add(int(checksums(array.at[i, j].set(1 - array[i, j] if dtype != "bool" else ~array[i, j]))))
    assert len(seen) == 36
    swapped = array.at[0].set(array[1]).at[1].set(array[0])
    assert int(checksums(swapped)) != int(checksums(array))


def test_checksums_do_not_depend_on_the_mesh():
    array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    wanted = int(checksums(jax.numpy.asarray(array)))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (("a", "b"), ("b", None), (None, ("a", "b")), (None, None)):
        placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
        assert int(checksums(placed)) == wanted
