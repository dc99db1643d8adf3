"""scikit-learn's handwritten digits as a tfds data set: 1,797 real images that need no download.

Prepared and read exactly like ImageNet, so that the smallest run takes the same code path as the largest.
"""

import hashlib
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NUM_TEST = 360

_DESCRIPTION = """\
The handwritten digits that scikit-learn ships (`sklearn.datasets.load_digits`): 1,797 grey images of 8 by 8 pixels, a
copy of the test set of the UCI ML "Optical Recognition of Handwritten Digits" data set. Intensities 0 to 16 become 0
to 255. Split into 1,437 training and 360 test images, stratified by class.

Licence: Creative Commons Attribution 4.0 International (CC BY 4.0); E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository.
"""

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}"""


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `sklearn_digits` (image (8, 8, 1) uint8 as PNG, label 0 to 9)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images, digits.target  # (1797, 8, 8) float of 0 to 16, (1797,)
        test = test_indices(labels)
        train = np.setdiff1d(np.arange(len(labels)), test)
        return {"train": self._examples(images, labels, train), "test": self._examples(images, labels, test)}

    def _generate_examples(self):  # the splits' generators are given above
        raise NotImplementedError

    def _examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray):
        for index in indices:
            yield int(index), {"image": io.BytesIO(_png(images[index])), "label": int(labels[index])}


def test_indices(labels: np.ndarray) -> np.ndarray:
    """Indices of the 360 test examples, ascending: each class's share, chosen within the class by a hash of the index.

    Shares are rounded by largest remainder. No library's random generator is used, so that the split is the same for
    every version of NumPy and scikit-learn.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * NUM_TEST, counts.sum())  # integers: no rounding to depend on
    for position in np.argsort(-remainders, kind="stable")[: NUM_TEST - quotas.sum()]:
        quotas[position] += 1
    chosen = []
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        chosen += sorted(members, key=lambda index: hashlib.sha256(str(index).encode()).digest())[:quota]
    return np.sort(np.array(chosen))


def _png(intensities: np.ndarray) -> bytes:
    """Encodes an (8, 8) image of intensities 0 to 16 as an 8-bit grey PNG, 16 becoming 255."""
    pixels = (intensities.astype(np.int64) * 255 + 8) // 16  # rounded to nearest
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="png")
    return buffer.getvalue()
