"""Prepares tfds data sets of images, with labels or masks, as ArrayRecord. The one place that uses the network.

A data set that is already prepared is left unchanged. An interrupted preparation leaves nothing that counts as
prepared.
"""

import contextlib

from etils import epath

from polaformer_jax.data import archives, tfds_source
from polaformer_jax.data.segmentation import tfds_source as mask_source
from polaformer_jax.errors import UserError
from polaformer_jax.files import paths


def prepare(name: str, data_dir: epath.PathLike, *, manual_dir: epath.PathLike | None = None) -> tfds_source.Prepared:
    """Prepares a data set below `data_dir`, unless it is already prepared there.

    Args:
        name: `sklearn_digits`, `digit_scenes`, `ade20k`, or any tfds data set with the features image and label, or
            image and mask: `NAME[/CONFIG][:VERSION]`.
        data_dir: the directory that holds all prepared data sets; must be local if something has to be written.
        manual_dir: the directory of files that tfds cannot download by itself (ImageNet's tar files, ADE20K's archive),
            or of those that it would download: it verifies their checksums, and nothing is downloaded then.

    Raises:
        UserError: malformed name, unknown data set, other features, already prepared in another format, a
            bucket as the target, files in `manual_dir` that are missing or not the registered ones, or a failure during
            preparation (download, disk).
    """
    data_dir = paths.given(data_dir, "data_dir")
    manual_dir = None if manual_dir is None else paths.given(manual_dir, "manual_dir")
    found = tfds_source.find_prepared(name, data_dir)
    if found is None:
        paths.check_local(data_dir, name)
        _build(name, data_dir, manual_dir)
        found = tfds_source.find_prepared(name, data_dir)
        if found is None:
            raise UserError(f"tfds reported success but {name!r} is not found below {data_dir}")
    elif found.file_format != "array_record":
        raise UserError(tfds_source.tfrecord_message(found, name, data_dir))
    return found


def _build(name: str, data_dir: epath.Path, manual_dir: epath.Path | None) -> None:
    # This imports TensorFlow, which takes seconds: only once it is known that there is something to do.
    import tensorflow_datasets as tfds

    # Importing them registers sklearn_digits, ade20k and digit_scenes with tfds.
    from polaformer_jax.data import digits  # noqa: F401
    from polaformer_jax.data.segmentation import ade20k, digit_scenes  # noqa: F401

    if manual_dir is not None and not manual_dir.is_dir():
        raise UserError(f"{manual_dir} is not a directory", argument="manual_dir")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"tfds has no data set {name!r}: {error}") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        raise UserError(f"tfds refuses {name!r}: {error}") from error
    if not name.startswith("imdb_reviews"):  # from which `lra_text` is made
        _check_features(builder.info.features, name)  # before hours of downloading
    manual = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    if manual and manual_dir is None:
        raise UserError(
            f"{name!r} needs files that you must fetch yourself; name their directory:\n{manual.strip()}",
            argument="manual_dir",
        )
    downloads = data_dir / "downloads"
    given = None
    if manual_dir is not None and not manual:
        given = archives.Archives(name, manual_dir, getattr(builder, "url_infos", None))
    config = tfds.download.DownloadConfig(
        manual_dir=None if given else manual_dir,
        extract_dir=given.extract_dir(downloads) if given else None,
        try_download_gcs=False,  # there are only TFRecord files
    )
    try:
        with given.offered_to(builder) if given else contextlib.nullcontext():
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except Exception as error:
        if tfds_source.find_prepared(name, data_dir):
            return  # another process was preparing it too, and was faster
        if given and given.refused:
            raise given.refused from error
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"preparing {name!r} failed: {reason}") from error


def _check_features(features, name: str) -> None:
    if "mask" in tfds_source.feature_dict(features):
        mask_source.check_features(features, name)
    else:
        tfds_source.check_features(features, name)


if __name__ == "__main__":  # it was a command in version 0.1
    raise SystemExit("error: this is no command any more; use: polaformer prepare NAME --data-dir DIR")
