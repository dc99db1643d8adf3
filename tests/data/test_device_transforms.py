"""Erasing and mixing inside the step: their distributions, and the same numbers on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from polaformer_jax.data.images import device_transforms as transforms

SIZE, BATCH = 32, 16
MIX = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch_probability": 0.5}
mix = jax.jit(transforms.mix, static_argnames=tuple(MIX))
erase = jax.jit(transforms.random_erasing, static_argnames="probability")


def constant_images(batch=BATCH):
    """Image i is i + 1 everywhere."""
    return jnp.broadcast_to(jnp.arange(1.0, batch + 1).reshape(-1, 1, 1, 1), (batch, SIZE, SIZE, 3))


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def everything(count=BATCH):
    return jnp.ones(count, bool)


# --- random erasing


@pytest.fixture(scope="module")
def boxes():
    """Which pixels of 4000 images were erased, probability 1."""
    erased = []
    for key in keys(20):
        images = jnp.full((200, SIZE, SIZE, 3), 100.0)
        erased.append(np.asarray(erase(images, key, probability=1.0))[..., 0] < 50)
    return np.concatenate(erased)


def extents(boxes):
    rows, columns = boxes.any(2), boxes.any(1)
    return rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)


def test_an_erased_region_is_one_box(boxes):
    height, width, _, _ = extents(boxes)
    np.testing.assert_array_equal(height * width, boxes.sum((1, 2)))
    assert (boxes.sum((1, 2)) > 0).all()


def test_areas_and_aspects_of_erased_boxes(boxes):
    height, width, _, _ = extents(boxes)
    share = height * width / SIZE**2
    assert 0.01 < share.min() and share.max() < 0.37  # rounding of the sides aside
    aspect = np.log(height / width)
    assert abs(np.median(aspect)) < 0.06  # a third and three are as likely
    assert np.abs(aspect).max() < np.log(1 / 0.3) + 0.25
    # Boxes that do not fit are drawn again, which favours small areas: compare with the same rule in NumPy.
    rng = np.random.default_rng(0)
    expected = []
    while len(expected) < 20000:
        area = rng.uniform(0.02, 1 / 3) * SIZE**2
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < SIZE and w < SIZE:
            expected.append(h * w / SIZE**2)
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(share, quantiles), np.quantile(expected, quantiles), atol=0.012)


def test_erased_boxes_lie_anywhere(boxes):
    height, width, top, left = extents(boxes)
    for start, side in ((top, height), (left, width)):
        place = start / np.maximum(SIZE - side, 1)  # from the one edge to the other
        assert place.min() == 0 and place.max() == 1
        assert abs(place.mean() - 0.5) < 0.02


def test_how_often_images_are_erased():
    images = jnp.full((200, SIZE, SIZE, 3), 100.0)
    count = sum(int((np.asarray(erase(images, key, probability=0.25)) < 50).any((1, 2, 3)).sum()) for key in keys(20))
    assert abs(count / 4000 - 0.25) < 0.03  # four standard deviations
    np.testing.assert_array_equal(erase(images, keys(1)[0], probability=0.0), images)


def test_erased_pixels_are_standard_normal(boxes):
    noise = np.concatenate(
        [np.asarray(erase(jnp.full((200, SIZE, SIZE, 3), 100.0), key, probability=1.0)).ravel() for key in keys(2)]
    )
    noise = noise[noise < 50]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


# --- mixing


def test_mixup_blends_with_the_mirrored_batch():
    images = constant_images()
    mixed = mix(images, everything(), keys(1)[0], **{**MIX, "cutmix": 0.0})
    share = float(mixed.share[0])
    assert 0 < share < 1
    np.testing.assert_allclose(mixed.images, share * images + (1 - share) * images[::-1], rtol=1e-6)


def test_cutmix_pastes_one_box_and_its_share_is_what_is_left():
    images = constant_images()
    for key in keys(20):
        mixed = mix(images, everything(), key, **{**MIX, "mixup": 0.0})
        pasted = np.asarray(mixed.images != images)[..., 0]
        np.testing.assert_array_equal(np.asarray(mixed.images)[pasted], np.asarray(images[::-1])[pasted])
        np.testing.assert_allclose(np.asarray(mixed.share), 1 - pasted.mean((1, 2)), rtol=1e-6)
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert rows.sum() * columns.sum() == pasted[0].sum()


@pytest.mark.parametrize("method, a", [("mixup", 0.8), ("cutmix", 1.0)])
def test_shares_follow_their_beta_distribution(method, a):
    images = constant_images(2)
    arguments = {**MIX, "mixup": 0.0, "cutmix": 0.0, method: a}
    many = jax.jit(jax.vmap(lambda key: transforms.mix(images, everything(2), key, **arguments).share[0]))
    shares = np.asarray(many(keys(4000)))
    if method == "mixup":
        expected = np.random.default_rng(0).beta(a, a, 100000)
    else:  # the official box: both sides by the square root, halved downwards, cut off at the edges
        rng = np.random.default_rng(0)
        half = (SIZE * np.sqrt(1 - rng.beta(a, a, 100000))).astype(int) // 2
        side = [
            np.minimum(centre + half, SIZE) - np.maximum(centre - half, 0)
            for centre in (rng.integers(0, SIZE, 100000), rng.integers(0, SIZE, 100000))
        ]
        expected = 1 - side[0] * side[1] / SIZE**2
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(shares, quantiles), np.quantile(expected, quantiles), atol=0.03)


def test_how_often_each_method_is_taken():
    images = constant_images(2)

    def kind(key):
        mixed = transforms.mix(images, everything(2), key, **{**MIX, "probability": 0.8, "switch_probability": 0.3})
        blended = jnp.any((mixed.images != images) & (mixed.images != images[::-1]))
        return jnp.where(blended, 1, jnp.where(jnp.any(mixed.images != images), 2, 0))

    kinds = np.asarray(jax.jit(jax.vmap(kind))(keys(4000)))
    # A box of CutMix can be empty, and then counts as nothing here.
    assert abs((kinds == 1).mean() - 0.8 * 0.7) < 0.035
    assert 0.8 * 0.3 - 0.06 < (kinds == 2).mean() < 0.8 * 0.3 + 0.035


def test_without_mixing_images_stay_as_they_are():
    images = constant_images()
    for changes in ({"probability": 0.0}, {"mixup": 0.0, "cutmix": 0.0}):
        mixed = mix(images, everything(), keys(1)[0], **{**MIX, **changes})
        np.testing.assert_array_equal(mixed.images, images)
        np.testing.assert_array_equal(mixed.share, 1)


def test_what_is_no_image_is_nobodys_partner():
    images = constant_images()
    mask = everything().at[3].set(False)
    mixed = mix(images, mask, keys(1)[0], **{**MIX, "cutmix": 0.0})
    unmixed = [3, BATCH - 1 - 3]
    np.testing.assert_array_equal(mixed.share[np.array(unmixed)], 1)
    np.testing.assert_array_equal(mixed.images[BATCH - 4], images[BATCH - 4])
    assert (np.delete(np.asarray(mixed.share), unmixed) < 1).all()


def test_targets_are_smoothed_and_mixed():
    targets = transforms.mixed_targets(jnp.array([0, 1, 2, 2]), jnp.full(4, 0.75), num_classes=4, label_smoothing=0.1)
    on, off = 0.9 + 0.025, 0.025
    np.testing.assert_allclose(targets[0], [0.75 * on + 0.25 * off, off, 0.75 * off + 0.25 * on, off], rtol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_gives_the_same(devices):
    """The mirrored partner lies on another device."""
    images = jax.random.normal(jax.random.key(1), (BATCH, SIZE, SIZE, 3))

    def both(images, mask, key):
        return transforms.mix(transforms.random_erasing(images, key, probability=0.5), mask, key, **MIX)

    alone = jax.jit(both)(images, everything(), jax.random.key(2))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    arguments = jax.device_put((images, everything()), split)
    spread = jax.jit(both)(*arguments, jax.device_put(jax.random.key(2), whole))
    np.testing.assert_allclose(alone.images, spread.images, rtol=1e-5, atol=1e-6)  # other programs round otherwise
    np.testing.assert_allclose(alone.share, spread.share, rtol=1e-6)
