"""How concentrated attention is in trained sequence models: entropies of the attention rows.

The paper says that relu features leave linear attention flat, and that its learnable power makes it spiky again. So
polarity-aware attention is measured twice: as it was trained, and with its power replaced by p = 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polaformer_jax.analysis.attention_rows import WITHOUT_POWER, baseline_weights, polarity_weights, row_entropy
from polaformer_jax.errors import UserError
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.layers import accumulation_dtype
from polaformer_jax.models.plain_attention import PlainAttention
from polaformer_jax.models.pola_sequence import PolaSequence, Sequences
from polaformer_jax.models.signed_features import signed_features
from polaformer_jax.training.experiment import Experiment


@functools.partial(jax.jit, static_argnames=("graphdef", "block"))
def row_entropies(graphdef: nnx.GraphDef, params, sequences: Sequences, *, block: int) -> dict[str, jax.Array]:
    """Entropies of the attention rows of one block, as fractions of the largest possible entropy.

    Args:
        graphdef, params: of a `PolaSequence` of single texts.
        sequences: (B, N) tokens and (B,) lengths n > 1; padding is used neither as query nor as key.
        block: counted from 0.

    Returns:
        For each attention ("same" and "opposite" for polarity-aware attention, "same, p = 1" and "opposite, p = 1" for
        the same without its power, "relu", "softmax"): (B, h), the means over the n query tokens i of

            -sum_j a_ij log a_ij / log n        a_i: row i of the attention matrix, divided by its sum.

        1 means attending equally to all tokens, 0 to a single one. All-zero rows are not counted; NaN if there are no
        others.
    """
    model: PolaSequence = nnx.merge(graphdef, params)
    chosen = model.blocks[block]
    weights = _polarity_weights if isinstance(chosen.attn, PolarityAttention) else _plain_weights
    x, mask = model.tokens_before(sequences, block=block)

    def of_one(example):  # one at a time: the weights of one are (h, N, N)
        x, mask = example
        found = weights(chosen.attn, chosen.norm1(x[None]), mask)
        return {name: _mean_entropy(rows[0], mask) for name, rows in found.items()}

    return jax.lax.map(of_one, (x, mask))


def _polarity_weights(attn: PolarityAttention, x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """(1, N, C) -> (1, h, N, N) of each stream, up to a factor for each row."""
    q, k, _, _ = attn.project(x)
    found = {}
    for alpha, suffix in ((attn.alpha, ""), (0.0, WITHOUT_POWER)):
        q_signed, k_signed = signed_features(
            q,
            k,
            power=attn.power[...],
            scale=attn.scale[...],
            positional_encoding=attn.positional_encoding[:, : x.shape[1]],
            alpha=alpha,
        )
        same, opposite = polarity_weights(q_signed, jnp.where(mask[None, :, None, None], k_signed, 0))
        found |= {f"same{suffix}": same, f"opposite{suffix}": opposite}
    return found


def _plain_weights(attn: PlainAttention, x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    q, k, _ = attn.project(x)
    return {attn.kind: baseline_weights(q, k, attn.kind, mask=mask[None])}


def _mean_entropy(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """(h, N, N) weights of one example, (N,) mask of valid tokens -> (h,)."""
    weights = jnp.where(mask[None, None], weights, 0).astype(accumulation_dtype(weights.dtype))
    entropy, seen = row_entropy(weights)  # (h, N) each
    counts = seen & mask[None]
    mean = jnp.sum(jnp.where(counts, entropy, 0), axis=-1) / jnp.sum(counts, axis=-1)
    return mean / jnp.log(jnp.sum(mask))


def of_model(experiment: Experiment, params, *, examples: int) -> dict[tuple[str, str], np.ndarray]:
    """The entropies of a trained model on examples spread evenly over the split that its result is reported on.

    Args:
        experiment: of a training of a `pola_sequence`.
        params: the trained parameters.

    Returns:
        (block, attention) -> (examples, h), see `row_entropies`.

    Raises:
        UserError: it was not trained on single sequences.
    """
    model = experiment.model(params)
    if model.config.texts != 1:
        raise UserError("the run was trained on pairs of texts: expected a task of single ones")
    source = experiment.inputs.source(experiment.inputs.report_split)
    texts = [source[int(index)]["tokens"] for index in spread(len(source), examples)]
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    found = {}
    for block in range(len(model.blocks)):
        entropies = row_entropies(experiment.graphdef, params, Sequences(tokens, lengths), block=block)
        found |= {(str(block), name): np.asarray(values) for name, values in entropies.items()}
    return found


def spread(count: int, examples: int) -> np.ndarray:
    """Indices of this many examples, spread evenly over `count`; of all if there are no more."""
    return np.linspace(0, count - 1, min(examples, count)).astype(int)
