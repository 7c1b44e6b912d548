"""Conversion of images of any Pillow mode to the 8-bit RGB that models expect."""

import numpy as np
from PIL import Image


class RangeError(ValueError):
    """The range of images of more than 8 bits is unknown or wrong, which affects all images, not only this one."""


def to_rgb(image: Image.Image, max_value: float | None = None, mode: str | None = None) -> Image.Image:
    """`image` in 8-bit RGB.

    Gray, 1-bit, palette, CMYK and YCbCr images are converted by Pillow. Transparency is dropped and the color behind it
    kept, as in transformers' pipelines and torchvision's loader. More than 8 bits per channel (modes I;16, I and F) are
    scaled by a range common to all images, which the caller must give; Pillow would clip them at 255.

    Args:
        max_value: the value of white in an image of more than 8 bits; 0 is black.
        mode: an 8-bit mode to convert to first, e.g. "L" to drop the color.

    Raises:
        RangeError: `max_value` is missing, or a value is not between 0 and `max_value`.
        ValueError: a value is not finite.
    """
    if is_deep(image):
        image = _scaled_to_8_bits(image, max_value)
    return (image if mode is None else image.convert(mode)).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether `image` has more than 8 bits per channel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _scaled_to_8_bits(image: Image.Image, max_value: float | None) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError(f"mode {image.mode} with values that are not finite")
    found = f"an image of mode {image.mode}, which has more than 8 bits, with values from {low:g} to {high:g}"
    if max_value is None:
        raise RangeError(
            f"image_max_value=None: {found}, does not say what is white. Set image_max_value, the same for all images: "
            "65535 for 16 bits, 4095 for 12 bits, 1 for fractions of white."
        )
    if low < 0 or high > max_value:
        raise RangeError(f"image_max_value={max_value:g}: {found}, is not between 0 and that. Give the value of white.")
    return Image.fromarray(np.rint(values * (255 / max_value)).astype(np.uint8))
