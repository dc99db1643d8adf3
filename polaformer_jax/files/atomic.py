"""Files and folders that are there whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes aside, then renames: a reader sees the old file or the new one, never a part.

    Args:
      path: local or in a bucket (`gs://`). Its folder is made where it lacks.
      content: text is encoded as UTF-8.
    """
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A file to write in parts. It takes its place when the context ends without an error, and else leaves no trace."""
    path = epath.Path(path)
    make_folder(path.parent)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def make_folder(path: epath.Path) -> None:
    """Makes a folder, and those above it, where it lacks.

    Raises:
      FileNotFoundError: in a bucket that there is not (TensorFlow would go on looking for it for ever).
    """
    name = os.fspath(path)
    if "://" in name:
        bucket = epath.Path("/".join(name.split("/")[:3]))
        if not bucket.exists():
            raise FileNotFoundError(f"there is no bucket {bucket}")
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def making(target: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill. It takes its place when the context ends without an error, and else leaves no trace.

    Until then it is called `incomplete.XXXXXX_NAME`, as tensorflow-datasets calls what it is writing.
    """
    target = epath.Path(target)
    aside = target.parent / f"incomplete.{uuid.uuid4().hex[:6].upper()}_{target.name}"
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    finally:  # after an interruption from the keyboard too
        if aside.exists():
            aside.rmtree()
