"""How concentrated attention is: entropies of the attention rows of trained sequence models, as a table and a picture.

The paper says that relu features leave linear attention flat, and that its learnable power makes it spiky again. So
polarity-aware attention is measured twice: as it was trained, and with its power replaced by p = 1.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from polaformer_jax.analysis.attention_rows import polarity_weights, row_entropy
from polaformer_jax.errors import UserError
from polaformer_jax.files import figures, paths
from polaformer_jax.files.names import shown
from polaformer_jax.models.attention import PolarityAttention
from polaformer_jax.models.layers import accumulation_dtype, product
from polaformer_jax.models.plain_attention import PlainAttention
from polaformer_jax.models.pola_sequence import PolaSequence, Sequences
from polaformer_jax.models.signed_features import signed_features

# The same colour with and without the power; open marks are without it.
COLOURS = {"same": "#2364aa", "opposite": "#73bfb8", "relu": "#e09f3e", "softmax": "#c8382c"}
WITHOUT_POWER = ", p = 1"


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
    if attn.kind == "relu":
        return {"relu": product("bmhk,bnhk->bhmn", jax.nn.relu(q), jax.nn.relu(k))}
    scores = product("bmhk,bnhk->bhmn", q, k) * q.shape[-1] ** -0.5
    return {"softmax": jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf), axis=-1)}


def _mean_entropy(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """(h, N, N) weights of one example, (N,) mask of valid tokens -> (h,)."""
    weights = jnp.where(mask[None, None], weights, 0).astype(accumulation_dtype(weights.dtype))
    entropy, seen = row_entropy(weights)  # (h, N) each
    counts = seen & mask[None]
    mean = jnp.sum(jnp.where(counts, entropy, 0), axis=-1) / jnp.sum(counts, axis=-1)
    return mean / jnp.log(jnp.sum(mask))


def of_run(workdir: epath.PathLike, *, examples: int, data_dir: str | None = None) -> dict[tuple[int, str], np.ndarray]:
    """The entropies of a trained model on examples spread evenly over the split that its result is reported on.

    Args:
        workdir: of a training of a `pola_sequence`; its best checkpoint is used.
        data_dir: where the data is now, if not where the run's config says.

    Returns:
        (block, attention) -> (examples, h), see `row_entropies`.

    Raises:
        UserError: the run or its checkpoint does not exist, or it was not trained on single sequences.
    """
    from polaformer_jax.training import checkpoints
    from polaformer_jax.training.experiment import Experiment
    from polaformer_jax.training.workdir import read_config

    config = read_config(workdir)
    if config.model.name != "pola_sequence":
        raise UserError(f"{workdir} trained {config.model.name}: expected pola_sequence (attention_maps is for images)")
    config.mesh.data, config.mesh.fsdp = 1, 1
    config.data.data_dir = config.data.data_dir if data_dir is None else data_dir
    experiment = Experiment(config)
    params, _ = checkpoints.read_params(
        workdir, experiment.params.abstract, "best", best_metric=checkpoints.metric_name(config)
    )
    model = experiment.model(params)
    if model.config.texts != 1:
        raise UserError(f"{workdir} trained on pairs of texts: expected a task of single ones")
    source = experiment.inputs.source(experiment.inputs.report_split)
    chosen = np.linspace(0, len(source) - 1, min(examples, len(source))).astype(int)
    texts = [source[int(index)]["tokens"] for index in chosen]
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    found = {}
    for block in range(len(model.blocks)):
        entropies = row_entropies(experiment.graphdef, params, Sequences(tokens, lengths), block=block)
        found |= {(block, name): np.asarray(values) for name, values in entropies.items()}
    return found


def of_runs(
    workdirs: Sequence[epath.PathLike], *, examples: int, data_dir: str | None = None
) -> dict[str, dict[tuple[int, str], np.ndarray]]:
    """The entropies (see `of_run`) of several runs, by the names of their work directories.

    Raises:
        UserError: two work directories have the same name; or as for `of_run`.
    """
    runs = {}
    for workdir in tqdm(workdirs, unit="run", disable=None):
        name = shown(paths.given(workdir, "workdir").name)
        if name in runs:
            raise UserError(f"two work directories are called {name}: the table tells runs apart by their names")
        runs[name] = of_run(workdir, examples=examples, data_dir=data_dir)
    return runs


def records(runs: Mapping[str, Mapping[tuple[int, str], np.ndarray]]) -> list[dict[str, str]]:
    """One record for each run, block, attention and head: mean, and standard deviation over the examples."""
    return [
        {
            "run": run,
            "block": str(block),
            "attention": name,
            "head": str(head),
            "examples": str(len(column)),
            "entropy": f"{np.nanmean(column):.4f}",
            "deviation": f"{np.nanstd(column):.4f}",
        }
        for run, found in runs.items()
        for (block, name), values in found.items()
        for head, column in enumerate(values.T)
    ]


def draw(runs: Mapping[str, Mapping[tuple[int, str], np.ndarray]]) -> Figure:
    """A panel for each block: for each run and attention the heads' means, and bars of one standard deviation."""
    blocks = sorted({block for found in runs.values() for block, _ in found})
    rows = [(run, name) for run, found in runs.items() for name in dict.fromkeys(name for _, name in found)]
    figure = figures.new(2 + 4.2 * len(blocks), 1.2 + 0.42 * len(rows))
    panels = figure.subplots(1, len(blocks), sharex=True, sharey=True, squeeze=False)[0]
    panels[0].invert_yaxis()  # of all panels, which share it: the first run is on top
    for axes, block in zip(panels, blocks, strict=True):
        for place, (run, name) in enumerate(rows):
            if (block, name) not in runs[run]:
                continue
            values = runs[run][block, name]
            colour = COLOURS[name.removesuffix(WITHOUT_POWER)]
            for head, column in enumerate(values.T):
                axes.errorbar(
                    np.nanmean(column),
                    place + 0.16 * (head - (values.shape[1] - 1) / 2),
                    xerr=np.nanstd(column),
                    fmt="o",
                    color=colour,
                    markerfacecolor="white" if name.endswith(WITHOUT_POWER) else colour,
                    markersize=5,
                    linewidth=1.2,
                )
        figures.tidy(axes)
        axes.grid(visible=False, axis="y")
        axes.set_title(f"block {block}", loc="left", fontweight="bold")
        axes.set_xlabel("entropy of a row / log n")
        axes.set_yticks(range(len(rows)), [f"{figures.plain(run)}: {name}" for run, name in rows])
    return figure
