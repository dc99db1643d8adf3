"""The products of linear attention are those of each head of each example, in either layout."""

import jax
import numpy as np
import pytest

from polaformer_jax.models import head_products
from polaformer_jax.models.kernels import placement


@pytest.mark.parametrize("on_tpu", [False, True])
def test_products_are_those_of_each_head(on_tpu, x64, monkeypatch):
    monkeypatch.setattr(placement, "for_tpu", lambda: on_tpu)
    rng = np.random.default_rng(0)
    k, v, q, m = (rng.standard_normal(shape) for shape in [(2, 5, 3, 4), (2, 5, 3, 6), (2, 7, 3, 4), (2, 3, 4, 6)])
    sums = np.stack([[k[b, :, h].T @ v[b, :, h] for h in range(3)] for b in range(2)])
    found = jax.jit(head_products.keys_by_values)(k, v)
    np.testing.assert_allclose(found, sums, rtol=1e-14, atol=1e-14)
    rows = np.stack([np.stack([q[b, :, h] @ m[b, h] for h in range(3)], axis=1) for b in range(2)])
    found = jax.jit(head_products.queries_by_matrices)(q, m)
    np.testing.assert_allclose(found, rows, rtol=1e-14, atol=1e-14)
