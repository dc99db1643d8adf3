"""Prepares a data set as ArrayRecord, once: one of tfds for image classification, or one of the Long Range Arena.

    python -m polaformer_jax.data.prepare sklearn_digits --data-dir data
    python -m polaformer_jax.data.prepare cifar10 --data-dir data                 # downloads
    python -m polaformer_jax.data.prepare imagenet2012 --data-dir data --manual-dir DIR_WITH_THE_TARS
    python -m polaformer_jax.data.prepare to-arrayrecord imagenet2012 --data-dir WITH_TFRECORDS --out-dir data
    python -m polaformer_jax.data.prepare lra_listops --data-dir data             # and others: see lra/prepare.py

Training and evaluation only ever read; this is the one place that writes data sets or uses the network. What is
prepared already is left alone. An interrupted run leaves nothing that counts as prepared: run the command again.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from etils import epath

from polaformer_jax.data import tfds_source
from polaformer_jax.errors import UserError
from polaformer_jax.files.paths import check_local


def prepare(name: str, data_dir: epath.PathLike, *, manual_dir: epath.PathLike | None = None) -> tfds_source.Prepared:
    """Prepares a data set below `data_dir`, unless it is there already.

    Args:
      name: `sklearn_digits`, or any tfds data set with the features image and label: `NAME[/CONFIG][:VERSION]`.
      data_dir: the directory that holds all prepared data sets; local, where something is to be written.
      manual_dir: where the user put files that tfds cannot download by itself (ImageNet's tars).

    Raises:
      UserError: malformed name, unknown data set, not image classification, prepared already in another format, a
        bucket to write to, or a failure on the way (download, disk, missing manual files).
    """
    found = tfds_source.find_prepared(name, data_dir)
    if found is None:
        check_local(data_dir, name)
        _build(name, epath.Path(data_dir).expanduser(), manual_dir)
        found = tfds_source.find_prepared(name, data_dir)
        if found is None:
            raise UserError(f"tfds reported success but {name!r} is not to be found below {data_dir}")
    elif found.file_format != "array_record":
        raise UserError(tfds_source.tfrecord_message(found, name, data_dir))
    return found


def _build(name: str, data_dir: epath.Path, manual_dir: epath.PathLike | None) -> None:
    # TensorFlow is imported on the way, which takes seconds: not before it is known that there is something to do.
    import tensorflow_datasets as tfds

    from polaformer_jax.data import digits  # noqa: F401  registers sklearn_digits with tfds

    if manual_dir is not None and not epath.Path(manual_dir).expanduser().is_dir():
        raise UserError(f"--manual-dir {manual_dir} is not a directory")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"tfds has no data set {name!r}: {error}") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        raise UserError(f"tfds refuses {name!r}: {error}") from error
    if not name.startswith("imdb_reviews"):  # of which `lra_text` is made
        tfds_source.check_features(builder.info.features, name)  # before hours of downloading
    manual = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    if manual and manual_dir is None:
        raise UserError(f"{name!r} needs files that you must fetch yourself, and --manual-dir:\n{manual.strip()}")
    config = tfds.download.DownloadConfig(
        manual_dir=manual_dir and epath.Path(manual_dir).expanduser(),
        try_download_gcs=False,  # there are only TFRecord files
    )
    try:
        builder.download_and_prepare(download_dir=data_dir / "downloads", download_config=config)
    except Exception as error:
        if tfds_source.find_prepared(name, data_dir):
            return  # another process was preparing it too, and was faster
        raise UserError(f"preparing {name!r} failed: {type(error).__name__}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "to-arrayrecord":  # no data set can have this name
        from polaformer_jax.data import to_arrayrecord

        return to_arrayrecord.main(argv[1:])
    if argv and argv[0].startswith("lra_"):
        from polaformer_jax.data.lra import prepare as lra_prepare

        return lra_prepare.main(argv)
    parser = argparse.ArgumentParser(
        prog="python -m polaformer_jax.data.prepare",
        description="Prepares a tfds image-classification data set.",
        epilog="'to-arrayrecord NAME --data-dir D [--out-dir O]' converts one that is prepared as TFRecord; "
        "lra_listops, lra_listops_short, lra_pathfinder, lra_text, lra_image and lra_retrieval have a --help of their "
        "own.",
    )
    parser.add_argument("name", metavar="NAME", help="sklearn_digits, or a tfds data set: NAME[/CONFIG][:VERSION]")
    parser.add_argument("--data-dir", required=True, help="where prepared data sets live, e.g. data")
    parser.add_argument("--manual-dir", help="directory with files fetched by hand, e.g. ImageNet's tars")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        before = tfds_source.find_prepared(args.name, args.data_dir)
        prepared = prepare(args.name, args.data_dir, manual_dir=args.manual_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = "already prepared" if before else f"prepared in {time.monotonic() - begin:.0f} s"
    # The counts tell whether a split is missing: tfds goes on without ImageNet's validation tar, with a mere warning.
    splits = ", ".join(f"{split} {count}" for split, count in prepared.splits.items())
    print(f"{args.name} is {state}: {prepared.directory} ({splits})")
    leftovers = sorted(prepared.directory.parent.glob("incomplete.*"))
    if leftovers:
        print("an interrupted preparation left these, which may be deleted:", *leftovers, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
