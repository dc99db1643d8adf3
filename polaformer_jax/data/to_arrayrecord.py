"""Converts a tfds data set that is prepared as TFRecord to ArrayRecord by copying its records, byte for byte.

TFRecord files can only be read sequentially. ArrayRecord has random access, which shuffling and exact resuming need.
Nothing is decoded or downloaded; the copy keeps the shards and their order, and the old files stay.
"""

import json
import re
from collections.abc import Iterator

from etils import epath
from tqdm import tqdm

from polaformer_jax.data import tfds_source
from polaformer_jax.errors import UserError
from polaformer_jax.files import atomic, paths


def to_arrayrecord(name: str, data_dir: epath.PathLike, out_dir: epath.PathLike | None = None) -> tfds_source.Prepared:
    """Copies a prepared data set to another data directory, as ArrayRecord.

    It is written to a temporary directory (`incomplete.XXXXXX_VERSION`, tfds's name for an unfinished preparation) and
    renamed at the end: an interruption leaves nothing that counts as prepared.

    Args:
        name: `NAME[/CONFIG][:VERSION]`.
        data_dir: the directory that holds the data set as TFRecord.
        out_dir: the directory for the copy; by default `DATA_DIR-arrayrecord`, next to it.

    Raises:
        UserError: not prepared below `data_dir`, not in TFRecord format, already present below `out_dir`, damaged or
            missing files, a number of records that differs from the data set's own description, a bucket as the target,
            or a failed write.
    """
    data_dir = paths.given(data_dir, "data_dir")
    out_dir = tfds_source.arrayrecord_dir(data_dir) if out_dir is None else paths.given(out_dir, "out_dir")
    prepared = tfds_source.find_prepared(name, data_dir)
    if prepared is None:
        raise UserError(f"data set {name!r} is not prepared below {data_dir}: there is nothing to convert")
    if prepared.file_format != "tfrecord":
        needless = ": it needs no conversion" if prepared.file_format == "array_record" else ", expected tfrecord"
        raise UserError(f"data set {name!r} at {prepared.directory} is prepared as {prepared.file_format}{needless}")
    paths.check_local(out_dir, name)
    target = out_dir / prepared.directory.relative_to(data_dir)
    if target.exists():
        raise UserError(f"{target} exists already; name another directory, or remove it", argument="out_dir")
    try:
        with atomic.making(target) as aside:
            _copy(prepared.directory, aside)
    except OSError as error:
        raise UserError(f"converting {prepared.directory} to {target} failed: {error}") from error
    return tfds_source.find_prepared(name, out_dir)


def _copy(source: epath.Path, target: epath.Path) -> None:
    # tfds, and TensorFlow for reading TFRecord, take seconds to import: only once there is something to do.
    import tensorflow_datasets as tfds

    try:
        splits = tfds.builder_from_directory(source).info.splits
        shards = [
            (epath.Path(path), length)
            for split in splits.values()
            for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"the description of the data set in {source} cannot be read: {error}") from error
    total = sum(length for _, length in shards)
    with tqdm(total=total, desc=f"to ArrayRecord: {source}", unit=" records", disable=None) as progress:
        for path, length in shards:
            copied = target / path.name.replace(".tfrecord", ".array_record")
            if copied.name == path.name:
                raise UserError(f"{path} is not named *.tfrecord*: the name of its copy is not known")
            _copy_shard(path, copied, length, progress)
    # The same records may be there in other formats too, as NAME-SPLIT.FORMAT-SHARD: none of them is copied.
    record_file = re.compile(rf"\.({'|'.join(one.file_suffix for one in tfds.core.FileFormat)})(-|$)")
    for path in source.iterdir():
        if not record_file.search(path.name) and path.name != "dataset_info.json" and not path.is_dir():
            path.copy(target / path.name)
    info = json.loads((source / "dataset_info.json").read_text())
    info.pop("alternativeFileFormats", None)
    info["fileFormat"] = "array_record"
    (target / "dataset_info.json").write_text(json.dumps(info, indent=2, sort_keys=True))


def _copy_shard(source: epath.Path, target: epath.Path, length: int, progress: tqdm) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(target), "group_size:1")  # one record per group: random access
    try:
        for record in _records(source):
            writer.write(record)
            progress.update()
    finally:
        writer.close()
    reader = array_record_module.ArrayRecordReader(str(target))
    found = reader.num_records()
    reader.close()
    if found != length:
        raise UserError(
            f"{source} has {found} records, but dataset_info.json says {length}: prepare the data set again"
        )


def _records(path: epath.Path) -> Iterator[bytes]:
    """The records of a TFRecord file; TensorFlow checks the length and content of each against their checksums."""
    import tensorflow as tf

    try:
        yield from tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    except tf.errors.OpError as error:
        reason = re.sub(
            r"^.*}} | \[Op:.*$", "", error.message, flags=re.DOTALL
        )  # without the names of TensorFlow's nodes
        raise UserError(f"{path} cannot be read: {reason}. Restore it, or prepare the data set again") from error


if __name__ == "__main__":  # it was a command in version 0.1
    raise SystemExit("error: this is no command any more; use: polaformer prepare to-arrayrecord NAME --data-dir DIR")
