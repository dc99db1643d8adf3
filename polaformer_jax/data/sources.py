"""Opens the image data set that a config names as a random-access source (see `records.Source`)."""

from polaformer_jax.data.records import Source
from polaformer_jax.errors import UserError

IMAGENET_EXAMPLES = 1_281_167  # in its training split; used where a size is needed without the data


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
    """Opens the data set that a config names; only reads, and never downloads or prepares anything.

    Args:
        data: the config's `data` part: `source` (`tfds` or `folder`), `name`, `data_dir`, and for folders
            `train_split`, whose class folders are the classes of every split.
        split: a split of that data set; for tfds, also slices such as `train[:90%]`.

    Raises:
        UserError: not prepared below `data_dir` (the message names the command that prepares it), not a folder of
            images, an unknown source or split, or a data set of another kind or format.
    """
    if data.source not in _OPENERS:
        raise UserError(f"data.source is {data.source!r}, expected one of: {', '.join(sorted(_OPENERS))}")
    return _OPENERS[data.source](data, split)
