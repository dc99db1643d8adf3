"""Every test runs on eight fake CPU devices, and accidental rank promotion is an error."""

import gc
import os
import tempfile

import jax
import pytest

from polaformer_jax.models import initializers

# What one test has compiled the next one reads back, in whichever process it runs; so do scripts that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
os.environ["JAX_PLATFORMS"] = "cpu"  # of processes that tests start: whatever else is installed or plugged in
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
initializers.BLOCKS = (1 << 8, 1 << 12, 1 << 16)  # the same values; without optimisations a large block takes long


def pytest_collection_finish(session):
    """What the imports have left is not searched for garbage again and again: a tenth of the time of tracing."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def shallow():
    """The models of this project's own sizes have one block a stage, in a module of tests that compile them."""
    from tests.support import small_models

    with small_models.shallow():
        yield


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Trainings leave out most of XLA's optimisations: a few steps of a large model take less time than these."""
    from polaformer_jax.training import runtime
    from tests.support.quick import QUICK

    monkeypatch.setattr(runtime, "compiler_options", lambda config: QUICK)


@pytest.fixture
def compiled_as_by_users(monkeypatch):
    """Training steps have the optimisations that the tests otherwise leave out (see the Makefile)."""
    from polaformer_jax.training import runtime
    from tests.support.quick import AS_USERS

    monkeypatch.setattr(runtime, "compiler_options", lambda config: AS_USERS)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> str:
    """A data directory with the prepared data set `sklearn_digits`."""
    from polaformer_jax.data import prepare

    directory = tmp_path_factory.mktemp("data")
    prepare.prepare("sklearn_digits", directory)
    return str(directory)
