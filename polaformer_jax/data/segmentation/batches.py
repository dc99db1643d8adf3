"""Batches of an evaluation: images of one shape together, so that none is padded or resized for the others.

Which images form a batch follows from their sizes and the transform, which every process knows; so all processes make
the same batches, and any batch can be computed alone, like those of `pipeline`. Batches for training are those of
`pipeline.train_batches`, where all examples have one shape.
"""

import functools

import grain
import numpy as np

from polaformer_jax.data.pipeline import LoadOrPad, Passes, checked_rows
from polaformer_jax.data.records import Batch, Example
from polaformer_jax.data.segmentation.resizing import Size
from polaformer_jax.data.segmentation.source import SegmentationSource
from polaformer_jax.data.segmentation.transforms import EvalSegmentationTransform
from polaformer_jax.errors import UserError


def eval_batches(
    source: SegmentationSource,
    transform: EvalSegmentationTransform,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    **options,
) -> Passes:
    """All examples of a source, each exactly once, grouped by the shapes of their arrays.

    The group of the largest shapes comes first: it needs the most memory. Within a group, examples are in the order of
    the split. The last batch of each group is padded with blank examples (`mask` False) of its shape.

    Args:
        rows: which rows of every batch this process computes; see `pipeline.train_batches`.
        options: see `workers.Stream`.

    Returns:
        Passes over dicts of arrays as `transform` makes them, with a leading dimension of `len(rows)`. Their `order` is
        (batches * batch_size,): the index in the split at each position of a pass, `len(source)` for a blank example.

    Raises:
        UserError: as `pipeline.train_batches`; none of the images can be read.
    """
    rows = checked_rows(source, batch_size, rows)
    plan = _Plan(source, transform, batch_size)
    batches = _Batches(plan, source, transform, rows)
    return Passes(grain.MapDataset.source(batches), order=plan.indices.ravel(), **options)


def largest(source: SegmentationSource, transform: EvalSegmentationTransform) -> Example:
    """A blank example with the shapes of the first batch of `eval_batches`, the largest ones."""
    return transform.blank_of(_Plan(source, transform, 1).sizes[0])


class _Plan:
    """Which examples are in a batch, and which shapes they have.

    Attributes:
        indices: (batches, batch_size); an index past the last means a blank example.
        sizes: for each batch, (height, width) of one of its stored images: they all get the same shapes.
    """

    def __init__(self, source: SegmentationSource, transform: EvalSegmentationTransform, batch_size: int):
        groups: dict[tuple[Size, ...], list[int]] = {}
        size_of: dict[tuple[Size, ...], Size] = {}
        shapes = functools.cache(lambda size: (*transform.image_sizes(size).values(), transform.label_size(size)))
        unreadable = []
        for index, size in enumerate(map(tuple, source.sizes.tolist())):
            if min(size) < 1:
                unreadable.append(index)
                continue
            groups.setdefault(shapes(size), []).append(index)
            size_of.setdefault(shapes(size), size)
        if not groups:
            raise UserError(f"none of the {len(source)} images of {source.name} can be read: {source.describe(0)}, ...")
        order = sorted(groups, key=lambda shape: (sum(height * width for height, width in shape), shape), reverse=True)
        groups[order[-1]] += unreadable  # reading one again ends the pass, or gives a blank example (`on_error`)
        indices, self.sizes = [], []
        for shape in order:
            for start in range(0, len(groups[shape]), batch_size):
                batch = groups[shape][start : start + batch_size]
                indices.append(batch + [len(source)] * (batch_size - len(batch)))
                self.sizes.append(size_of[shape])
        self.indices = np.array(indices)

    def __len__(self) -> int:
        return len(self.indices)


class _Batches:
    """Random access to some rows of each batch."""

    def __init__(
        self,
        plan: _Plan,
        source: SegmentationSource,
        transform: EvalSegmentationTransform,
        rows: np.ndarray,
    ):
        self._plan, self._source, self._transform, self._rows = plan, source, transform, rows
        self._load = LoadOrPad(source, transform)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        blank = self._transform.blank_of(self._plan.sizes[number])
        examples = [self._example(int(index), blank) for index in self._plan.indices[number][self._rows]]
        return {name: np.stack([example[name] for example in examples]) for name in blank}

    def _example(self, index: int, blank: Example) -> Example:
        example = self._load(index)
        if not example["mask"]:
            return blank
        for name, array in example.items():
            if array.shape != blank[name].shape:
                raise UserError(
                    f"{self._source.describe(index)}: {name} is {array.shape}, but was to be {blank[name].shape} by the"
                    " header of the image: has it changed meanwhile? Start again"
                )
        return example
