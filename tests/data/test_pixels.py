"""Images of every mode, as files of their own: what a model gets of them."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessorPil

from hf_gr.data.images import preprocess
from hf_gr.data.pixels import to_rgb

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
EIGHT_BITS = np.rint(RAMP * 255).astype(np.uint8)
SIXTEEN_BITS = np.rint(RAMP * 65535).astype(np.uint16)


def file(image, kind, **options):
    """`image` as it comes back from a file."""
    written = io.BytesIO()
    image.save(written, kind, **options)
    read = PILImage.open(io.BytesIO(written.getvalue()))
    read.load()
    return read


def pixels(image, **options):
    converted = to_rgb(image, **options)
    assert converted.mode == "RGB"
    return np.asarray(converted)


@pytest.mark.parametrize(
    ("image", "max_value"),
    [
        (file(PILImage.fromarray(SIXTEEN_BITS), "PNG"), 65535),
        (file(PILImage.fromarray(SIXTEEN_BITS), "TIFF"), 65535),
        (PILImage.frombytes("I;16B", (8, 8), SIXTEEN_BITS.astype(">u2").tobytes()), 65535),
        (file(PILImage.fromarray(SIXTEEN_BITS // 16), "PNG"), 4095),
        (file(PILImage.fromarray(SIXTEEN_BITS.astype(np.int32)), "TIFF"), 65535),
        (file(PILImage.fromarray(RAMP.astype(np.float32)), "TIFF"), 1),
        (file(PILImage.fromarray(RAMP.astype(np.float32) * 100), "TIFF"), 100),
    ],
    ids=["png16", "tiff16", "big endian", "png12", "tiff32", "float", "percent"],
)
def test_deep_images_keep_their_gray_levels(image, max_value):
    found = pixels(image, max_value=max_value).astype(int)
    assert np.abs(found - EIGHT_BITS[..., None]).max() <= 1  # 12 bits were rounded down to
    assert found.min() == 0 and found.max() == 255 and len(np.unique(found)) == 64


def test_the_scale_is_that_of_the_dataset_not_of_the_image():
    dark = file(PILImage.fromarray(SIXTEEN_BITS // 4), "PNG")
    assert pixels(dark, max_value=65535).max() == 64


@pytest.mark.parametrize(
    ("values", "max_value", "message"),
    [
        (
            SIXTEEN_BITS,
            None,
            "image_max_value=None: an image of mode I;16, which has more than 8 bits, with values from 0 to 65535",
        ),
        (SIXTEEN_BITS, 4095, "image_max_value=4095: an image of mode I;16"),
        (
            RAMP.astype(np.float32),
            None,
            "mode F, which has more than 8 bits, with values from 0 to 1, does not say what is white",
        ),
        (
            RAMP.astype(np.float32) - 0.5,
            1,
            "mode F, which has more than 8 bits, with values from -0.5 to 0.5, is not between 0",
        ),
        (np.where(RAMP < 0.5, np.nan, RAMP).astype(np.float32), 1, "mode F with values that are not finite"),
        (SIXTEEN_BITS.astype(np.int32), None, "mode I, which has more"),
    ],
)
def test_a_range_that_is_not_known_or_does_not_hold_is_refused(values, max_value, message):
    with pytest.raises(ValueError) as error:
        to_rgb(PILImage.fromarray(values), max_value)
    assert message in str(error.value)


RED, GREEN = (200, 30, 10), (10, 200, 30)


def palette_with_transparency():
    image = PILImage.new("P", (8, 8), 1)
    image.putpalette([*GREEN, *RED])
    return file(image, "PNG", transparency=1)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (file(PILImage.new("RGB", (8, 8), RED), "PNG"), RED),
        (file(PILImage.new("L", (8, 8), 77), "PNG"), (77,) * 3),
        (file(PILImage.new("1", (8, 8), 1), "PNG"), (255,) * 3),
        (file(PILImage.new("RGBA", (8, 8), (*RED, 0)), "PNG"), RED),
        (file(PILImage.new("LA", (8, 8), (77, 128)), "PNG"), (77,) * 3),
        (palette_with_transparency(), RED),
        (file(PILImage.new("RGB", (8, 8), RED).convert("CMYK"), "TIFF"), RED),
        (file(PILImage.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG", quality=100), RED),
        (PILImage.new("RGB", (8, 8), RED).convert("YCbCr"), RED),
    ],
    ids=["RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "CMYK JPEG", "YCbCr"],
)
def test_images_of_8_bits(image, expected):
    assert np.abs(pixels(image).astype(int) - expected).max() <= 2
    assert np.array_equal(pixels(image), pixels(image, max_value=65535))


def test_a_declared_mode_is_applied_after_the_scaling():
    """The cast that `datasets` makes would clip."""
    dataset = Dataset.from_dict(
        {"image": [SIXTEEN_BITS], "label": [0]},
        features=Features({"image": Image(mode="L"), "label": ClassLabel(names=["a", "b"])}),
    )
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0] * 3, image_std=[1] * 3)
    found = preprocess(dataset, processor, "image", "label", max_value=65535)[0]["pixel_values"]
    np.testing.assert_allclose(found[0] * 255, EIGHT_BITS, atol=1)
