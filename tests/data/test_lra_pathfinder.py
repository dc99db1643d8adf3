"""Pathfinder: labels found again by tracing what is drawn, geometry within its bounds, pictures that show it."""

import hashlib

import numpy as np
import pytest

from polaformer_jax.cli import lra_sheet
from polaformer_jax.data.lra import pathfinder as pf
from polaformer_jax.data.lra import pathfinder_pictures

COUNT = 400


@pytest.fixture(scope="module")
def examples():
    return pathfinder_pictures.make_examples(11, np.arange(COUNT))


def all_dashes(curves, number):
    """(m, 2, 2) the dashes of a picture in random order, begin and end exchanged at random."""
    dashes = np.concatenate([curves.targets[number].reshape(-1, 2, 2), curves.distractors[number].reshape(-1, 2, 2)])
    dashes = dashes[~np.isnan(dashes[:, 0, 0])]
    rng = np.random.default_rng(number)
    rng.shuffle(dashes)
    turned = rng.random(len(dashes)) < 0.5
    dashes[turned] = dashes[turned, ::-1]
    return dashes


def trace(dashes, disc):
    """Follows a curve from the dash in a disc, by good continuation alone; returns where it ends, and its length."""
    distance = np.linalg.norm(dashes - disc, axis=-1)
    current, side = np.unravel_index(distance.argmin(), distance.shape)
    assert distance.min() < 1e-9
    end, steps, used = 1 - side, 1, {current}
    while True:
        along = dashes[current, end] - dashes[current, 1 - end]
        pivot = dashes[current, end] + pf.MARGIN * along / pf.LENGTH
        # The next dash points at the pivot: its nearer end lies `MARGIN` off, on its own line.
        ways = (dashes[:, ::-1] - dashes) / pf.LENGTH
        found = np.argwhere(np.linalg.norm(dashes - pf.MARGIN * ways - pivot, axis=-1) < 1e-9)
        found = [(dash, near) for dash, near in found if dash not in used]
        if not found:
            return dashes[current, end], steps
        ((current, near),) = found
        end = 1 - near
        used.add(current)
        steps += 1


def test_labels_are_those_found_by_tracing(examples):
    curves = examples.curves
    for number in range(COUNT):
        end, steps = trace(all_dashes(curves, number), curves.discs[number, 0])
        assert steps == pf.DASHES
        at_other_disc = np.linalg.norm(end - curves.discs[number, 1]) < 1e-9
        assert at_other_disc == bool(examples.labels[number])


def paths_in_picture(image, disc):
    """All ends of curves of 14 dashes from a disc on, as far as the picture shows each of their dashes.

    Nothing but the picture and the disc's place is known: every heading is tried, and every turn of less than 90
    degrees, as long as no pixel of the dash that it would make is darker in the picture than it would be.
    """
    headings = np.arange(pf.STEPS)
    units = np.stack([np.cos(2 * np.pi * headings / pf.STEPS), np.sin(2 * np.pi * headings / pf.STEPS)], axis=-1)
    pivots = disc - pf.MARGIN * units
    for dash in range(pf.DASHES):
        if dash:
            turns = np.arange(-pf.STEPS // 4 + 1, pf.STEPS // 4)
            pivots = np.repeat(pivots, len(turns), axis=0)
            headings = (headings[:, None] + turns).reshape(-1) % pf.STEPS
        begins = pivots + pf.MARGIN * units[headings]
        dashes = np.stack([begins, begins + pf.LENGTH * units[headings]], axis=1)
        covered = pathfinder_pictures.coverage(len(dashes), np.arange(len(dashes)), dashes, 0.25, pf.LENGTH)
        shown = (255 * np.minimum(1.5 * covered, 1) <= image.astype(int) + 1).all(axis=(1, 2))
        shown &= ((dashes > 0.5) & (dashes < pf.SIDE - 0.5)).all(axis=(1, 2))  # beyond, nothing could be seen
        headings, ends = headings[shown], dashes[shown, 1]
        # Many ways lead to nearly the same dash: one of them goes on.
        states = np.concatenate([np.rint(8 * ends), headings[:, None]], axis=1)
        _, first = np.unique(states, axis=0, return_index=True)
        headings, ends = headings[first], ends[first]
        pivots = ends + pf.MARGIN * units[headings]
    return ends


def test_labels_are_those_found_by_tracing_the_picture(examples):
    for number in range(40):
        first, second = examples.curves.discs[number]
        ends = paths_in_picture(examples.images[number], first)
        assert len(ends), "the curve of the first disc is lost"
        connected = np.linalg.norm(ends - second, axis=-1).min() < 0.5
        assert connected == bool(examples.labels[number]), number


def test_both_discs_end_target_curves(examples):
    curves = examples.curves
    ends = curves.targets[np.arange(COUNT), curves.marked, -1, 1]
    np.testing.assert_array_equal(curves.discs[:, 0], ends)
    begins = curves.targets[:, :, 0, 0]  # (n, 2, 2)
    at = np.linalg.norm(begins - curves.discs[:, 1, None], axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(at == curves.marked, examples.labels == 1)


def test_labels_are_balanced_and_say_nothing_of_curve_or_effort(examples):
    many = pf.grow(5, np.arange(800))
    assert abs(many.labels.mean() - 0.5) < 0.06  # more than three standard deviations
    assert abs(many.marked.mean() - 0.5) < 0.06
    assert abs((many.labels == many.marked).mean() - 0.5) < 0.06
    effort = [many.restarts[many.labels == label].mean() for label in (False, True)]
    assert abs(effort[0] - effort[1]) < 3  # of about 8


def test_curves_begin_in_the_middle_one_seed_distance_apart(examples):
    begins = examples.curves.targets[:, :, 0, 0]
    assert begins[:, 0].min() >= 14 and begins[:, 0].max() <= 18
    np.testing.assert_allclose(np.linalg.norm(begins[:, 0] - begins[:, 1], axis=-1), pf.SEED_DISTANCE)


def test_dashes_have_their_length_stay_inside_and_follow_each_other(examples):
    for curves in (examples.curves.targets, examples.curves.distractors):
        assert np.nanmin(curves) >= pf.RIM and np.nanmax(curves) <= pf.SIDE - pf.RIM
        lines = curves[..., 1, :] - curves[..., 0, :]
        np.testing.assert_allclose(np.linalg.norm(lines, axis=-1)[~np.isnan(lines[..., 0])], pf.LENGTH)
    units = (examples.curves.targets[..., 1, :] - examples.curves.targets[..., 0, :]) / pf.LENGTH
    pivots = examples.curves.targets[..., 0, :] - pf.MARGIN * units
    strides = np.linalg.norm(np.diff(pivots, axis=2), axis=-1)
    np.testing.assert_allclose(strides, pf.LENGTH + 2 * pf.MARGIN)


def test_turns_are_gentle_and_even(examples):
    lines = examples.curves.targets[..., 1, :] - examples.curves.targets[..., 0, :]
    angles = np.arctan2(lines[..., 1], lines[..., 0])
    turns = (np.diff(angles, axis=2) + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(turns).max() < np.pi / 2
    assert abs(turns.mean()) < 0.03
    # A free curve would have sqrt(pi^2 / 12 - 1 / 2) = 0.567; the edges and other curves make it turn more.
    assert 0.5 < turns.std() < 0.75


def test_dashes_keep_clear_of_each_other(examples):
    along = np.linspace(0, 1, 9)[:, None]
    slack = 2 * np.sqrt(0.5) / 3  # the map's cells, and positions within them
    for number in range(0, COUNT, 10):
        curves = examples.curves
        groups = [*curves.targets[number], *curves.distractors[number]]
        order = [(group, place) for group, dashes in enumerate(groups) for place in range(len(dashes))]
        dashes = np.concatenate(groups)  # (m, 2, 2)
        points = dashes[:, :1] + along * (dashes[:, 1:] - dashes[:, :1])  # (m, 9, 2)
        apart = np.linalg.norm(points[:, None, :, None] - points[None, :, None, :], axis=-1).min(axis=(2, 3))
        for i, (group, place) in enumerate(order):
            for j, (other, next_place) in enumerate(order[:i]):
                neighbours = group == other and abs(place - next_place) == 1
                if not neighbours and not np.isnan(apart[i, j]):
                    assert apart[i, j] > pf.CLEARANCE - slack, (number, i, j)


def test_most_distractors_find_room(examples):
    present = ~np.isnan(examples.curves.distractors[:, :, 0, 0, 0])
    assert 4 < present.sum(axis=1).mean() <= pf.DISTRACTORS
    whole = ~np.isnan(examples.curves.distractors).any(axis=(2, 3, 4))
    np.testing.assert_array_equal(present, whole)  # left out altogether, or not at all


def test_pictures_show_every_dash_and_both_discs_and_nothing_else(examples):
    centres = np.stack(np.meshgrid(np.arange(pf.SIDE) + 0.5, np.arange(pf.SIDE) + 0.5), axis=-1)  # y, x, (x, y)
    for number in range(0, COUNT, 8):
        image, dashes = examples.images[number], all_dashes(examples.curves, number)
        middles = dashes.mean(axis=1)
        near = np.linalg.norm(centres[None] - middles[:, None, None], axis=-1) < 1.0
        assert min(image[around].max() for around in near) > 90
        for disc in examples.curves.discs[number]:
            inside = np.linalg.norm(centres - disc, axis=-1) < 0.7
            assert image[inside].min() == 255
        along = np.linspace(0, 1, 9)[:, None]
        points = (dashes[:, :1] + along * (dashes[:, 1:] - dashes[:, :1])).reshape(-1, 2)
        far = np.linalg.norm(centres[:, :, None] - points, axis=-1).min(axis=-1) > 1.5
        for disc in examples.curves.discs[number]:
            far &= np.linalg.norm(centres - disc, axis=-1) > pathfinder_pictures.DISC_RADIUS + 1.2
        assert far.any() and image[far].max() == 0


def test_an_example_depends_on_seed_and_number_alone(examples):
    some = pathfinder_pictures.make_examples(11, np.array([399, 3, 77]))
    np.testing.assert_array_equal(some.images, examples.images[[399, 3, 77]])
    np.testing.assert_array_equal(some.labels, examples.labels[[399, 3, 77]])
    assert hashlib.sha256(examples.images[:20].tobytes()).hexdigest()[:16] == "a0392c28c2957479"
    others = pathfinder_pictures.make_examples(12, np.arange(20))
    assert (others.images != examples.images[:20]).any(axis=(1, 2)).all()


def test_random_numbers_are_uniform_and_independent_between_pictures():
    draws = pf._Canvas(3, np.arange(2000, dtype=np.uint64)).uniform(np.arange(2000), 20)
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(np.histogram(draws, 10, (0, 1))[0] / draws.size, 0.1, atol=0.006)
    correlations = np.corrcoef(draws.T) - np.eye(20)
    assert np.abs(correlations).max() < 0.1
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.1


def test_the_sheet_is_drawn(tmp_path, capsys):
    assert lra_sheet.main(["--output", str(tmp_path / "sheet.png"), "--examples", "3"]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert lra_sheet.main(["--output", str(tmp_path / "sheet.pdf")]) == 1
    assert "expected the name of a .png file" in capsys.readouterr().err
