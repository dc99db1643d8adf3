"""A small folder of images, as `FolderSource` reads it."""

import hashlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n15075141")
OLD = 1_600_000_000 * 10**9  # ns: a time of change that lies far back


def pixels(seed, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encode(seed=0, mode="RGB", fmt="jpeg", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


def write(root, files):
    """Writes files, and gives all folders old times of change."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    settle(root)
    return root


def settle(root, ns=OLD):
    """Gives each folder a time of change of its own, beginning with this one."""
    for number, (directory, _, _) in enumerate(os.walk(root)):
        os.utime(directory, ns=(ns + number, ns + number))


def config(root, **changes):
    fields = {"source": "folder", "name": "pictures", "data_dir": str(root), "train_split": "train"}
    return SimpleNamespace(**fields | changes)


def paths(source):
    return [os.path.relpath(source.describe(i), Path(source.describe(i)).parents[2]) for i in range(len(source))]


def digest(batch):
    return hashlib.sha256(b"".join(k.encode() + batch[k].tobytes() for k in sorted(batch))).hexdigest()


def pictures(folder):
    """Three classes with four images each to train on, two to evaluate; written in an order that is not theirs."""
    counts = {"val": 2, "train": 4}
    return write(
        folder / "pictures",
        {
            f"{split}/{name}/{name}_{number}.JPEG": encode(100 * label + number)
            for split, count in counts.items()
            for label, name in reversed(list(enumerate(CLASSES)))
            for number in reversed(range(count))
        },
    )
