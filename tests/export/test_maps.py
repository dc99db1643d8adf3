"""The mean attention maps that a program returns are those of `attention_maps`."""

import jax
import numpy as np
import pytest

import polaformer_jax as pf
from polaformer_jax.errors import UserError
from polaformer_jax.export.maps import mean_maps
from tests.support import small_models
from tests.support.small_models import tiny_pp as tiny


@pytest.mark.parametrize(
    ("family", "stage", "block"),
    [("pvt", 0, 0), ("pvt", 2, -1), ("swin", 0, 0), ("swin", 0, 1), ("swin", 2, 0), ("pp", 0, 0)],
    ids=["reduced keys", "global", "windows", "shifted windows", "one window", "rotary"],
)
def test_they_are_the_mean_of_all_rows(family, stage, block):
    model = small_models.perturbed(tiny() if family == "pp" else small_models.build(family))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    expected = pf.attention_maps(model, images, stage=stage, block=block).streams
    found = jax.jit(lambda m, x: mean_maps(m, x, stage=stage, block=block))(model, images)
    for name, values in zip(("same", "opposite"), found, strict=True):
        weights = expected[name].weights.mean(axis=1)  # of the heads
        np.testing.assert_allclose(values, weights * weights[0].size, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "block", "message"),
    [(1, 0, "maps: block 0 of stage 1 has no two streams"), (4, 0, "maps: stage 4: expected"), (0, 9, "block 9")],
)
def test_blocks_without_two_maps_are_refused(stage, block, message):
    model = small_models.build("swin")
    with pytest.raises(UserError, match=message):
        mean_maps(model, np.zeros((1, 32, 32, 3), np.float32), stage=stage, block=block)
