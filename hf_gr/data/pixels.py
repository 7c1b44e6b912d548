"""Images of every mode that Pillow knows, as the 8-bit RGB that models take."""

import numpy as np
from PIL import Image


class RangeError(ValueError):
    """The range of the images of more than 8 bits is not known, or another one: no matter of this image alone."""


def to_rgb(image: Image.Image, max_value: float | None = None, mode: str | None = None) -> Image.Image:
    """`image` in 8-bit RGB.

    Gray, 1-bit, palette, CMYK and YCbCr images are converted as Pillow does. Transparency is dropped, the color behind
    it stays: so do transformers' pipelines and torchvision's loader. More than 8 bits per pixel (modes I;16, I and F)
    are scaled by the range that the caller gives, the same for all images; Pillow would clip them at 255.

    Args:
        max_value: what is white in an image of more than 8 bits; 0 is black.
        mode: an 8-bit mode to go through, e.g. "L" to drop the color.

    Raises:
        RangeError: `max_value` is missing, or does not hold.
        ValueError: a value is not finite.
    """
    if is_deep(image):
        image = _scaled_to_8_bits(image, max_value)
    return (image if mode is None else image.convert(mode)).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """More than 8 bits per channel."""
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
            "65535 for 16 bits, 4095 for 12 bits, 1 for shares of white."
        )
    if low < 0 or high > max_value:
        raise RangeError(f"image_max_value={max_value:g}: {found}, is not between 0 and that. Give the value of white.")
    return Image.fromarray(np.rint(values * (255 / max_value)).astype(np.uint8))
