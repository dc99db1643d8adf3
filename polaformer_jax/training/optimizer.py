"""AdamW as the official recipe uses it, put together from Optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

# Tables that the official trainer exempts from weight decay. `positional_encoding`, `pos_embed`, `power` and the
# attention's `scale` are not exempt there, so not here.
UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed")


def make_optimizer(config, rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decoupled weight decay.

    Args:
      config: the config's `optimizer` part.
      rate: the learning rate of a step, counted from 0.
    """
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(clip_by_global_norm(config.clip_norm), adamw)


def decay_mask(params) -> dict:
    """True for the parameters that decay: all but 1-D ones, biases and `UNDECAYED`. Same structure as `params`."""

    def decays(path, leaf) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        return leaf.ndim > 1 and name != "bias" and name not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)).

    As `torch.nn.utils.clip_grad_norm_` does it; `optax.clip_by_global_norm` lacks the 1e-6, which shows in the
    seventh digit of the loss.
    """

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
