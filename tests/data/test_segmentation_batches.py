"""Batches of images with masks: those of training are functions of (seed, step), those of evaluation have one shape."""

import itertools

import numpy as np
import pytest

from polaformer_jax.data.pipeline import train_batches
from polaformer_jax.data.segmentation.batches import eval_batches
from polaformer_jax.data.segmentation.folder_source import MaskFolderSource
from polaformer_jax.data.segmentation.transforms import EvalSegmentationTransform, TrainSegmentationTransform
from polaformer_jax.errors import UserError
from tests.support import mask_folders
from tests.support.mask_folders import SIZES


@pytest.fixture
def root(tmp_path):
    return mask_folders.write(tmp_path / "views", ("training",))


def source(root):
    return MaskFolderSource(root, "training")


def evaluation(root, batch_size=2, transform=None, **options):
    transform = transform or EvalSegmentationTransform(None, num_classes=3)
    return eval_batches(source(root), transform, batch_size=batch_size, **options)


def training(root, count, **options):
    transform = TrainSegmentationTransform(32, num_classes=3, scale=(60, 40))
    stream = train_batches(source(root), transform, **{"batch_size": 4, "seed": 3} | options)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# --- training


def test_a_batch_for_training_has_the_shapes_that_tasks_expect(root):
    (batch,) = training(root, 1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((4, 32, 32, 3), "uint8"),
        "label": ((4, 32, 32), "uint8"),
        "size": ((4, 2), "int32"),
        "mask": ((4,), "bool"),
    }


@pytest.mark.parametrize("start", [1, 5])
def test_any_batch_for_training_can_be_computed_alone(root, start):
    for one, other in zip(training(root, start + 2)[start:], training(root, 2, start=start), strict=True):
        assert_same(one, other)


def test_a_broken_image_is_named_or_skipped(root):
    (root / "images/training/01.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"training/01.jpg: corrupt image"):
        training(root, 4)
    transform = TrainSegmentationTransform(32, num_classes=3, on_error="skip")
    stream = train_batches(source(root), transform, batch_size=6, seed=0)
    batch = next(stream)
    stream.close()
    assert batch["mask"].sum() == 5
    assert (batch["label"][~batch["mask"]] == 255).all() and not batch["size"][~batch["mask"]].any()


def test_a_mask_that_does_not_fit_ends_the_run_all_the_same(root):
    (root / "annotations/training/01.png").write_bytes(mask_folders.png(np.zeros((5, 5), np.uint8)))
    transform = TrainSegmentationTransform(32, num_classes=3, on_error="skip")
    stream = train_batches(source(root), transform, batch_size=6, seed=0)
    with pytest.raises(UserError, match=r"01.jpg: the mask has 5 x 5 pixels"):
        next(stream)
    stream.close()


# --- evaluation


def test_batches_of_an_evaluation_hold_images_of_one_shape(root):
    batches = list(evaluation(root))
    shapes = [batch["image"].shape[1:3] for batch in batches]
    assert shapes == sorted(shapes, key=np.prod, reverse=True)
    assert set(shapes) == {(64, 64), (64, 32), (32, 32)}
    for batch in batches:
        assert {name: (array.shape[0], array.dtype.name) for name, array in batch.items()} == {
            "image": (2, "uint8"),
            "label": (2, "uint8"),
            "size": (2, "int32"),
            "mask": (2, "bool"),
        }
        assert batch["label"].shape[1:] == (128, 128)


def test_every_example_comes_once_and_the_order_tells_where(root):
    batches = evaluation(root, 4)
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in ("label", "size", "mask")}
    assert len(batches) * 4 == len(batches.order) == len(found["mask"])
    assert found["mask"].tolist() == (batches.order < len(SIZES)).tolist()
    assert sorted(batches.order[found["mask"]].tolist()) == [*range(len(SIZES))]
    for position in np.flatnonzero(found["mask"]):
        index = batches.order[position]
        (height, width) = SIZES[index]
        assert found["size"][position].tolist() == [height, width]
        expected = mask_folders.labels((height, width), index)
        np.testing.assert_array_equal(found["label"][position, :height, :width], expected)
    assert (found["label"][~found["mask"]] == 255).all()


def test_any_batch_of_an_evaluation_can_be_computed_alone(root):
    dataset = evaluation(root)._dataset
    for number, batch in enumerate(evaluation(root)):
        assert_same(dataset[number], batch)


def test_processes_share_a_batch(root):
    whole = list(evaluation(root, 4))
    for process in range(2):
        part = evaluation(root, 4, rows=np.array([process, process + 2]))
        for batch, share in zip(whole, part, strict=True):
            assert_same({name: array[process::2] for name, array in batch.items()}, share)


def test_a_worker_changes_nothing(root):
    batches = evaluation(root, workers=1)
    for _ in range(2):  # passes
        for one, other in zip(batches, evaluation(root), strict=True):
            assert_same(one, other)
    batches.close()


def test_test_time_scales_are_batched_together(root):
    transform = EvalSegmentationTransform(None, scales=(0.5, 1.0), num_classes=3)
    for batch in evaluation(root, transform=transform):
        assert {"image_0.5", "image_1.0"} < batch.keys() and "image" not in batch
        assert batch["image_0.5"].shape[1] in (32, 64)


def test_images_that_cannot_be_read_are_named_or_skipped(root):
    for name in ("01.jpg", "03.jpg"):
        (root / "images/training" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="0[13].jpg: corrupt image"):
        list(evaluation(root))
    transform = EvalSegmentationTransform(None, num_classes=3, on_error="skip")
    batches = evaluation(root, transform=transform)
    assert sum(int(batch["mask"].sum()) for batch in batches) == 4
    assert sorted(index for index in batches.order if index < 6) == [*range(6)]
    for path in (root / "images/training").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 6 images of views/training can be read"):
        evaluation(root, transform=transform)


def test_an_image_that_changed_its_size_is_named(root):
    batches = evaluation(root)
    (root / "images/training/00.jpg").write_bytes(mask_folders.image((90, 90)))
    (root / "annotations/training/00.png").write_bytes(mask_folders.png(mask_folders.labels((90, 90))))
    with pytest.raises(UserError, match=r"00.jpg: image is \(96, 96, 3\), but was to be \(32, 32, 3\)"):
        list(batches)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rows": np.array([2])}])
def test_rows_are_checked(root, options):
    with pytest.raises(UserError, match="batch"):
        evaluation(root, **options)
