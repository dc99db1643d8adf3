"""Files that a user has already, given to a builder of tfds in place of downloads.

tfds registers the name, size and SHA-256 of what it downloads, and takes a file with that name from its `manual_dir`.
Here these files are checked before the work begins, and nothing is downloaded beside them. tfds verifies each file that
it takes once more.

A gzip file from a Linux distribution may have lost the name and the time in its header, which builds leave out to be
reproducible: other bytes with the same content. For known files the original header is put back, in a copy; whether
that is the original file is decided by its SHA-256 alone.
"""

import contextlib
import hashlib
import os
import stat
import struct
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

from etils import epath
from tqdm import tqdm

from polaformer_jax.errors import UserError
from polaformer_jax.files import paths
from polaformer_jax.files.names import shown

_CHUNK = 1 << 20  # bytes
_NAMED = 8  # entries of a list in a message; some data sets have thousands of files
_WAY_OUT = "or give no folder, and all files are downloaded"

# A header of gzip: magic, method, flags, time (4 bytes), flags of the compressor, operating system.
_HEADER = 10  # bytes
_NO_NAME = b"\x1f\x8b\x08\x00"
_WITH_NAME = b"\x1f\x8b\x08\x08"
# The time in the header of original files, in seconds since 1970, by their SHA-256.
ORIGINAL_TIMES = {
    # Fashion-MNIST, which Debian has as the package dataset-fashion-mnist
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84": 1504176606,  # train-images-idx3-ubyte.gz
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845": 1504176606,  # train-labels-idx1-ubyte.gz
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073": 1504176627,  # t10k-images-idx3-ubyte.gz
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5": 1504176627,  # t10k-labels-idx1-ubyte.gz
}

# Methods of tfds's download manager that are replaced: which file is given, and what is done about one that is not.
_TAKEN_OVER = ("_get_manually_downloaded_path", "_download")

# What tfds knows of a file: the name, or None, and the SHA-256. Two files may be the same but for their names.
_Key = tuple[str | None, str]


class Archives:
    """The files in a folder that tfds has registered for a data set, which are checked.

    Args:
        name: of the data set.
        folder: local or in a bucket; it is only read.
        registered: what tfds has registered of each URL: `size`, `checksum` (SHA-256) and `filename`
            (`builder.url_infos`).

    Attributes:
        refused: the error about a file that tfds asked for and that is not there; tfds may raise another one for it.

    Raises:
        UserError: the folder cannot be read or holds none of the files; a file is not the registered one, or cannot be
            read. The message lists all of these files.
    """

    def __init__(self, name: str, folder: epath.Path, registered: Mapping | None):
        self.refused: UserError | None = None
        self._name, self._folder, self._registered = name, folder, dict(registered or {})
        self._where = shown(os.fspath(folder))
        if not self._registered:
            raise UserError(f"{name!r} takes no files: tfds has registered none for it", argument="manual_dir")
        self._files: dict[_Key, epath.Path] = {}
        self._headers: dict[_Key, bytes] = {}  # to be put back
        try:
            self._there = sorted(path.name for path in folder.iterdir())
        except Exception as error:  # buckets have exceptions of their own
            raise UserError(f"{self._where} cannot be read: {error}", argument="manual_dir") from error
        urls = defaultdict(list)
        for url in self._registered:
            urls[self._file_name(url)].append(url)
        problems = [problem for file in self._there if file in urls and (problem := self._check(file, urls[file]))]
        if problems:
            raise UserError("\n".join([*problems, f"Replace them, {_WAY_OUT}."]), argument="manual_dir")
        if not self._files:
            lines = [f"{self._where} has none of the files that tfds knows of {name!r}:"]
            lines += [self._described(self._registered), self._what_is_there(), f"Put them there, {_WAY_OUT}."]
            raise UserError("\n".join(lines), argument="manual_dir")

    def extract_dir(self, downloads: epath.Path) -> epath.Path:
        """The folder to unpack these files to, and no others.

        tfds names what it unpacked by the name of the archive alone, and takes it again: MNIST, Fashion-MNIST and
        KMNIST have archives of the same names.
        """
        known = sorted(f"{path.name} {sha256}" for (_, sha256), path in self._files.items())
        digest = hashlib.sha256("\n".join(known).encode()).hexdigest()
        return downloads / "extracted" / f"given-{digest[:16]}"

    @contextlib.contextmanager
    def offered_to(self, builder) -> Iterator[None]:
        """Context in which a builder of tfds takes these files, and downloads nothing.

        Restored files are in a temporary folder meanwhile, named as tfds names what it has not finished. Earlier
        downloads are used, too. What a builder fetches without URLs (from Kaggle) or by itself is not prevented.
        """
        files = dict(self._files)
        with contextlib.ExitStack() as stack:
            if self._headers:
                parent = epath.Path(builder.data_dir).parent
                parent.mkdir(parents=True, exist_ok=True)
                aside = tempfile.TemporaryDirectory(prefix="incomplete.", suffix="_archives", dir=parent)
                restored = epath.Path(stack.enter_context(aside))
                for key, header in self._headers.items():
                    files[key] = restored / self._files[key].name
                    with files[key].open("wb") as file:
                        file.writelines(_chunks(self._files[key], header))

            # tfds has no option for this. Its manager asks `_get_manually_downloaded_path` first, then looks for an
            # earlier download, and then calls `_download`.
            make = builder._make_download_manager

            def make_manager(*args, **kwargs):
                manager = make(*args, **kwargs)
                if not all(hasattr(manager, name) for name in _TAKEN_OVER):
                    self.refused = UserError(
                        f"this version of tensorflow-datasets has no {' or '.join(_TAKEN_OVER)}: files cannot be given"
                        " to it; install version 4.9.10, or give no folder",
                        argument="manual_dir",
                    )
                    raise self.refused
                manager._get_manually_downloaded_path = lambda info: files.get(_key(info)) if info else None
                manager._download = self._refuse
                return manager

            builder._make_download_manager = make_manager
            yield

    def _refuse(self, resource) -> None:
        needed = resource.url
        absent = [url for url, info in self._registered.items() if _key(info) not in self._files]
        if needed in absent:
            absent.remove(needed)
            lines = [f"{self._name!r} needs a file that is not in {self._where}:", self._described([needed])]
            if absent:
                lines += ["Other files that tfds knows of it and that are not there:", self._described(absent)]
            message = "\n".join([*lines, self._what_is_there(), f"Put it there, {_WAY_OUT}."])
        else:
            message = f"{self._name!r} needs {needed}, of which tfds has no checksum: give no folder, to download it"
        self.refused = UserError(message, argument="manual_dir")
        raise self.refused

    def _check(self, file: str, urls: list[str]) -> str | None:
        """Keeps a file that is that of one of these URLs, or can be restored; returns what is wrong with any other."""
        path = self._folder / file
        try:
            if path.is_dir():
                return f"{shown(os.fspath(path))} is a folder, expected the file from {urls[0]}"
            if not paths.in_bucket(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                return f"{shown(os.fspath(path))} is no regular file, expected the file from {urls[0]}"
            size, found = _digest(path)
            with path.open("rb") as content:
                start = content.read(_HEADER)
            for key in {_key(self._registered[url]) for url in urls}:
                _, sha256 = key
                if found == sha256:
                    self._files[key] = path
                elif sha256 in ORIGINAL_TIMES and start.startswith(_NO_NAME):
                    header = _original_header(start, file, ORIGINAL_TIMES[sha256])
                    if _digest(path, header)[1] == sha256:
                        self._files[key], self._headers[key] = path, header
            if path in self._files.values():
                return None
        except Exception as error:  # buckets have exceptions of their own
            return f"{shown(os.fspath(path))} cannot be read: {error}"
        lines = [f"  expected {self._identity(url)}, from {url}" for url in urls]
        return "\n".join(
            [
                f"{shown(os.fspath(path))} is not the file that tfds expects:",
                f"  found    {size:,} bytes, SHA-256 {found}",
                *_capped(lines, "  or {} others"),
            ]
        )

    def _file_name(self, url: str) -> str:
        """As registered with tfds; some have only a URL, which ends with it."""
        return self._registered[url].filename or urlsplit(url).path.rpartition("/")[2]

    def _identity(self, url: str) -> str:
        return f"{int(self._registered[url].size):,} bytes, SHA-256 {self._registered[url].checksum}"

    def _described(self, urls: Iterable[str]) -> str:
        """The files of these URLs, each on a line, with what is there in their place."""
        lines = []
        for url in urls:
            file = self._file_name(url)
            lines.append(f"  {file} ({int(self._registered[url].size):,} bytes), from {url}")
            if file in self._there:
                lines[-1] += " (the file of this name is that of another URL)"
        return "\n".join(_capped(lines, "  and {} more"))

    def _what_is_there(self) -> str:
        files = {self._file_name(url) for url in self._registered}
        held = ", ".join(_capped([shown(file) for file in self._there], "and {} more")) or "nothing"
        text = f"{self._where} holds: {held}"
        if paths.in_bucket(self._folder):
            return text
        with contextlib.suppress(OSError):  # it is no more than a hint
            for child in (self._folder / name for name in self._there):
                if child.is_dir() and (inside := files.intersection(path.name for path in child.iterdir())):
                    return f"{text}\n{shown(os.fspath(child))} holds {min(inside)}: is that the folder?"
        return text


def _key(info) -> _Key:
    return info.filename, info.checksum


def _original_header(start: bytes, file: str, time: int) -> bytes:
    """The header that gzip wrote when it compressed a file of this name without `.gz`, of this time."""
    return _WITH_NAME + struct.pack("<I", time) + start[8:] + file.removesuffix(".gz").encode() + b"\0"


def _chunks(path: epath.Path, header: bytes | None = None) -> Iterator[bytes]:
    """The bytes of a file; with this header in place of its own, if one is given."""
    with path.open("rb") as file:
        if header is not None:
            file.read(_HEADER)
            yield header
        while chunk := file.read(_CHUNK):
            yield chunk


def _digest(path: epath.Path, header: bytes | None = None) -> tuple[int, str]:
    """Size and SHA-256 of `_chunks`."""
    size, digest = 0, hashlib.sha256()
    # Seen for large files only.
    with tqdm(desc=f"Checking {path.name}", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for chunk in _chunks(path, header):
            size += len(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return size, digest.hexdigest()


def _capped(lines: list[str], rest: str) -> list[str]:
    more = len(lines) - _NAMED
    return lines if more <= 0 else [*lines[:_NAMED], rest.format(more)]
