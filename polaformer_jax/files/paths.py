"""Paths that users give, local or in a bucket (`gs://`): one function expands and checks them, `given`."""

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from etils.epath.gpath import PosixGPath

from polaformer_jax.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:/+)")
_PATTERN = re.compile(r"[*?\[]")


class LocalPath(PosixGPath):
    """A local path below which a glob takes the path's own characters literally.

    In the folder `runs[1]`, the `glob` of `epath.Path` would look into a folder `runs1`. Orbax keeps the class of the
    folder that it is given, so that its own globs are those of this class.
    """

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        for name in sorted(glob.glob(pattern, root_dir=os.fspath(self))):
            yield self / name


def given(path: epath.PathLike, argument: str | None = None) -> epath.Path:
    """A path that a user gave: `~` is expanded, and it is known to be local or in a bucket.

    Args:
        path: a string, or anything with `__fspath__`.
        argument: the name of the parameter, or of the field of the config, that it is the value of.

    Raises:
        UserError: it is empty, in another kind of storage, below the home folder of an unknown user, or no text.
    """
    if isinstance(path, LocalPath):  # checked before; its text may begin with a `~` that is the name of a folder
        return path
    text = os.fspath(path)
    if not isinstance(text, str):
        raise UserError(f"{text!r}: expected a path as text", argument=argument)
    if not text.strip():
        raise UserError(
            "the path is empty: is it made from a variable that is not set? Give . for the current folder",
            argument=argument,
        )
    if "\0" in text:
        raise UserError(f"{text!r}: a path cannot hold a zero byte", argument=argument)
    if match := _SCHEME.match(text):
        return _in_bucket(text, *match.groups(), argument)
    if not text.startswith("~"):
        return LocalPath(text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{text}: the home folder is not known (no HOME, or no such user). Give the whole path, or ./{text} for a"
            " folder of that name",
            argument=argument,
        )
    return LocalPath(expanded)


def _in_bucket(text: str, scheme: str, slashes: str, argument: str | None) -> epath.Path:
    if scheme != "gs":
        raise UserError(
            f"{text}: {scheme}:// is not supported; expected a local path, or one in a bucket of Google Cloud Storage"
            " (gs://BUCKET/...). Mount or copy the files, and give the local path",
            argument=argument,
        )
    if slashes != "://" or not text.removeprefix("gs://").strip("/"):
        raise UserError(f"{text}: expected gs://BUCKET/...", argument=argument)
    if _PATTERN.search(text):
        raise UserError(f"{text}: in a bucket, a path without the characters * ? [ is needed", argument=argument)
    return epath.Path(text)


def user_cache() -> str:
    """The folder for what is kept to save time: that of the user, or of this machine for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # neither HOME nor an entry in the list of users, as in many containers
        cache = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return os.path.join(cache, "polaformer_jax")


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path that `given` returned is in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """An absolute path. One in a bucket is absolute already, and `resolve` would make it a local one."""
    return path if in_bucket(path) else path.resolve()


class Held:
    """Tells whether a folder is still in its place, or was moved and made anew. In a bucket it only exists or not.

    It is held open: otherwise some network drives give the same folder another number after a while.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._descriptor = None if in_bucket(folder) else os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def is_in_place(self) -> bool:
        if self._descriptor is None:
            return self._folder.is_dir()
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._folder))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_checkpoint_client(path: epath.Path) -> None:
    """Raises a UserError for a `gs://` path if google-cloud-storage, by which Orbax queries buckets, is missing."""
    if in_bucket(path):
        try:
            import google.cloud.storage  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{path}: checkpoints in a bucket need google-cloud-storage ({error}):"
                ' pip install "polaformer_jax[gcs]"'
            ) from error


def data_folder(root: epath.PathLike, *, expected: str) -> Path:
    """The folder of a data set of image files, the value of `data_dir`.

    Args:
        expected: what should be there, for the error.

    Raises:
        UserError: it is in a bucket, or does not exist.
    """
    root = given(root, "data_dir")
    if in_bucket(root):
        raise UserError(
            f"data folder {root}: a folder of images must be local (mount it, or copy it). From a bucket, read a data"
            " set prepared with tfds: data.source=tfds"
        )
    folder = Path(os.path.abspath(root))
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; expected {expected}")
    return folder


def check_local(data_dir: epath.PathLike, name: str) -> None:
    """Raises a UserError if the data set `name` is to be written to a bucket: array_record can only read there."""
    if in_bucket(data_dir):
        folder = os.fspath(data_dir)
        raise UserError(
            f"{name} cannot be written to {folder}: array_record reads from a bucket, but writes local files only. "
            f"Give a local folder, then copy it:\n  gcloud storage cp -r 'LOCAL_FOLDER/*' {folder}/"
        )
