"""Files and folders that are written completely or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from polaformer_jax.errors import UserError
from polaformer_jax.files import paths

_TRIED = 4096  # bytes; an empty file can be written to a full disk


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes to a temporary file, then renames it: a reader sees the old file or the new one, never a part.

    Args:
        path: local or in a bucket (`gs://`), see `paths.given`. Its folder is created if it is missing.
        content: text is encoded as UTF-8.
    """
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A file to write in parts. It is renamed to `path` if the context ends without an error, and otherwise removed."""
    path = paths.given(path)
    make_folder(path.parent)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def reported(kind: str, path: epath.PathLike, *, argument: str | None = None) -> Iterator[None]:
    """Context that writes a file which a user requested: a failure becomes a UserError that names it.

    Args:
        kind: what the file is, e.g. `table`.
        argument: the name of the parameter that the path is the value of.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # buckets have exceptions of their own
        raise UserError(f"{kind} {os.fspath(path)!r} cannot be written: {error}", argument=argument) from error


def check_target(path: epath.PathLike, kind: str, *, argument: str | None = None) -> epath.Path:
    """Tries to write where a file will be written after long work, so that this does not fail then.

    Args:
        path: of the file. Its folder is created if it is missing; a file that exists is left unchanged.
        kind: as for `reported`.
        argument: the name of the parameter that it is the value of.

    Returns:
        The path, see `paths.given`.

    Raises:
        UserError: it is a folder, a device or a pipe, or cannot be written.
    """
    path = paths.given(path, argument)
    with reported(kind, path, argument=argument):
        if path.is_dir():
            raise UserError(f"{os.fspath(path)} is a folder: name a file", argument=argument)
        if not paths.in_bucket(path) and path.exists() and not os.path.isfile(path):  # it would be replaced by a file
            raise UserError(f"{os.fspath(path)} is no regular file: name a file", argument=argument)
        make_folder(path.parent)
        if not paths.in_bucket(path):  # where a name that exists for a moment could be read, kept or paid for
            probe = path.parent / f".{path.name}.{uuid.uuid4().hex}"
            try:
                probe.write_bytes(bytes(_TRIED))
            finally:
                probe.unlink(missing_ok=True)
    return path


def make_folder(path: epath.Path) -> None:
    """Creates a folder and its parents where they are missing.

    Raises:
        FileNotFoundError: the bucket does not exist (TensorFlow would keep looking for it forever).
    """
    if paths.in_bucket(path):
        bucket = epath.Path("/".join(os.fspath(path).split("/")[:3]))
        if not bucket.exists():
            raise FileNotFoundError(f"there is no bucket {bucket}")
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def making(target: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill. It is renamed to `target` if the context ends without an error, and otherwise removed.

    Until then it is called `incomplete.XXXXXX_NAME`, as tensorflow-datasets calls what it is writing.
    """
    target = paths.given(target)
    aside = target.parent / f"incomplete.{uuid.uuid4().hex[:6].upper()}_{target.name}"
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    finally:  # after an interruption from the keyboard too
        if aside.exists():
            aside.rmtree()
