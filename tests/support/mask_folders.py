"""A small folder of images and masks, as `MaskFolderSource` reads it."""

import io

import numpy as np
from PIL import Image

from polaformer_jax.data.segmentation.transforms import TrainSegmentationTransform

SIZES = [(20, 30), (33, 40), (20, 30), (64, 31), (20, 30), (33, 40)]  # (height, width) of the images of a split
CLASSES = ("sky", "earth", "sea")


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, "png", **options)
    return buffer.getvalue()


def image(size, seed=0, fmt="jpeg"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def labels(size, seed=0):
    """Blocks of labels, with some pixels of none."""
    found = np.random.default_rng(seed).integers(0, len(CLASSES), (-(-size[0] // 4), -(-size[1] // 4)), dtype=np.uint8)
    found[found.shape[0] // 2, 0] = 255
    return found.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]


def record(size=(20, 30), mask=None, **options):
    return {"image": image(size, **options), "mask": png(labels(size) if mask is None else mask)}


def write(root, splits=("training", "validation"), sizes=SIZES, classes=CLASSES):
    """Images `00.jpg`, ... with masks of each split, in the layout of ADE20K."""
    for split in splits:
        for number, size in enumerate(sizes):
            for folder, name, content in (
                ("images", f"{number:02}.jpg", image(size, number)),
                ("annotations", f"{number:02}.png", png(labels(size, number))),
            ):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
                (root / folder / split / name).write_bytes(content)
    if classes:
        (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def train_transform(crop_size=32, **options):
    """That of three classes, with small images."""
    return TrainSegmentationTransform(crop_size, **{"num_classes": len(CLASSES), "scale": (64, 48)} | options)
