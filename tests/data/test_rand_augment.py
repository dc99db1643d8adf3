"""RandAugment: the pixels of every operation, the distribution of every draw, and the policy's text."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from polaformer_jax.data.images.rand_augment import FILL, OPS, RandAugment
from polaformer_jax.data.images.transforms import TrainImageTransform
from polaformer_jax.errors import UserError
from tests.support import GOLDEN_FOLDER

# By Pillow, two images, magnitudes 3 and 9; every fourth pixel, `[::4, ::4]`, of each result.
GOLDEN = np.load(GOLDEN_FOLDER / "randaugment.npz")
CASES = [key for key in GOLDEN if not key.startswith("input")]
TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness", "Contrast")
POLICY = "rand-m9-mstd0.5-inc1"


def noise(height=16, width=16):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ours(name):
    return name.removesuffix("Increasing").removesuffix("Rel")


def draws(policy, count, seed=0):
    augment, rng = RandAugment.parse(policy), np.random.default_rng(seed)
    return [augment.draw(rng) for _ in range(count)]


# --- pixels


def test_there_is_a_golden_result_for_every_operation():
    assert {ours(case.split("/")[0]) for case in CASES} == set(OPS) and len(OPS) == 15
    assert list(FILL) == json.loads((GOLDEN_FOLDER / "randaugment.json").read_text())["fill"]


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_pillow(case):
    name, magnitude, sign, image = case.split("/")
    image = GOLDEN[f"input{image}"]
    found = OPS[ours(name)](image, float(magnitude), {"pos": 1.0, "neg": -1.0}[sign])
    difference = np.abs(found.astype(np.int16)[::4, ::4] - GOLDEN[case])
    assert difference.max() <= (0 if ours(name) in TABLES else 1)
    assert found.dtype == np.uint8 and found.shape == image.shape


@pytest.mark.parametrize("magnitude", [0.0, 8.73, 10.0])
@pytest.mark.parametrize("size", [(1, 1), (3, 224), (16, 16)])
@pytest.mark.parametrize("op", OPS)
def test_every_operation_takes_every_size_and_magnitude(op, size, magnitude):
    image = noise(*size)
    for sign in (1.0, -1.0):
        found = OPS[op](image, magnitude, sign)
        assert found.dtype == np.uint8 and found.shape == image.shape


@pytest.mark.parametrize("op", sorted(set(OPS) - {"AutoContrast", "Equalize", "Invert", "Posterize"}))
def test_magnitude_zero_changes_nothing(op):
    np.testing.assert_array_equal(OPS[op](noise(), 0.0, 1.0), noise())


def test_posterize_keeps_four_bits_at_first_and_none_at_last():
    values = {m: np.unique(OPS["Posterize"](noise(), m, 1.0)) for m in (0.0, 2.5, 9.99, 10.0)}
    assert [len(found) for found in values.values()] == [16, 8, 2, 1]
    assert values[10.0] == [0]


def test_the_image_that_is_passed_in_stays_as_it_is():
    image, augment, rng = noise(), RandAugment.parse("rand-m9-n1-p1-inc1"), np.random.default_rng(0)
    for _ in range(100):
        augment(image, rng)
    np.testing.assert_array_equal(image, noise())


# --- statistics


def test_operations_are_drawn_evenly_with_replacement():
    pairs = [(first.op, second.op) for first, second in draws(POLICY, 20_000)]
    index = {op: number for number, op in enumerate(OPS)}
    counts = np.zeros((15, 15))
    for first, second in pairs:
        counts[index[first], index[second]] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 0.01  # each pair, an operation with itself too, as often as any
    assert stats.chisquare(counts.sum(axis=0)).pvalue > 0.01
    assert stats.chisquare(counts.sum(axis=1)).pvalue > 0.01


@pytest.mark.parametrize(("policy", "probability"), [(POLICY, 0.5), ("rand-m5-p0.2-n3-inc1", 0.2)])
def test_each_operation_is_applied_with_its_probability(policy, probability):
    applied = np.array([[choice.applied for choice in image] for image in draws(policy, 10_000)])
    for column in applied.T:
        assert stats.binomtest(int(column.sum()), len(column), probability).pvalue > 0.01
    assert abs(np.corrcoef(applied.T)[0, 1]) < 0.03  # one apart from the other


def test_magnitudes_are_normal_clipped_and_drawn_for_each_operation():
    magnitudes = np.array([[choice.magnitude for choice in image] for image in draws(POLICY, 10_000)])
    assert magnitudes.max() == 10.0
    clipped = int((magnitudes == 10.0).sum())
    assert stats.binomtest(clipped, magnitudes.size, stats.norm.sf(2)).pvalue > 0.01
    inside = magnitudes[magnitudes < 10.0]
    assert stats.kstest(inside, stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > 0.01
    assert abs(np.corrcoef(magnitudes.T)[0, 1]) < 0.03
    low = [choice.magnitude for image in draws("rand-m0-mstd2-inc1", 1000) for choice in image]
    assert min(low) == 0.0 and stats.binomtest(low.count(0.0), 2000, 0.5).pvalue > 0.01


def test_signs_are_fair_and_apart_from_all_else():
    choices = [choice for image in draws(POLICY, 10_000) for choice in image]
    signs = np.array([choice.sign for choice in choices])
    assert set(signs) == {1.0, -1.0} and stats.binomtest(int((signs > 0).sum()), signs.size, 0.5).pvalue > 0.01
    for other in ([c.applied for c in choices], [c.magnitude for c in choices]):
        assert abs(np.corrcoef(signs, other)[0, 1]) < 0.03


def test_without_a_deviation_every_magnitude_is_the_same():
    assert {choice.magnitude for image in draws("rand-m7-inc1", 100) for choice in image} == {7.0}


def test_calling_does_what_was_drawn():
    augment = RandAugment.parse(POLICY)
    for seed in range(40):
        expected = noise()
        for choice in augment.draw(np.random.default_rng(seed)):
            if choice.applied:
                expected = OPS[choice.op](expected, choice.magnitude, choice.sign)
        np.testing.assert_array_equal(augment(noise(), np.random.default_rng(seed)), expected)


def test_every_image_takes_as_many_numbers_whatever_is_drawn():
    """The choices of what follows then depend on nothing that happened to the pixels."""
    rng, other = np.random.default_rng(3), np.random.default_rng(3)
    RandAugment.parse("rand-m9-mstd0.5-p1-inc1")(noise(), rng)
    RandAugment.parse("rand-m9-mstd0.5-p0-inc1")(noise(), other)
    assert rng.bit_generator.state == other.bit_generator.state


def test_the_draws_are_written_down():
    """So that no change of the code or of a library alters the augmentation of a resumed run unnoticed."""
    found = [(c.op, c.applied, round(c.magnitude, 6), c.sign) for image in draws(POLICY, 2, seed=1) for c in image]
    assert found == [
        ("Color", False, 9.165219, -1.0),
        ("Color", True, 9.223187, -1.0),
        ("Rotate", False, 9.147066, -1.0),
        ("SolarizeAdd", False, 8.631773, -1.0),
    ]


# --- the policy's text


def test_the_official_policy():
    assert RandAugment.parse(POLICY) == RandAugment(magnitude=9.0, std=0.5, num_ops=2, probability=0.5, ops=tuple(OPS))


def test_parts_come_in_any_order():
    expected = RandAugment(magnitude=7.5, std=1.0, num_ops=3, probability=0.25)
    assert RandAugment.parse("rand-inc1-p.25-n3-mstd1-m7.5") == expected


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("", "does not begin with 'rand'"),
        ("original-m9-inc1", "does not begin with 'rand'"),
        ("augmix-m9", "does not begin with 'rand'"),
        ("rand", "add -inc1"),
        ("rand-inc1", "no magnitude"),
        ("rand-m9", "only increasing operations"),
        ("rand-m9-inc0", "only increasing operations"),
        ("rand-m9-inc2", "only increasing operations"),
        ("rand-m9-w0-inc1", "part 'w0' is not understood"),
        ("rand-m9-mmax15-inc1", "part 'mmax15' is not understood"),
        ("rand-m9--inc1", "part '' is not understood"),
        ("rand-m9-n1.5-inc1", "part 'n1.5' is not understood"),
        ("rand-mnan-inc1", "part 'mnan' is not understood"),
        ("rand-m9-m8-inc1", "has 'm' twice"),
        ("rand-m11-inc1", r"magnitude \(m\) is 11.0, expected 0 to 10"),
        ("rand-m9-mstd100-inc1", r"deviation \(mstd\) is 100.0"),
        ("rand-m9-p2-inc1", "p is 2.0, expected a probability"),
        ("rand-m9-n0-inc1", r"operations \(n\) is 0"),
        (None, "policy None does not begin"),
    ],
)
def test_what_is_not_understood_is_named(policy, message):
    with pytest.raises(UserError, match=message):
        RandAugment.parse(policy)


def test_unknown_operations_are_named():
    with pytest.raises(UserError, match=r"no operations \['Cutout'\], expected some of: AutoContrast"):
        RandAugment(magnitude=9, ops=("Invert", "Cutout"))


# --- in the training transform


def encoded():
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 50)).save(buffer, "png")
    return {"image": buffer.getvalue(), "label": 0}


def test_the_training_transform_augments_after_crop_and_flip():
    plain = TrainImageTransform(32, num_classes=2)
    augmented = TrainImageTransform(32, num_classes=2, rand_augment=POLICY)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cropped = plain(encoded(), rng)["image"]
        expected = RandAugment.parse(POLICY)(cropped, rng)
        np.testing.assert_array_equal(augmented(encoded(), np.random.default_rng(seed))["image"], expected)


def test_the_transform_travels_by_pickle_and_refuses_a_wrong_policy_at_once():
    transform = TrainImageTransform(32, num_classes=2, rand_augment=POLICY)
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform and again != TrainImageTransform(32, num_classes=2)
    np.testing.assert_array_equal(*(t(encoded(), np.random.default_rng(4))["image"] for t in (transform, again)))
    with pytest.raises(UserError, match="part 'x9'"):
        TrainImageTransform(32, num_classes=2, rand_augment="rand-x9")
