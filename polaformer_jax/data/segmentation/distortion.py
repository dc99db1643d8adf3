"""Random changes of brightness, contrast, saturation and hue: mmsegmentation's `PhotoMetricDistortion`.

Images are (h, w, 3) uint8, RGB; between two steps they are cut to uint8, as in the reference, which does the same in
BGR. Each step maps single values to single values, so that it is a table of 256 entries.
"""

import numpy as np

from polaformer_jax.data.segmentation.resizing import opencv

BRIGHTNESS = 32.0  # largest change of a value
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = 18  # largest change, in steps of two degrees

_VALUES = np.arange(256)


def change_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """Adds a number to each value."""
    return opencv().LUT(image, _linear(beta=delta))


def change_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies each value by a factor."""
    return opencv().LUT(image, _linear(alpha=factor))


def change_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the saturation by a factor."""
    return _in_hsv(image, 1, _linear(alpha=factor))


def change_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """Turns the hue by a number of steps of two degrees."""
    return _in_hsv(image, 0, ((_VALUES + steps) % 180).astype(np.uint8))


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 1/2; contrast comes second or last."""
    # All numbers are drawn, used or not: the image decides nothing.
    brightness, contrast, saturation, hue, contrast_second = rng.random(5) < 0.5
    delta = rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    contrast_factor, saturation_factor = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    steps = int(rng.integers(-HUE, HUE))  # without the upper end, as the reference
    if brightness:
        image = change_brightness(image, delta)
    if contrast and contrast_second:
        image = change_contrast(image, contrast_factor)
    if saturation:
        image = change_saturation(image, saturation_factor)
    if hue:
        image = change_hue(image, steps)
    if contrast and not contrast_second:
        image = change_contrast(image, contrast_factor)
    return image


def _linear(alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """The table of `alpha * value + beta` in float32, cut to 0..255 and then to integers (not rounded)."""
    return np.clip(_VALUES.astype(np.float32) * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)


def _in_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = table[hsv[..., channel]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
