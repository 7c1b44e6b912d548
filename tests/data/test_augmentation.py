"""Augmentation does what Pillow does, and draws what it says."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional as F

from hf_gr.data import augmentation
from hf_gr.data.augmentation import random_crop, random_flip

GRAY, COLOR = 1, 3
SIZES = [(32, 32), (24, 45)]


def pictures(count=6, channels=COLOR, size=(24, 45), seed=0):
    """Smooth random images of 8 bits, and the same as Pillow's."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 6, generator=generator)
    levels = (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)
    arrays = levels.permute(0, 2, 3, 1).numpy()
    return levels / 255, [Image.fromarray(array.squeeze(-1) if channels == GRAY else array) for array in arrays]


def from_pillow(images):
    arrays = [np.asarray(image) for image in images]
    return torch.stack([torch.from_numpy(a.copy()).view(*a.shape[:2], -1).permute(2, 0, 1) for a in arrays]) / 255


def levels_apart(ours, pillows):
    """By how many of 255 levels the images differ at most, if ours are rounded."""
    return ((ours * 255).round() - from_pillow(pillows) * 255).abs().max().item()


FACTORS = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 1.9])
# Pillow rounds to 8 bits, at times twice (the gray image, then the mix): two levels.
ENHANCED = [
    ("brightness", ImageEnhance.Brightness, augmentation.adjust_brightness),
    ("contrast", ImageEnhance.Contrast, augmentation.adjust_contrast),
    ("saturation", ImageEnhance.Color, augmentation.adjust_saturation),
    ("sharpness", ImageEnhance.Sharpness, augmentation.adjust_sharpness),
]


@pytest.mark.parametrize("channels", [GRAY, COLOR])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "pillow", "ours"), ENHANCED)
def test_enhancements_are_pillows(name, pillow, ours, size, channels):
    images, pillows = pictures(channels=channels, size=size)
    expected = [pillow(image).enhance(factor) for image, factor in zip(pillows, FACTORS.tolist(), strict=True)]
    assert levels_apart(ours(images, FACTORS), expected) <= 2


def test_random_crop_takes_a_window_of_the_reflected_image():
    torch.manual_seed(0)
    images = torch.randn(200, 2, 5, 6)
    padded = F.pad(images, (2,) * 4, mode="reflect")
    offsets = []
    for image, crop in zip(padded, random_crop(images, 2), strict=True):
        matches = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 5, x : x + 6], crop)]
        assert len(matches) == 1
        offsets += matches
    assert len(set(offsets)) == 25  # every shift occurs


def test_random_flip_mirrors_about_half():
    torch.manual_seed(0)
    images = torch.randn(400, 1, 3, 3)
    flipped = random_flip(images)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert 160 < sum(mirrored) < 240
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, images, strict=True))
