"""Files that are there whole or not at all."""

import uuid

from etils import epath


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes aside, then renames: a reader sees the old file or the new one, never a part.

    Args:
      path: local or in a bucket (`gs://`). Its folder is made where it lacks.
      content: text is encoded as UTF-8.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
