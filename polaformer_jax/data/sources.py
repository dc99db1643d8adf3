"""Where examples come from: one random-access interface, and the choice by config.

A source maps an index to one raw record. Batches are computed from indices alone, so a source needs no iteration order,
no state and no shuffling of its own; it travels to the worker processes by pickle.
"""

from typing import Any, Protocol, runtime_checkable

from polaformer_jax.errors import UserError

IMAGENET_EXAMPLES = 1_281_167  # of its training split, for what needs a length and has no data

Record = dict[str, Any]  # images: {"image": encoded bytes, "label": int}


@runtime_checkable
class Source(Protocol):
    """Random access to the records of one split.

    Attributes:
      name: what the split is called in messages, e.g. `sklearn_digits/test`.
      origin: where the data comes from, for people, e.g. `tfds sklearn_digits/1.0.0`.
      num_classes: labels are in `[0, num_classes)`.
      class_names: one name a class in label order; None if the data has none.
    """

    name: str
    origin: str
    num_classes: int
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; an `OSError` means that this record cannot be read, others may be fine."""
        ...

    def describe(self, index: int) -> str:
        """Names a record for messages, e.g. `sklearn_digits/test[17]`. Cheap: called for every record."""
        ...


def _open_tfds(data, split: str) -> Source:
    from polaformer_jax.data import tfds_source

    return tfds_source.TfdsSource(data.name, data_dir=data.data_dir, split=split)


def _open_folder(data, split: str) -> Source:
    from polaformer_jax.data import folder_source

    train_split = getattr(data, "train_split", "train")
    return folder_source.FolderSource(data.data_dir, split, class_split=train_split, name=data.name)


# Each opener imports its own module, so that a run pays only for the source that it uses.
_OPENERS = {"folder": _open_folder, "tfds": _open_tfds}


def open_source(data, split: str) -> Source:
    """Opens the data set that a config names; reads only, and never downloads or prepares anything.

    Args:
      data: the config's `data` part: `source` (`tfds` or `folder`), `name`, `data_dir`, and for folders `train_split`,
        whose class folders are the classes of every split.
      split: a split of that data set; for tfds, slices such as `train[:90%]` too.

    Raises:
      UserError: not prepared below `data_dir` (names the command that prepares it), not a folder of images, an unknown
        source or split, or a data set of another kind or format.
    """
    if data.source not in _OPENERS:
        raise UserError(f"data.source is {data.source!r}, expected one of: {', '.join(sorted(_OPENERS))}")
    return _OPENERS[data.source](data, split)
