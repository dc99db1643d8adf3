"""The two compiled functions of a run: `train_step` and `eval_step`. Both are pure."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from polaformer_jax.models.layers import gathering_blocks
from polaformer_jax.training.metrics import Sums
from polaformer_jax.training.sharding import Constraints
from polaformer_jax.training.state import TrainState
from polaformer_jax.training.tasks import Batch, Task

# Each purpose has its own key, so that a new purpose never changes the numbers drawn for another.
PURPOSES = {"dropout": 0, "erase": 1, "mix": 2}


def purpose_key(seed: int, step: jax.Array, purpose: str) -> jax.Array:
    """The random key of a step for one purpose. A function of its arguments only: no key is carried."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), PURPOSES[purpose])


def make_train_step(
    graphdef: nnx.GraphDef,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    rate: Callable[[jax.Array], jax.Array],
    seed: int,
    accumulate: int = 1,
    ema_decay: float | None = None,
    trainable: Any = None,
    statistics: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Returns the training step: one update of the parameters.

    The loss is the mean over the valid examples of the whole batch, over all devices, weighted where the task gives
    weights. If the loss or a gradient is not finite, the parameters and the optimizer keep their values, so the state
    stays usable; the metrics `loss` and `grad_norm` show it.

    Running statistics of batch normalisations are among the parameters. Each micro-batch is normalised by its own
    statistics, which are those of its valid examples over all devices, and the running ones take them up one after the
    other, as in PyTorch. The moving average has an average of them too.

    Args:
        accumulate: number of micro-batches into which the augmented batch is split; they go through the model one after
            the other, and the update is that of the whole batch. (Stochastic depth and dropout draw for each.)
        ema_decay: d of the moving average, ema = d * ema + (1 - d) * params; the state must have one if it is given.
        trainable: nested dict of bools like the parameters; None: all of them.
        statistics: whether the model has running statistics, which are not `trainable`.
        mesh: the devices of state and batch; None: the compiler decides from the placement of the arguments.
    """

    constrain = Constraints(mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        with jax.named_scope("augmentation"):
            batch = task.augment(batch, lambda purpose: purpose_key(seed, state.step, purpose))
        total = jnp.sum(batch.get("weight", batch["mask"]))

        def loss_fn(params, part: Batch, key: jax.Array, running: dict):
            if trainable is not None:
                params = jax.tree.map(lambda p, trains: p if trains else jax.lax.stop_gradient(p), params, trainable)
            params, part = _whole(_replaced(params, running), graphdef, constrain), constrain.batch(part)
            model, context = nnx.merge(graphdef, params), {"mask": part["mask"]} if statistics else {}
            outputs = model(part["inputs"], train=True, rngs=nnx.Rngs(dropout=key), **context)
            running = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            with jax.named_scope("loss"):
                # In at least float32, whatever the model's dtype.
                outputs = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), outputs)
                losses = task.losses(outputs, part)
                if "weight" in part:
                    losses, counted = losses * part["weight"], jnp.sum(part["weight"])
                else:
                    counted = jnp.sum(part["mask"])
                summed = jnp.sum(jnp.where(part["mask"], losses, 0))
                loss = summed / jnp.maximum(total, 1).astype(losses.dtype)
                sums = {**task.metrics(outputs, part), "loss": (summed, counted.astype(summed.dtype))}
            return loss, (sums, running)

        def backward(part: Batch, key: jax.Array, running: dict):
            with constrain.known():
                differentiate = jax.value_and_grad(loss_fn, has_aux=True)
                (loss, (sums, running)), grads = differentiate(state.params, part, key, running)
            return (loss, sums, constrain.split(grads)), running

        dropout_key = purpose_key(seed, state.step, "dropout")
        running = nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, state.params), nnx.BatchStat))
        if accumulate == 1:
            (loss, sums, grads), running = backward(batch, dropout_key, running)
        else:
            parts = (_parts(batch, accumulate), jax.random.split(dropout_key, accumulate))
            first, _ = jax.eval_shape(backward, *jax.tree.map(lambda leaf: leaf[0], parts), running)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

            def add(carry, part):
                found, running = backward(*part, carry[1])
                with jax.named_scope("optimizer"):
                    return (jax.tree.map(jnp.add, carry[0], found), running), None

            ((loss, sums, grads), running), _ = jax.lax.scan(add, (zeros, running), parts)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = _replaced(optax.apply_updates(state.params, updates), running)
            ema = None
            if ema_decay is not None:
                ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, state.ema, params)
            params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state, ema),
                (state.params, state.opt_state, state.ema),
            )

        one = jnp.ones((), jnp.float32)
        sums |= {
            "grad_norm": (grad_norm, one),
            "learning_rate": (rate(state.step), one),
            "skipped": (jnp.sum(~batch["mask"]).astype(jnp.float32), one),  # records that could not be decoded
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), sums

    return train_step


def _replaced(params: dict, some: dict) -> dict:
    """Nested dicts, with the leaves that `some` has in place of theirs."""
    return {
        key: value if key not in some else _replaced(value, some[key]) if isinstance(value, dict) else some[key]
        for key, value in params.items()
    }


def _whole(params: Any, graphdef: nnx.GraphDef, constrain: Constraints) -> Any:
    """The parameters, gathered once for a step, but for those of blocks that gather their own (`model.remat`)."""
    return constrain.whole(params, besides=gathering_blocks(nnx.merge(graphdef, params)))


def _parts(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...). A micro-batch has every count-th example, so that each device has some."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def make_eval_step(
    graphdef: nnx.GraphDef, task: Task, *, mesh: Mesh | None = None
) -> Callable[[Any, Batch], tuple[Sums, Batch]]:
    """Returns the evaluation step: summed metrics of a batch, and the reported values and mask of each example."""

    constrain = Constraints(mesh)

    def eval_step(params, batch: Batch) -> tuple[Sums, Batch]:
        params, batch = _whole(params, graphdef, constrain), constrain.batch(batch)
        with constrain.known():
            sums, outputs = task.evaluate(nnx.merge(graphdef, params), batch)
        return sums, {**outputs, "mask": batch["mask"]}

    return eval_step
