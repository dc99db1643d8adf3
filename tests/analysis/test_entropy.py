"""Entropies of image models against those of explicit rows, and the table and pictures of many runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polaformer_jax import create_model
from polaformer_jax.analysis.attention_maps import attention_maps
from polaformer_jax.analysis.image_entropy import of_model
from polaformer_jax.analysis.results.entropy import Row, correlation, draw, draw_sharpness, sharpness
from polaformer_jax.cli import entropy
from polaformer_jax.data.images.normalisation import normalise
from tests.support.small_models import perturbed

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


class Source:
    def __len__(self):
        return len(IMAGES)


class Inputs:
    report_split = "test"

    def source(self, split):
        return Source()


class Task:
    def image_of(self, source):
        return lambda index: IMAGES[index]


class Experiment:
    """A trained model and its test images, without files."""

    inputs, task = Inputs(), Task()

    def __init__(self, model):
        self.model = lambda params: model


@functools.cache
def measured(**options):
    """A model with one head and one block in each stage, and its entropies on two images."""
    small = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "depths": (1, 1, 1, 1)}
    model = perturbed(create_model("pola_pvt_nano", num_classes=4, **small, **options, rngs=nnx.Rngs(0)), scale=0.5)
    return model, of_model(Experiment(model), None, examples=2)


def by_definition(model, place, weight):
    """(examples,) the mean entropy of rows over log n, where `weight(q, k)` are the weights (N, n) of one head."""
    stage, block = map(int, place.split("."))
    images = np.asarray(normalise(IMAGES[[0, 2]]))  # two of three, spread evenly
    chosen = model.blocks(stage)[block]

    @jax.jit  # one program in place of one for each operation
    def projected(images):
        q, k, *_ = chosen.attn.project(chosen.norm1(model.tokens_before(images, stage=stage, block=block)))
        return q, k + chosen.attn.positional_encoding[...]

    q, k = projected(images)
    means = []
    for one, other in zip(np.asarray(q, np.float64), np.asarray(k, np.float64), strict=True):
        rows = weight(one, other)
        rows = [row[row > 0] / row.sum() for row in rows if row.sum() > 0]
        means.append(np.mean([-np.sum(row * np.log(row)) for row in rows]) / np.log(len(other)))
    return np.array(means)


def softmax(q, k):
    return np.exp(q @ k.T / np.sqrt(q.shape[-1]))


def relu(q, k):
    return np.maximum(q, 0) @ np.maximum(k, 0).T


@pytest.mark.parametrize("weight", [relu, softmax])
def test_baselines_are_measured_by_their_own_rows(weight):
    kind = weight.__name__
    model, found = measured(attention=kind)
    assert list(found) == [("0.0", kind), ("1.0", kind), ("2.0", kind)]  # stage 3 has one token
    for place in ("0.0", "1.0"):
        np.testing.assert_allclose(found[place, kind][:, 0], by_definition(model, place, weight), rtol=1e-3)


@pytest.mark.parametrize("stream, sign", [("same", 1), ("opposite", -1)])
def test_polarity_is_measured_by_its_own_rows(stream, sign):
    model, found = measured(alpha=3.0)
    attn = model.blocks(0)[0].attn
    scale = np.log1p(np.exp(np.asarray(attn.scale[0, 0], np.float64)))

    def weight(power):
        def of_head(q, k):
            q, k = q / scale, sign * k / scale
            return sum(np.maximum(s * q, 0) ** power @ (np.maximum(s * k, 0) ** power).T for s in (1, -1))

        return of_head

    power = 1 + 3 / (1 + np.exp(-np.asarray(attn.power[0, 0, 0], np.float64)))
    np.testing.assert_allclose(found["0.0", stream][:, 0], by_definition(model, "0.0", weight(power)), rtol=1e-3)
    np.testing.assert_allclose(
        found["0.0", f"{stream}, p = 1"][:, 0], by_definition(model, "0.0", weight(1.0)), rtol=1e-3
    )


def test_maps_of_a_baseline_are_the_rows_that_it_attends_by():
    """Without gate and convolution, the attention's result is the map times the values."""
    options = {"attn_type": "LLLL", "attention": "relu", "gate": False, "convolution": False}
    model = perturbed(create_model("pola_swin_nano", **options, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    maps = attention_maps(model, images, stage=1, token=(1, 2)).streams["relu"].weights  # (1, h, 4, 4)
    block = model.blocks(1)[0]

    @jax.jit
    def run(images, maps):
        x = block.attention_input(model.tokens_before(images, stage=1, block=0), (4, 4))
        _, _, v, _ = block.attn.by_heads(x, block.attn.positional_encoding[...])
        attended = jnp.einsum("hn,nhd->hd", maps.reshape(2, 16), v[0]).reshape(-1)
        return block.attn.proj(attended), block.attn(x)[0, 1 * 4 + 2]

    np.testing.assert_allclose(*run(images, maps), rtol=1e-4, atol=1e-5)


def test_polarity_is_measured_with_and_without_its_power():
    model, found = measured(alpha=3.0)
    assert {name for _, name in found} == {"same", "opposite", "same, p = 1", "opposite, p = 1"}
    assert model.blocks(0)[0].attn.alpha == 3.0  # as it was
    for stream in ("same", "opposite"):
        assert np.all(found["0.0", stream] < found["0.0", f"{stream}, p = 1"])  # the power sharpens
    values = np.stack([found["0.0", name] for name in ("same", "opposite")])
    assert values.shape == (2, 2, 1) and 0 < values.min() and values.max() < 1  # streams, examples, heads


def row(run, block, attention, head, entropy, accuracy=90.0, model="pola_pvt_nano"):
    return Row(run, model, "relu", 0, accuracy, block, attention, head, 5, entropy, 0.01)


def test_blocks_are_in_the_order_of_the_model():
    figure = draw([row("a", block, "relu", 0, 0.5) for block in ("2.10", "2.2", "0.0")])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["block 0.0", "block 2.2", "block 2.10"]


ROWS = [
    *(row("alpha3", block, name, head, 0.5) for block in "01" for name in ("same", "same, p = 1") for head in (0, 1)),
    row("softmax", "0", "softmax", 0, 0.3, 91.0),
    row("softmax", "0", "softmax", 1, 0.4, 91.0),
]


def test_the_picture_shows_every_run_and_attention():
    figure = draw(ROWS)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["alpha3: same", "alpha3: same, p = 1", "softmax: softmax"]
    assert [len(axes.containers) for axes in figure.axes] == [6, 4]  # a mark for each head
    top, bottom = figure.axes[0].get_ylim()[::-1]
    assert top < bottom


def test_sharpness_counts_blocks_alike_and_leaves_out_what_was_not_trained():
    rows = [row("a", "0", "same", 0, 0.2), row("a", "0", "opposite", 0, 0.4), row("a", "0", "same, p = 1", 0, 1.0)]
    rows += [row("a", "1", "same", head, 0.9) for head in range(4)]
    (found,) = sharpness(rows)
    assert (found.attention, found.accuracy) == ("polarity", 90.0) and found.entropy == pytest.approx(0.6)


def test_correlation_is_that_of_ranks():
    found = [
        dataclasses.replace(sharpness(ROWS)[0], entropy=x, accuracy=y) for x, y in ((0.1, 99), (0.2, 50), (0.9, 1))
    ]
    assert correlation(found) == pytest.approx(-1) and correlation(found[:2]) is None
    assert len(draw_sharpness(ROWS, {"pola_pvt_nano": "Pola-PVT"}).axes[0].lines) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "not the work directory of a training"),
        (["nowhere", "--plot", "entropy.gif"], "picture 'entropy.gif': expected the name of a .png or .svg file"),
        (["nowhere", "--maps", "entropy.gif"], "picture 'entropy.gif': expected the name of a .png or .svg file"),
        (["a/run", "b/run"], "two work directories are called run"),
    ],
)
def test_what_cannot_be_measured(capsys, arguments, message):
    assert entropy.main(arguments) == 1
    assert message in capsys.readouterr().err
