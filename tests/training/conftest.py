"""Trainings in these tests may have two dense layers, `config.model.name = "dense"`: `tests/support/dense_model.py`."""

import pytest

from tests.support import dense_model


@pytest.fixture(scope="package", autouse=True)
def dense_registered():
    with dense_model.registered():
        yield
