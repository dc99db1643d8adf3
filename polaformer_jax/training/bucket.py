"""What is different about checkpoints in a bucket."""

import os

from etils import epath

from polaformer_jax.errors import UserError


def absolute(path: epath.Path) -> epath.Path:
    """A path from the root. One in a bucket is that already, and `resolve` would make a local one of it."""
    return path if "://" in os.fspath(path) else path.resolve()


def check_client(path: epath.Path) -> None:
    """Raises a UserError where the client lacks by which Orbax asks what kind of bucket it has before it."""
    if os.fspath(path).startswith("gs://"):
        try:
            import google.cloud.storage  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{path}: checkpoints in a bucket need google-cloud-storage ({error}):"
                ' python -m pip install -e ".[gcs]"'
            ) from error
