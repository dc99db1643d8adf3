"""Masks of classes: PNG files whose pixels are class numbers, to (h, w) uint8 labels; 255 marks pixels without a label.

A mask of another kind, of another size than its image, or with other classes is never skipped: it means that the data
and its description do not match.
"""

import io

import numpy as np
from PIL import Image

from polaformer_jax.data.records import CorruptRecordError
from polaformer_jax.errors import UserError

IGNORED = 255  # the label of pixels that count neither for the loss nor for the metrics
MAX_CLASSES = 255  # labels 0 to 254

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_COLOUR_TYPES = {_GREY: "grey", 2: "RGB", _PALETTE: "palette", 4: "grey with transparency", 6: "RGBA"}
_WAY_OUT = (
    "expected a PNG with one channel of 8 bits (grey or palette), whose pixels are class numbers; convert it, with"
    " Pillow: Image.fromarray(classes.astype('uint8')).save('NAME.png')"
)


def decode_mask(data: bytes) -> np.ndarray:
    """The numbers in a mask, (h, w) uint8. Those of a palette image are the indices, whatever their colours.

    Raises:
        UserError: it is no PNG, or one of another kind: of colours, of 16 bits or of less than 8.
        CorruptRecordError: its pixels cannot be decoded.
    """
    if not data.startswith(_SIGNATURE):
        _refuse_format(data)
    if len(data) > 25:
        # Pillow would stretch grey pixels of 1, 2 and 4 bits to the range of 8, and name several kinds alike.
        depth, colour = data[24], data[25]
        if colour in _COLOUR_TYPES and not (colour == _PALETTE or (colour == _GREY and depth == 8)):
            bits = "1 bit" if depth == 1 else f"{depth} bits"
            raise UserError(f"the mask is a PNG of {_COLOUR_TYPES[colour]}, {bits} a channel; {_WAY_OUT}")
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
        return np.array(image)
    except Exception as error:  # more than OSError
        raise CorruptRecordError(f"corrupt mask ({len(data)} bytes): {error}") from error


def _refuse_format(data: bytes) -> None:
    try:
        found = Image.open(io.BytesIO(data)).format
    except Exception as error:
        raise CorruptRecordError(f"corrupt mask ({len(data)} bytes): of no known format") from error
    raise UserError(f"the mask is of the format {found}; {_WAY_OUT}")


def reduce_zero_label(labels: np.ndarray) -> np.ndarray:
    """Of masks whose 0 means "none of the classes", as ADE20K's: 0 becomes 255, k becomes k - 1, 255 stays."""
    reduced = labels - np.uint8(1)  # 0 wraps around
    reduced[labels == IGNORED] = IGNORED
    return reduced


def decode_labels(data: bytes, *, size: tuple[int, int], num_classes: int, reduce_zero: bool) -> np.ndarray:
    """The labels of an image, (h, w) uint8: 0 to `num_classes` - 1, or 255.

    Args:
        data: the encoded mask.
        size: (height, width) of the image.
        num_classes: at most 255.
        reduce_zero: see `reduce_zero_label`.

    Raises:
        UserError: it is of another kind (see `decode_mask`) or size, or has numbers outside the classes.
        CorruptRecordError: it cannot be decoded.
    """
    mask = decode_mask(data)
    if mask.shape != tuple(size):
        raise UserError(
            f"the mask has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), but its image has {size[0]} x"
            f" {size[1]}; make both of one size: resize masks with nearest neighbours"
        )
    labels = reduce_zero_label(mask) if reduce_zero else mask
    wrong = (labels >= num_classes) & (labels != IGNORED)
    if wrong.any():
        values, counts = np.unique(mask[wrong], return_counts=True)
        listed = ", ".join(f"{value} ({count} pixels)" for value, count in zip(values[:5], counts[:5], strict=True))
        more = f", and {len(values) - 5} others" if len(values) > 5 else ""
        first, last = (1, num_classes) if reduce_zero else (0, num_classes - 1)
        ignored = "0 or 255" if reduce_zero else "255"
        raise UserError(
            f"the mask has numbers outside the {num_classes} classes: {listed}{more}; expected {first} to {last}, or"
            f" {ignored} for pixels without a label (reduce_zero_label is {reduce_zero})"
        )
    return labels
