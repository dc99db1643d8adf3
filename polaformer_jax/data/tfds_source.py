"""Prepared TensorFlow Datasets as a random-access source, without TensorFlow and without the network.

tfds lays a prepared data set out as `DATA_DIR/NAME[/CONFIG]/VERSION/`, with its features and splits in JSON files. The
directory is found here rather than by `tfds.builder(name)`, which would need the data set's own code and TensorFlow.
"""

import hashlib
import json
import re
from typing import NamedTuple

import numpy as np
from etils import epath

from polaformer_jax.data.records import Record
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.files.names import shown

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
        directory: `DATA_DIR/NAME[/CONFIG]/VERSION`.
        file_format: the format of its record files: `array_record`, `tfrecord`, ...
        splits: the number of examples in each split.
    """

    directory: epath.Path
    file_format: str
    splits: dict[str, int]


def prepare_command(name: str, data_dir: epath.PathLike) -> str:
    """The shell command that prepares a data set."""
    return f"polaformer prepare {name} --data-dir {data_dir}"


def find_prepared(name: str, data_dir: epath.PathLike) -> Prepared | None:
    """Finds the newest prepared version of a data set; does not import tfds.

    Args:
        name: `NAME`, `NAME/CONFIG`, `NAME:VERSION` or `NAME/CONFIG:VERSION`.
        data_dir: the directory that holds all prepared data sets.

    Returns:
        The data set; None if there is no complete one (leftovers of an interrupted preparation do not count).

    Raises:
        UserError: `name` is not of this form, or does not say which of several configs is meant.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"data set name {name!r}, expected NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION")
    root = paths.given(data_dir, "data_dir") / match["name"]
    if match["config"]:
        root = root / match["config"]
    directories = _versions(root)
    if not directories and not match["config"] and root.is_dir():
        configs = sorted(path.name for path in root.iterdir() if path.is_dir() and _versions(path))
        if len(configs) > 1:
            choices = ", ".join(f"{match['name']}/{config}" for config in configs)
            raise UserError(f"data set {name!r} is prepared in several configs below {root}, choose one: {choices}")
        if configs:
            directories = _versions(root / configs[0])
    if match["version"]:
        directories = [path for path in directories if path.name == match["version"]]
    if not directories:
        return None
    newest = max(directories, key=lambda path: tuple(int(part) for part in path.name.split(".")))
    try:
        info = dict(json.loads((newest / "dataset_info.json").read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{newest / 'dataset_info.json'} is damaged ({error}): prepare the data set again") from error
    formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    splits = {split["name"]: sum(int(n) for n in split.get("shardLengths", [])) for split in info.get("splits", [])}
    return Prepared(newest, "array_record" if "array_record" in formats else formats[0], splits)


def arrayrecord_dir(data_dir: epath.PathLike) -> epath.Path:
    """The data directory that `prepare to-arrayrecord` writes to by default."""
    path = paths.given(data_dir, "data_dir")
    return path.parent / f"{path.resolve().name}-arrayrecord"


def tfrecord_message(prepared: Prepared, name: str, data_dir: epath.PathLike) -> str:
    """The message about a data set whose records cannot be read in random order, and how to fix it."""
    found = (
        f"data set {name!r} at {prepared.directory} is prepared as {prepared.file_format}, which has no random access; "
        "array_record is needed. "
    )
    if prepared.file_format != "tfrecord":
        return f"{found}Prepare it again into another folder:\n  {prepare_command(name, 'OTHER_DATA_DIR')}"
    out_dir = arrayrecord_dir(data_dir)
    command = f"{prepare_command(f'to-arrayrecord {name}', data_dir)} --out-dir {out_dir}"
    return f"{found}Convert it, which copies the records, then use data.data_dir={out_dir}:\n  {command}"


def _versions(root: epath.Path) -> list[epath.Path]:
    if not root.is_dir():
        return []
    # A directory that is being written is called `incomplete.XXXXXX_VERSION` until it is finished.
    return [p for p in root.iterdir() if _VERSION.fullmatch(p.name) and (p / "dataset_info.json").exists()]


class TfdsRecords:
    """One split of a prepared tfds data set; the base of sources, which say what its features and records are.

    Opening takes about half a second, most of it the import of tfds; a worker process that unpickles a source opens it
    again.

    Raises:
        UserError: not prepared (the message names the command), prepared in a format without random access, other
            features than needed, or no such split.
    """

    def __init__(self, name: str, *, data_dir: epath.PathLike, split: str):
        prepared = find_prepared(name, data_dir)
        if prepared is None:
            raise UserError(
                f"data set {name!r} is not prepared below {data_dir}. Prepare it once:\n"
                f"  {prepare_command(name, data_dir)}"
            )
        if prepared.file_format != "array_record":
            raise UserError(tfrecord_message(prepared, name, data_dir))
        self._directory = str(prepared.directory)
        self._split = split
        self.name = f"{name}/{split}"
        self._open()

    def _use(self, info) -> object:
        """Checks the features and keeps what they say of the classes; returns what the digest holds of these.

        Args:
            info: tfds's `DatasetInfo`.
        """
        raise NotImplementedError

    def _open(self):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._directory)
        self.origin = f"tfds {builder.info.full_name}"
        classes = self._use(builder.info)
        # tfds checks a split's name only when it is used, and raises several exception types; slices are allowed.
        try:
            length = builder.info.splits[self._split].num_examples
        except Exception as error:
            raise UserError(
                f"split {self._split!r} of {self._directory} cannot be read, expected one of "
                f"{', '.join(sorted(builder.info.splits))}, or a slice such as 'train[:90%]'"
            ) from error
        if not length:
            raise UserError(f"split {self._split!r} of {self._directory} has no examples")
        self.digest = _digest(builder.info, self._split, classes)
        # No image is decoded here, neither `image` nor any other image feature that the data set may have.
        images = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
        self._records = builder.as_data_source(
            split=self._split, decoders={name: tfds.decode.SkipDecoding() for name in images}
        )

    def __getstate__(self):
        return {"_directory": self._directory, "_split": self._split, "name": self.name}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._records)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class TfdsSource(TfdsRecords):
    """One split of any prepared tfds data set with the features `image` and `label` (see `records.Source`).

    Records hold the image as it is stored (encoded bytes). Errors as in `TfdsRecords`.
    """

    def _use(self, info) -> list[str]:
        label = check_features(info.features, self.name)
        self.num_classes = label.num_classes
        self.class_names = tuple(map(shown, label.names)) if label.names else None
        return label.names

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        return {"image": record["image"], "label": int(record["label"])}


def _digest(info, split: str, classes: object) -> str:
    """Of names and sizes of what a split reads: the same wherever the data set is, and whatever other splits it has."""
    parts = [part for name, part in sorted(info.splits.items()) if re.search(rf"\b{re.escape(name)}\b|\ball\b", split)]
    sizes = [[part.name, list(part.shard_lengths), part.num_bytes] for part in parts]
    return hashlib.sha256(json.dumps([info.full_name, split, sizes, classes]).encode()).hexdigest()


def check_features(features, name: str):
    """Returns the label feature of an image-classification data set.

    Raises:
        UserError: no 8-bit `image` or no class `label` among the features, which the message lists.
    """
    import tensorflow_datasets as tfds

    found = feature_dict(features)
    label = found.get("label")
    if not isinstance(found.get("image"), tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"data set {name!r} is not for image classification: expected the features image (Image) and label "
            f"(ClassLabel), found {listed(features)}"
        )
    check_image(found["image"], name)
    return label


def check_image(image, name: str) -> None:
    """Raises a UserError if an image feature is not of 8 bits."""
    if image.np_dtype != np.uint8:
        raise UserError(f"data set {name!r} has images of {np.dtype(image.np_dtype)}, expected uint8")


def feature_dict(features) -> dict:
    """The features of a data set by name; empty if it has a single one without a name."""
    import tensorflow_datasets as tfds

    return dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}


def listed(features) -> str:
    """Features for a message: their names and kinds."""
    found = sorted(feature_dict(features).items())
    return ", ".join(f"{key} ({type(feature).__name__})" for key, feature in found) or str(features)
