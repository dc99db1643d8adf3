"""A model's weights as the official PyTorch code expects them: with its names, layouts and buffers."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from polaformer_jax.errors import WeightsError
from polaformer_jax.models.batch_norm import BatchNorm
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.models.pola_pp import PolaPP
from polaformer_jax.models.pola_sequence import PolaSequence
from polaformer_jax.models.pola_swin import PolaSwin
from polaformer_jax.models.rotary import frequencies
from polaformer_jax.models.token_attention import departures
from polaformer_jax.models.window_attention import WindowAttention, relative_position_index
from polaformer_jax.weights import rules
from polaformer_jax.weights.params import flatten


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Everything that the official model's `load_state_dict(strict=True)` needs::

        tensors = {name: torch.from_numpy(array.copy()) for name, array in pf.weights.to_torch(model).items()}
        official_model.load_state_dict(tensors, strict=True)

    Args:
        model: a PolaPVT, PolaSwin or PolaPP.

    Returns:
        NumPy arrays: the parameters in their storage dtype, and what else the official code counts as state: the
        buffers of Pola-Swin (`relative_position_index` int64, `attn_mask` float32), those of PolaFormer++
        (`num_batches_tracked` int64, of value 0, `angle` float32), and the `norm` that the official Pola-PVT has and
        never uses (ones and zeros).
    """
    params = flatten(nnx.to_pure_dict(nnx.state(model)))
    return in_official_layout({name: np.asarray(leaf) for name, leaf in params.items()}, model)


def in_official_layout(tensors: Mapping[str, np.ndarray], model: nnx.Module) -> dict[str, np.ndarray]:
    """As `to_torch`, for tensors under our names; only the structure of `model` is used. Parameters become views."""
    if isinstance(model, PolaSequence):
        raise WeightsError(
            "a PolaSequence has no official layout, because the authors published no such model: use layout='ours'"
        )
    if found := departures(model.config):
        raise WeightsError(
            f"a model with {', '.join(found)} has no official layout, because the authors published no such model: use"
            " layout='ours'"
        )
    official = {
        rules.official_name(name, array.ndim): rules.to_official(name, array) for name, array in tensors.items()
    }
    if isinstance(model, PolaPP):
        return official | _counters_and_angles(model)
    return official | (_buffers(model) if isinstance(model, PolaSwin) else _unused_norm(model))


def _counters_and_angles(model: PolaPP) -> dict[str, np.ndarray]:
    """What the official PolaFormer++ counts and computes: batches seen by each normalisation, and rotary angles."""
    buffers = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            buffers[".".join(map(str, (*path, "num_batches_tracked")))] = np.zeros((), np.int64)
    for i, (dim, heads) in enumerate(zip(model.config.embed_dims, model.config.num_heads, strict=True)):
        for name, width in (("RoPE", dim // heads), ("RoPE_linear", 2 * dim // heads)):
            buffers[f"layers.{i}.{name}.angle"] = np.repeat(frequencies(width), 2).astype(np.float32)
    return buffers


def _buffers(model: PolaSwin) -> dict[str, np.ndarray]:
    buffers = {}
    for i, stage in enumerate(model.layers):
        grid = model.config.img_size // STRIDES[i]
        for j, block in enumerate(stage.blocks):
            prefix = f"layers.{i}.blocks.{j}"
            if isinstance(block.attn, WindowAttention):
                index = relative_position_index(block.window).astype(np.int64)
                buffers[f"{prefix}.attn.relative_position_index"] = index
            windows = block.windows((grid, grid))
            # Linear blocks never use theirs. Where windows are padded, Swin's code has no such buffer.
            if (apart := windows.apart) is not None and not windows.is_padded:
                buffers[f"{prefix}.attn_mask"] = np.where(apart, np.float32(-100), np.float32(0))
    return buffers


def _unused_norm(model: nnx.Module) -> dict[str, np.ndarray]:
    dim = model.config.embed_dims[3]
    return dict(zip(rules.UNUSED, (np.ones(dim, np.float32), np.zeros(dim, np.float32)), strict=True))
