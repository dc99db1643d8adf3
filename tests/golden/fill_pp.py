"""Deterministic weights for the parity checks of PolaFormer++: what is new in it, and `fill.py` for the rest."""

import zlib

import numpy as np

from tests.golden import fill as first

# What the official model computes or counts for itself.
BUFFERS = ("angle", "num_batches_tracked")


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name` of the official state_dict, running statistics included, float32."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        return np.asarray(0.2 * normal, np.float32)
    if leaf == "running_var":
        return np.asarray(np.exp(0.3 * normal), np.float32)
    if leaf in ("s1", "s2"):
        return np.asarray(normal, np.float32)
    if leaf.startswith("gamma_"):
        return np.asarray(0.5 + 0.1 * normal, np.float32)
    return first.fill(name, shape)
