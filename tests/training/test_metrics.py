"""Metrics are sums and counts; masked examples never count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss, top_k_accuracy_score

from polaformer_jax.data.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from polaformer_jax.training.metrics import Mean, masked
from tests.support.recipes import image_task


def test_masked_values_do_not_count_even_if_not_finite():
    total, count = masked(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    assert (float(total), float(count)) == (4.0, 2.0)


def test_unequal_batches_give_the_mean_over_examples():
    mean = Mean()
    mean.add({"loss": (6.0, 3.0)})
    mean.add({"loss": (10.0, 1.0)})
    assert mean.result() == {"loss": 4.0}
    assert mean.count("loss") == 4


def test_nothing_counted_is_nan_not_zero():
    mean = Mean()
    mean.add({"loss": (0.0, 0.0)})
    assert np.isnan(mean.result()["loss"])


def test_classification_metrics_equal_scikit_learns():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(200, 12)).astype(np.float32), rng.integers(12, size=200)
    mask = rng.random(200) < 0.7
    batch = {"label": jnp.asarray(label, jnp.int32), "mask": jnp.asarray(mask)}
    mean = Mean()
    mean.add(image_task(12).metrics(jnp.asarray(logits), batch))
    ours = mean.result()

    labels = np.arange(12)
    kept, true = logits[mask].astype(np.float64), label[mask]
    probabilities = np.exp(kept) / np.exp(kept).sum(1, keepdims=True)
    assert ours["accuracy"] == pytest.approx((kept.argmax(1) == true).mean())
    assert ours["accuracy_top5"] == pytest.approx(top_k_accuracy_score(true, kept, k=5, labels=labels))
    assert ours["loss"] == pytest.approx(log_loss(true, probabilities, labels=labels), rel=1e-5)
    assert mean.count("loss") == mask.sum()


def test_among_equal_logits_the_lower_classes_come_first_as_in_top_k():
    rng = np.random.default_rng(0)
    logits, label = jnp.asarray(rng.integers(4, size=(500, 12)), jnp.float32), jnp.asarray(rng.integers(12, size=500))
    batch = {"label": label, "mask": jnp.ones(500, bool)}
    expected = (jax.lax.top_k(logits, 5)[1] == label[:, None]).any(1).sum()
    assert 0 < float(image_task(12).metrics(logits, batch)["accuracy_top5"][0]) == float(expected) < 500


def test_logits_that_are_no_numbers_are_not_among_the_top5():
    batch = {"label": jnp.arange(8), "mask": jnp.ones(8, bool)}
    assert image_task(8).metrics(jnp.full((8, 8), jnp.nan), batch)["accuracy_top5"][0] == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_top5_of_fewer_than_five_classes_is_always_right(classes):
    batch = {"label": jnp.zeros(4, jnp.int32), "mask": jnp.ones(4, bool)}
    total, count = image_task(classes).metrics(jnp.zeros((4, classes)), batch)["accuracy_top5"]
    assert total == count == 4


def test_label_smoothing_spreads_over_all_classes():
    logits = jnp.log(jnp.array([[0.7, 0.1, 0.1, 0.1]]))
    batch = {"image": jnp.zeros((1, 4, 4, 3), jnp.uint8), "label": jnp.array([0]), "mask": jnp.array([True])}
    task = image_task(4, label_smoothing=0.1)
    loss = task.losses(logits, task.augment(batch, lambda purpose: jax.random.key(0)))
    target = np.array([0.9 + 0.1 / 4, 0.1 / 4, 0.1 / 4, 0.1 / 4])
    assert float(loss[0]) == pytest.approx(-(target * np.log([0.7, 0.1, 0.1, 0.1])).sum(), rel=1e-6)


def test_normalised_pixels():
    images = jnp.array([[[[0, 128, 255]]]], jnp.uint8)
    expected = (np.array([0, 128, 255]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(normalise(images)[0, 0, 0], expected, rtol=1e-6)
