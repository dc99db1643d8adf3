"""Local paths and paths in a bucket (`gs://`), and what each kind supports."""

import os

from etils import epath

from polaformer_jax.errors import UserError


def absolute(path: epath.Path) -> epath.Path:
    """An absolute path. One in a bucket is absolute already, and `resolve` would make it a local one."""
    return path if "://" in os.fspath(path) else path.resolve()


def check_checkpoint_client(path: epath.Path) -> None:
    """Raises a UserError for a `gs://` path if google-cloud-storage, by which Orbax queries buckets, is missing."""
    if os.fspath(path).startswith("gs://"):
        try:
            import google.cloud.storage  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{path}: checkpoints in a bucket need google-cloud-storage ({error}):"
                ' pip install "polaformer_jax[gcs]"'
            ) from error


def check_local(data_dir: epath.PathLike, name: str) -> None:
    """Raises a UserError if the data set `name` is to be written to a bucket: array_record can only read there."""
    folder = os.fspath(data_dir)
    if "://" in folder:
        raise UserError(
            f"{name} cannot be written to {folder}: array_record reads from a bucket, but writes local files only. "
            f"Give a local folder, then copy it:\n  gcloud storage cp -r 'LOCAL_FOLDER/*' {folder}/"
        )
