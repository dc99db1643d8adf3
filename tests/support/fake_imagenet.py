"""ImageNet's tars in small: noise in JPEG files, under the real names, for the real tfds builder."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (20, 30)) -> bytes:
    """An image of noise, (height, width)."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def write_tars(folder: Path, wnids: Sequence[str], *, validation: int) -> Path:
    """Writes both tars: one training image for each class (`jpeg(i)` for the i-th), and the first validation images."""
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for seed, wnid in enumerate(wnids):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                _add(inner, f"{wnid}_1.JPEG", jpeg(seed))
            _add(outer, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in range(1, validation + 1):
            _add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(number))
    return folder


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
