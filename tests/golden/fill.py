"""Deterministic weights for parity checks, so that no large checkpoint has to be stored.

`fill(name, shape)` gives the float32 array for one tensor of an official PyTorch `state_dict`.
It depends on the tensor's PyTorch name and shape alone, and on NumPy's legacy `RandomState`,
whose stream is frozen. Scales are chosen so that activations stay healthy through a deep model.
"""

import zlib

import numpy as np

# Buffers that the official model computes for itself; they are in its checkpoints, and are no weights.
BUFFERS = ("relative_position_index", "attn_mask")


def is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in BUFFERS


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights for the tensor `name` (a PyTorch state_dict key) of the given shape, float32."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "power":
        value = normal
    elif leaf == "scale":
        value = 0.5 * normal
    elif leaf in ("positional_encoding", "relative_position_bias_table", "absolute_pos_embed") or leaf.startswith(
        "pos_embed"
    ):
        value = 0.2 * normal
    elif leaf == "bias":
        value = 0.05 * normal
    elif leaf == "weight" and len(shape) == 1:
        value = 1.0 + 0.1 * normal
    else:  # linear (out, in) and convolution (out, in/groups, kh, kw) kernels
        value = normal / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, np.float32)


def image(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """Normalised input images in PyTorch's layout, float32 (batch, 3, size, size)."""
    return np.random.RandomState(seed).standard_normal((batch, 3, size, size)).astype(np.float32)
