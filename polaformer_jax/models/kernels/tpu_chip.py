"""What is known of the TPU that a program is being traced for."""

from jax.experimental.pallas import tpu as pltpu


def chip() -> pltpu.TpuInfo | None:
    """JAX's description of the TPU; None if it is no TPU, or not one that JAX knows."""
    try:
        return pltpu.get_tpu_info()
    except ValueError:
        return None
