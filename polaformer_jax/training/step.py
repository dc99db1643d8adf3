"""The two compiled functions of a run: `train_step` and `eval_step`. Both are pure."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from polaformer_jax.training.metrics import Sums, masked
from polaformer_jax.training.tasks import Batch, Task

# A key of its own for each purpose, so that a new one never changes the numbers drawn for another.
PURPOSES = {"dropout": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step: plain arrays in a plain pytree."""

    step: jax.Array  # () int32, number of steps taken
    params: Any  # nested dict
    opt_state: Any


def purpose_key(seed: int, step: jax.Array, purpose: str) -> jax.Array:
    """The random key of a step for one purpose. A function of its arguments alone: no key is carried."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), PURPOSES[purpose])


def make_train_step(
    graphdef: nnx.GraphDef,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    rate: Callable[[jax.Array], jax.Array],
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """One update of the parameters.

    The loss is the mean over the unmasked examples of the whole batch, over all devices. Where the loss or a gradient
    is not finite, the parameters and the optimizer keep their values, so no state is ever spoilt; the metrics `loss`
    and `grad_norm` show it.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        dropout_key = purpose_key(seed, state.step, "dropout")
        mask = batch["mask"]
        examples = jnp.sum(mask)

        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            logits = model(task.inputs(batch), train=True, rngs=nnx.Rngs(dropout=dropout_key))
            # The loss is float32 at least, whatever the model computes in.
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            losses = task.losses(logits, batch)
            return jnp.sum(jnp.where(mask, losses, 0)) / jnp.maximum(examples, 1).astype(losses.dtype), (logits, losses)

        (loss, (logits, losses)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )

        one = jnp.ones((), jnp.float32)
        sums = {
            **task.metrics(logits, batch),
            "loss": masked(losses, mask),
            "grad_norm": (grad_norm, one),
            "learning_rate": (rate(state.step), one),
            "skipped": (jnp.sum(~mask).astype(jnp.float32), one),  # records that could not be decoded
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), sums

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, task: Task) -> Callable[[Any, Batch], tuple[Sums, Batch]]:
    """Metrics of a batch, summed, and each example's outputs, label and mask."""

    def eval_step(params, batch: Batch) -> tuple[Sums, Batch]:
        logits = nnx.merge(graphdef, params)(task.inputs(batch), train=False)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        outputs = {**task.outputs(logits), "label": batch["label"], "mask": batch["mask"]}
        return task.metrics(logits, batch), outputs

    return eval_step
