"""What tests of kernels share: devices that are not there, and the comparison of arrays by name."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

# By platform: JAX's name of a device that has kernels.
_KINDS = {"tpu": "TPU v5 lite", "cuda": "NVIDIA H100 80GB HBM3"}


def abstract_mesh(platform: str, size: int = 8, kind: str | None = None) -> jax.sharding.AbstractMesh:
    """A mesh of `size` devices that are not there, of JAX's name `kind`, for which programs can be lowered."""
    names = inspect.signature(jax.sharding.AbstractDevice).parameters  # jax 0.10.0 has no `platform`
    given = {"num_cores": None, "platform": platform}
    device = jax.sharding.AbstractDevice(
        kind or _KINDS[platform], **{name: value for name, value in given.items() if name in names}
    )
    return jax.sharding.AbstractMesh((size,), ("data",), (AxisType.Auto,), abstract_device=device)


def agree(found: dict, expected: dict, tolerance: float) -> None:
    """Each array within `tolerance` of the largest value of the expected one."""
    for name, array in expected.items():
        scale = max(float(jnp.max(jnp.abs(array))), 1e-3)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance * scale, err_msg=name)
