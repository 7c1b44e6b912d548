"""Generate MNIST-1D as images of 8 x 8 pixels, a dataset that a small network memorizes in minutes.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/make_mnist1d.py FOLDER
    python scripts/train_vit.py vit_digits.yaml --dataset_name FOLDER

MNIST-1D ("Scaling Down Deep Learning with MNIST-1D", Greydanus and Kobak, ICML 2024, https://arxiv.org/abs/2011.14439)
has one-dimensional digits: templates of 12 points, padded, scaled, shifted, sheared and noisy. Its defaults and seed
are used, 4,000 training and 1,000 test examples, except that a signal has 64 values instead of 40.

An image is a signal cut into 16 pieces. Each patch of 2 x 2 pixels, as `vit-micro` reads them, holds four consecutive
values, and both the patches and the pixels of a patch are in reading order, so that the ViT sees the sequence. For a
convolution the image has no such meaning. Gray is 0, black and white are four standard deviations below and above it,
where the signal is clipped (0.02 % of its values). Recipes with mirrored or shifted images do not fit.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from hf_gr.errors import extra

LENGTH = 64
#: In standard deviations of the signal.
WHITE = 4.0
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})


def as_images(signals: np.ndarray) -> np.ndarray:
    """(n, 64) values of mean 0 and variance 1 as (n, 8, 8) shades of gray, four consecutive values to a 2 x 2 patch."""
    shades = np.clip((signals + WHITE) * (255 / (2 * WHITE)), 0, 255).round().astype(np.uint8)
    patches = shades.reshape(-1, 4, 4, 2, 2)  # row and column of the patch, row and column in it
    return patches.swapaxes(2, 3).reshape(-1, 8, 8)


def generate() -> dict[str, Dataset]:
    """The splits `train` and `test`, always the same."""
    with extra("bench"):
        from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.final_seq_length = LENGTH
    data = make_dataset(args)
    return {
        split: Dataset.from_dict({"image": list(as_images(data[x])), "label": data[y]}, features=FEATURES)
        for split, x, y in (("train", "x", "y"), ("test", "x_test", "y_test"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of train.parquet and test.parquet")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, dataset in generate().items():
        dataset.to_parquet(folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {len(dataset)} examples")


if __name__ == "__main__":
    main()
