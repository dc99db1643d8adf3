"""Data sets are read from local folders and from buckets, and written to local folders only."""

import os

from etils import epath

from polaformer_jax.errors import UserError


def check_local(data_dir: epath.PathLike, name: str) -> None:
    """Raises a UserError where the data set `name` is to be written to a bucket: array_record can only read there."""
    folder = os.fspath(data_dir)
    if "://" in folder:
        raise UserError(
            f"{name} cannot be written to {folder}: array_record reads from a bucket, but writes local files only. "
            f"Give a local folder, then copy it:\n  gcloud storage cp -r 'LOCAL_FOLDER/*' {folder}/"
        )
