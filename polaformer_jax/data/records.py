"""The types of the input pipeline: records of a source, examples made of them, and batches.

A source maps an index to one raw record. Batches are computed from indices only, so a source needs no iteration order,
no state and no shuffling of its own; it is pickled to the worker processes.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from polaformer_jax.errors import UserError

Record = dict[str, Any]  # for images: {"image": encoded bytes, "label": int}
Example = dict[str, Any]  # arrays of fixed shapes and dtypes, and `mask`, False for padding
Batch = dict[str, np.ndarray]  # examples stacked along a leading axis
OnError = Literal["stop", "skip"]


class CorruptRecordError(UserError):
    """A record whose content cannot be decoded."""


@runtime_checkable
class Source(Protocol):
    """Random access to the records of one split.

    Attributes:
        name: what the split is called in messages, e.g. `sklearn_digits/test`.
        origin: human-readable description of where the data comes from, e.g. `tfds sklearn_digits/1.0.0`.
        digest: a text that changes when other records, or in another order, are read; the same wherever they are.
        num_classes: labels are in `[0, num_classes)`.
        class_names: one name for each class in label order, such as can be printed; None if the data has none.
    """

    name: str
    origin: str
    digest: str
    num_classes: int
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; an `OSError` means that this record cannot be read, others may be readable."""
        ...

    def describe(self, index: int) -> str:
        """Names a record for messages, e.g. `sklearn_digits/test[17]`. Cheap: called for every record."""
        ...


class Transform(Protocol):
    """Turns a raw record into an example of fixed shapes and dtypes.

    Attributes:
        on_error: what happens with a record that cannot be read or decoded: `stop` ends the run with an error that
            names it, `skip` replaces it by a blank example and logs its name.
    """

    on_error: OnError

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example: ...

    def blank(self, label: int = 0) -> Example:
        """An example of zeros with `mask` False: padding, or the replacement of a skipped record, with its label."""
        ...


def check_label(label: int, num_classes: int) -> np.int32:
    """The label as int32.

    Raises:
        UserError: the label is outside `[0, num_classes)`. Never skipped: it means that data and model do not match.
    """
    if not 0 <= label < num_classes:
        raise UserError(f"label {label} is outside the {num_classes} classes (expected 0 to {num_classes - 1})")
    return np.int32(label)
