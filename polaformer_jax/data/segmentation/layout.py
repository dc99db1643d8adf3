"""The layout of a folder of images and masks: which image belongs to which mask, and the names of the classes.

Folders are `pathlib.Path`, or `zipfile.Path` of the same layout in an archive.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from absl import logging

from polaformer_jax.errors import UserError
from polaformer_jax.files.names import shown

IMAGES = (".jpeg", ".jpg", ".png")  # in any case
MASKS = (".png",)
ADE20K = "ADEChallengeData2016"  # the folder in ADE20K's archive

_NAMED = 5  # files that an error names


class Classes(NamedTuple):
    """The classes of a data set.

    Attributes:
        names: in the order of labels.
        reduce_zero_label: whether 0 in the masks means none of them, and 1 is the first (see `labels`).
    """

    names: tuple[str, ...]
    reduce_zero_label: bool


def pairs(images: Path, masks: Path) -> list[tuple[str, str]]:
    """Names of the files of each image and its mask, which have the same stem, sorted by stem.

    Other files and further folders are left out, which is logged; those whose names begin with a dot silently.

    Raises:
        UserError: images without a mask or masks without an image, several of one stem, no images, or a folder that
            cannot be read.
    """
    found, of_masks = _by_stem(images, IMAGES), _by_stem(masks, MASKS)
    if not found and not of_masks:
        raise UserError(f"{images} has no images ({', '.join(IMAGES)}) and {masks} no masks ({', '.join(MASKS)})")
    problems = []
    if lonely := sorted(set(found) - set(of_masks)):
        problems.append(f"{len(lonely)} images without a mask in {masks}: {_some(found[stem] for stem in lonely)}")
    if lonely := sorted(set(of_masks) - set(found)):
        problems.append(f"{len(lonely)} masks without an image in {images}: {_some(of_masks[stem] for stem in lonely)}")
    if problems:
        raise UserError(
            f"images and masks do not match: {'; '.join(problems)}. Expected the same names, such as x.jpg and x.png;"
            " add what is missing, or remove the others"
        )
    return [(found[stem], of_masks[stem]) for stem in sorted(found)]


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> Mapping[str, str]:
    """File names by stem."""
    found, twice, others = {}, [], []
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    try:
        for entry in folder.iterdir():
            stem, _, suffix = entry.name.rpartition(".")
            if entry.name.startswith("."):  # also "._x.jpg", which macOS leaves next to files on foreign drives
                continue
            if f".{suffix.lower()}" not in suffixes or not stem:
                others.append(entry.name)
            elif stem in found:
                twice += [found[stem], entry.name]
            else:
                found[stem] = entry.name
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error}") from error
    if twice:
        raise UserError(f"{folder} has several files of one name, up to the suffix: {_some(sorted(set(twice)))}")
    if others:
        logging.warning("%s: left out, for they are no %s: %s", folder, ", ".join(suffixes), _some(sorted(others)))
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(shown, names[:_NAMED])) + more


def read_classes(root: Path) -> Classes | None:
    """The classes that `classes.txt` (a name a line) or ADE20K's `objectInfo150.txt` names; None without these files.

    Raises:
        UserError: the file cannot be read, or is of another form.
    """
    if (path := root / "classes.txt").is_file():
        lines = [line.strip() for line in _text(path).splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if not lines or not all(lines):
            where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
            raise UserError(f"{path}: {where}; expected the name of a class on each line, in the order of labels")
        return Classes(tuple(map(shown, lines)), reduce_zero_label=False)
    if (path := root / "objectInfo150.txt").is_file():
        return Classes(_object_info(path), reduce_zero_label=True)
    return None


def _object_info(path: Path) -> tuple[str, ...]:
    """Of each class the first of its names, which ADE20K's list separates by commas."""
    rows = [[cell.strip() for cell in line.split("\t")] for line in _text(path).splitlines() if line.strip()]
    if len(rows) < 2 or not {"Idx", "Name"} <= set(rows[0]):
        raise UserError(f"{path}: expected a table separated by tabs, with the columns Idx and Name, as ADE20K has it")
    number, name = rows[0].index("Idx"), rows[0].index("Name")
    for expected, row in enumerate(rows[1:], 1):
        if len(row) != len(rows[0]) or row[number] != str(expected) or not row[name]:
            raise UserError(f"{path}: class {expected} is {' '.join(row)!r}, expected {' '.join(rows[0])}")
    return tuple(shown(row[name].split(",")[0].strip()) for row in rows[1:])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text (UTF-8): {error}") from error
