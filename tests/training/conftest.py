"""Trainings in these tests may have cheap models: `tests/support/dense_model.py`, `tests/support/dense_backbone.py`."""

import pytest

from polaformer_jax.training import loop
from tests.support import dense_backbone, dense_model
from tests.support.recipes import dense_digits


@pytest.fixture(scope="package", autouse=True)
def dense_registered():
    with dense_model.registered(), dense_backbone.registered():
        yield


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    """Config, work directory and result of a training of two dense layers; a test that changes files copies them."""
    config, workdir = dense_digits(digits_dir), tmp_path_factory.mktemp("run")
    return config, workdir, loop.train(config, workdir)
