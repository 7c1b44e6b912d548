"""The images that the training scripts of image models read: their flags, and the splits."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ..checks import COUNT, POSITIVE, Limit, check_fields, flag
from ..data.images import (
    find_image_column,
    find_label_column,
    keep_first,
    keep_readable,
    load_image_dataset,
    number_rows,
    split_train_eval,
)
from ..errors import extra
from . import script

with extra("scripts"):
    from datasets import Dataset


@dataclass
class ImageArguments(script.DataArguments):
    """The images to train and evaluate on. Each script adds its own flags."""

    dataset_name: str = field(
        default="digits",
        metadata={"help": "'digits' or 'mnist-5k' (embedded), a name on the Hub, a local folder, or a parquet file."},
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Default: the column of type Image."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: the column of type ClassLabel."})
    eval_fraction: float | None = flag(
        None,
        "Share of train to evaluate on, if there is no test or validation split. Default: 0.1.",
        Limit(0, 1, True, True),
    )
    max_train_samples: int | None = flag(None, "Train on at most this many examples.", COUNT)
    max_eval_samples: int | None = flag(None, "Evaluate on at most this many examples.", COUNT)
    image_max_value: float | None = flag(
        None,
        "Value of white in images of more than 8 bits. It scales them to 8: 65535 for 16 bits, 4095 for 12 bits, 1 for "
        "values from 0 to 1. Scale images the same way before inference.",
        POSITIVE,
    )
    skip_bad_examples: bool = field(
        default=False,
        metadata={
            "help": "Skip and count examples without a class or with an unreadable image. To find them, all images are "
            "read before training."
        },
    )

    def __post_init__(self):
        check_fields(self, ImageArguments)


class Images(NamedTuple):
    train: Dataset
    test: Dataset
    test_split: str
    image_column: str
    label_column: str
    label_names: list[str]
    counts: dict[str, int]  # of skipped examples and of wrong labels, as metrics; empty without those flags
    validation: Dataset | None = None  # what `validation_fraction` held out of train


def read_images(args: ImageArguments, training: script.ScriptConfig) -> Images:
    """The images that the flags name, with a class in every row."""
    dataset = load_image_dataset(args.dataset_name, args.dataset_config_name)
    features = next(iter(dataset.values())).features
    image_column = find_image_column(features, args.image_column_name)
    label_column, label_names = find_label_column(features, args.label_column_name)
    skipped: Counter[str] | None = Counter() if args.skip_bad_examples else None
    train, test, test_split = split_train_eval(
        number_rows(dataset), label_column, args.eval_fraction, training.seed, skipped
    )
    train = keep_first(train, args.max_train_samples, training.seed, "max_train_samples")
    test = keep_first(test, args.max_eval_samples, training.seed, "max_eval_samples")
    counts = {}
    if skipped is not None:
        how = (image_column, args.image_max_value, training.dataloader_num_workers or None)
        train = keep_readable(train, "train", skipped, *how)
        test = keep_readable(test, test_split, skipped, *how)
        counts = {"train_skipped_examples": skipped["train"], "eval_skipped_examples": skipped[test_split]}
    return Images(train, test, test_split, image_column, label_column, label_names, counts)
