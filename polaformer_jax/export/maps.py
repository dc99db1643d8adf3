"""The mean attention maps of a linear block, as an output of a program: cheap, and made of ordinary operations."""

import jax
import jax.numpy as jnp
import numpy as np

from polaformer_jax.analysis.attention_maps import members_of, resolve_block
from polaformer_jax.analysis.attention_rows import has_streams
from polaformer_jax.errors import UserError
from polaformer_jax.models.attention import NORMALISER_EPS
from polaformer_jax.models.backbone import Backbone
from polaformer_jax.models.layers import accumulation_dtype, product
from polaformer_jax.models.model_config import STRIDES
from polaformer_jax.models.rotary import rotary_tables, rotated
from polaformer_jax.models.rotary_attention import LinearAttention
from polaformer_jax.models.signed_features import signed_features
from polaformer_jax.models.window_attention import SwinBlock


def mean_maps(model: Backbone, images: jax.Array, *, stage: int, block: int) -> tuple[jax.Array, jax.Array]:
    """How much the query tokens of a block take from each key token, on average over queries and heads.

    The mean of the rows that `attention_maps` returns, without forming them: the mean over i of
    (Q_i K_j / n) / (Q_i mean_n(K) + 1e-6) is linear in K_j.

    Args:
        images: normalised, as the model takes them.
        stage, block: counted from 0, or from the end where negative; the block must be a linear one.

    Returns:
        For the same-signed and the opposite-signed stream (batch, side, side) on the grid of the keys, at least
        float32, in units of uniform attention: 1 everywhere if all tokens attend equally to all keys within reach.

    Raises:
        UserError: the block does not exist, or is not linear.
    """
    stage, block = linear_block(model, stage, block)
    chosen = model.blocks(stage)[block]
    attn = chosen.attn
    side = model.config.img_size // STRIDES[stage]
    x = chosen.attention_input(model.tokens_before(images, stage=stage, block=block), (side, side))
    if isinstance(attn, LinearAttention):
        same, opposite, k = attn.features(x)
        tables = rotary_tables((side, side), k.shape[-1])
        return tuple(_mean_rows(q, k, tables).reshape(-1, side, side) for q in (same, opposite))
    order = members_of(chosen, (side, side)).ravel()
    q, k, _, _ = attn.project(x)
    table = attn.positional_encoding[...]
    q, k = signed_features(
        q, k, power=attn.power[...], scale=attn.scale[...], positional_encoding=table, alpha=attn.alpha
    )
    q, k = (jnp.swapaxes(x, 1, 2) for x in (q, k))  # (B', h, N, 2d)
    same = _mean_rows(q, k)
    opposite = _mean_rows(jnp.roll(q, q.shape[-1] // 2, axis=-1), k)
    keys = order.size if isinstance(chosen, SwinBlock) else k.shape[2]  # those of all windows, or reduced ones
    return tuple(_placed(rows.reshape(-1, keys), order) for rows in (same, opposite))


def linear_block(model: Backbone, stage: int, block: int) -> tuple[int, int]:
    """The stage and block counted from 0. Raises a UserError if there is no such block, or it is not linear."""
    try:
        stage, block = resolve_block(model, stage, block)
    except ValueError as error:
        raise UserError(str(error), argument="maps") from error
    if not has_streams(model.blocks(stage)[block]):
        raise UserError(f"block {block} of stage {stage} has no two streams, which the maps show", argument="maps")
    return stage, block


def _mean_rows(q: jax.Array, k: jax.Array, tables=None) -> jax.Array:
    """(B', h, N, 2d), (B', h, n, 2d) -> (B', n), the mean over queries and heads; 1 is uniform.

    `tables`: rotations of both, after the normaliser.
    """
    k_mean = jnp.mean(k, axis=2, dtype=accumulation_dtype(k.dtype)).astype(k.dtype)
    normaliser = product("bhmk,bhk->bhm", q, k_mean) + NORMALISER_EPS
    q = q / normaliser[..., None]
    q, k = (q, k) if tables is None else (rotated(q, tables), rotated(k, tables))
    q_mean = jnp.mean(q, axis=2)  # (B', h, 2d)
    return product("bhk,bhnk->bhn", q_mean.astype(k.dtype), k).mean(axis=1)


def _placed(rows: jax.Array, order: np.ndarray) -> jax.Array:
    """(B, n) in the order of windows -> (B, side, side)"""
    side = int(rows.shape[1] ** 0.5)
    if order.size == rows.shape[1]:
        rows = rows[:, np.argsort(order)]
    return rows.reshape(-1, side, side)
