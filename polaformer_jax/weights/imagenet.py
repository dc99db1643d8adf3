"""The classes of ImageNet-1k, on which the official weights were trained: numbers of WordNet, and words for people."""

import functools
from collections.abc import Sequence
from pathlib import Path

_FILE = Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def classes() -> dict[str, str]:
    """Words by WordNet number (`n01440764`: `tench, Tinca tinca`), in label order: that of the numbers.

    Source: WordNet 3.0, Princeton University; its licence is in the file.
    """
    lines = _FILE.read_text(encoding="ascii").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def in_words(names: Sequence[str]) -> tuple[str, ...]:
    """Names for people: the words of WordNet numbers; all other names as they are."""
    return tuple(classes().get(name, name) for name in names)
