"""Sizes of many images, from their headers: batches of an evaluation are planned by them without decoding."""

import concurrent.futures
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

_THREADS = 16  # files on network drives are waited for
_CHUNK = 64  # images a task


def read_sizes(opened: Callable[[int], BinaryIO], count: int, name: str) -> np.ndarray:
    """(height, width) of each image, (count, 2) int32; (0, 0) where it cannot be read: reading it again tells why.

    Args:
        opened: the encoded image of an index, as a binary file; called by several threads.
        count: the number of images.
        name: of the images, for the progress bar.
    """
    sizes = np.zeros((count, 2), np.int32)

    def read(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for index in range(start, stop):
            try:
                with opened(index) as file, Image.open(file) as image:
                    sizes[index] = image.height, image.width
            except Exception:  # Pillow raises more than OSError on broken files
                sizes[index] = 0
        return stop - start

    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=count, desc=f"sizes of {name}", unit=" images", leave=False, disable=None) as progress,
    ):
        for done in pool.map(read, range(0, count, _CHUNK)):
            progress.update(done)
    return sizes
