"""Training with the kernels, interpreted, is training with the operations: sharded, recomputed, in micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import small_models
from tests.training.test_sharding import losses, split_everything  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shallow", "split_everything")]

STEPS = 2
# Two stages of polarity attention, and two of softmax within windows, whose heads fill 128 lanes.
SWIN = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "attn_type": "LLSS", "mlp_ratio": 1}


def test_sharded_recomputed_and_in_micro_batches():
    sizes = {**SWIN, "kernel_size": 1, "drop_path_rate": 0.2}
    expected = losses(small_models.split(small_models.build("swin", **sizes)), 1, 1, STEPS, accumulate=2)
    model = small_models.build("swin", **sizes, attention_impl="pallas")
    program = str(jax.make_jaxpr(model)(jnp.zeros((2, 32, 32, 3))))
    assert all(f"name={kernel}_forward" in program for kernel in ("polarity", "window", "mlp"))
    model.remat = True
    found = losses(small_models.split(model), 2, 4, STEPS, accumulate=2)
    np.testing.assert_allclose(found, expected, rtol=3e-5)
