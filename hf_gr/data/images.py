"""Image data: loading, finding the columns and splits, preprocessing."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from torch import Tensor

from ..errors import explained, one_line
from .embedded import EMBEDDED, load_embedded
from .pixels import RangeError, is_deep, to_rgb

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("test", "validation", "valid")
#: The column of `number_rows`.
ROW = "_row"
#: The column of `add_label_noise`, and with it an input of `preprocess`: whether the label is wrong.
IS_WRONG = "_is_wrong"
#: The preprocessed images of a split are kept in memory up to this size, in each process that loads them.
CACHE_BYTES = 2**28


def load_image_dataset(name: str, config: str | None = None) -> DatasetDict:
    """A key of `EMBEDDED`, a parquet file, a folder (of parquet files, or of images in one folder per class), or a Hub
    dataset."""
    if name in EMBEDDED:
        if config is not None:
            raise ValueError(f"dataset_config_name={config!r}: {name!r} has no configurations. Leave it out.")
        return load_embedded(name)
    if name.endswith(".parquet") and config is not None:
        raise ValueError(f"dataset_config_name={config!r}: a file has no configurations. Leave it out.")
    remedy = (
        f"Give {' or '.join(map(repr, EMBEDDED))} (embedded), a parquet file, a folder with parquet files or with one "
        "folder of images per class, or the name of a dataset on the Hub that can be reached from here."
    )
    with explained(f"dataset_name={name!r} could not be loaded", remedy):
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files=name)
        return load_dataset(name, config)


def find_image_column(features: Features, name: str | None = None) -> str:
    """The column to take images from: `name`, or the only one of type `Image`."""
    if name is not None:
        if name not in features:
            raise ValueError(f"image_column_name={name!r} is not a column of the dataset, which has {_list(features)}.")
        if not isinstance(features[name], Image):
            raise ValueError(f"image_column_name={name!r} holds {_type(features[name])}, not images.")
        return name
    return _only_column(features, Image, "image", "image_column_name")


def find_label_column(features: Features, name: str | None = None) -> tuple[str, list[str]]:
    """The column to take classes from, and the names of the classes: `name`, or the only one of type `ClassLabel`."""
    if name is not None and name not in features:
        raise ValueError(f"label_column_name={name!r} is not a column of the dataset, which has {_list(features)}.")
    if name is None:
        name = _only_column(features, ClassLabel, "class label", "label_column_name")
    if not isinstance(features[name], ClassLabel):
        raise ValueError(
            f"label_column_name={name!r} holds {_type(features[name])}, not class labels. Give the column its classes, "
            f"dataset = dataset.class_encode_column({name!r}), and save the dataset again."
        )
    names = features[name].names
    if len(names) < 2:
        raise ValueError(
            f"label_column_name={name!r} has {len(names)} class ({_list(names)}): there is nothing to tell "
            "apart. Choose another column or dataset."
        )
    return name, names


def _only_column(features: Features, kind: type, description: str, flag: str) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{column} ({_type(feature)})" for column, feature in features.items())
    if not found:
        raise ValueError(f"The dataset has no {description} column; its columns are {columns}. Name one with --{flag}.")
    raise ValueError(f"The dataset has several {description} columns: {', '.join(found)}. Choose one with --{flag}.")


def _type(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _list(features: Iterable) -> str:
    return ", ".join(map(str, features))


def number_rows(dataset: DatasetDict) -> DatasetDict:
    """Add a column with the row of each example in its split, which survives shuffling and selection."""
    return DatasetDict({name: _numbered(split) for name, split in dataset.items()})


def _numbered(split: Dataset) -> Dataset:
    return split if ROW in split.column_names else split.add_column(ROW, np.arange(len(split)))


def split_train_eval(
    dataset: DatasetDict,
    label_column: str,
    eval_fraction: float | None,
    seed: int,
    skipped: Counter[str] | None = None,
) -> tuple[Dataset, Dataset, str]:
    """(train, evaluation, name of the evaluation split), with a class in every row.

    The evaluation split is the first of `test`, `validation` and `valid` with labels (benchmarks hide the labels of
    their test split as -1). If there is none, it is a fraction `eval_fraction` of `train`, by default 0.1, stratified
    by class with `seed`.

    Args:
        skipped: counts rows without a class, which are left out, by split; if None, they are an error.
    """
    if "train" not in dataset:
        raise ValueError(f"The dataset has no split 'train', only {', '.join(dataset)}.")
    train = _with_labels(dataset["train"], "train", label_column, skipped)
    _warn_of_absent_classes(train, label_column)
    for name in EVAL_SPLITS:
        if name in dataset and (_labels(dataset[name], label_column) >= 0).any():
            if eval_fraction is not None:
                raise ValueError(
                    f"eval_fraction={eval_fraction} has no effect: the dataset has a split {name!r} to evaluate on. "
                    "Leave it out."
                )
            return train, _with_labels(dataset[name], name, label_column, skipped), name
    fraction = 0.1 if eval_fraction is None else eval_fraction
    return *hold_out(train, label_column, fraction, seed, "eval_fraction"), f"{fraction:g} of train"


def hold_out(train: Dataset, label_column: str, fraction: float, seed: int, flag: str) -> tuple[Dataset, Dataset]:
    """(the rest, a share `fraction` of the examples), stratified by label with `seed`. `flag` is for messages.

    Raises:
        ValueError: it is not a fraction, or there are too few examples of a class.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"{flag}={fraction}: must be a fraction between 0 and 1.")
    remedy = f"Each class needs at least two examples, and each part one of every class. Give another {flag}."
    with explained(f"{flag}={fraction}: the split 'train' could not be divided", remedy):
        parts = train.train_test_split(test_size=fraction, stratify_by_column=label_column, seed=seed)
    return parts["train"], parts["test"]


def _labels(dataset: Dataset, label_column: str) -> np.ndarray:
    """All class ids, -1 for missing ones."""
    column = dataset.select_columns([label_column]).with_format("arrow")[:].column(label_column)
    return column.fill_null(-1).to_numpy()


def _with_labels(dataset: Dataset, split: str, label_column: str, skipped: Counter[str] | None) -> Dataset:
    labels, classes = _labels(dataset, label_column), dataset.features[label_column].num_classes
    is_good = (labels >= 0) & (labels < classes)
    if is_good.all():
        return dataset
    problem = f"label_column_name={label_column!r} has none of the classes 0 to {classes - 1}"
    _skip_or_raise(split, np.flatnonzero(~is_good), problem, skipped)
    return dataset.select(np.flatnonzero(is_good))


def _warn_of_absent_classes(train: Dataset, label_column: str) -> None:
    names, present = train.features[label_column].names, set(_labels(train, label_column))
    if absent := [name for i, name in enumerate(names) if i not in present]:
        logger.warning(f"{len(absent)} of {len(names)} classes have no training example: {_some(absent)}.")


def _skip_or_raise(split: str, rows: np.ndarray, problem: str, skipped: Counter[str] | None) -> None:
    message = f"split {split!r}, row{'s' * (len(rows) > 1)} {_some(rows)}: {problem}"
    if skipped is None:
        raise ValueError(f"{message}. Fix or remove such examples, or leave them out with --skip_bad_examples.")
    logger.warning(f"{message}. {len(rows)} left out.")
    skipped[split] += len(rows)


def _some(values: Any) -> str:
    return _list(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def keep_first(dataset: Dataset, count: int | None, seed: int, flag: str) -> Dataset:
    """`count` examples of a shuffled `dataset`, or all if `count` is None. `flag` is named in errors."""
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise ValueError(f"{flag}={count}: give at least 1, or leave it out for all.")
    return dataset.shuffle(seed=seed).select(range(count))


class LabelNoise(NamedTuple):
    """A kind of wrong labels: its function and what `--help` says of it.

    `function(labels, classes, generator)` returns a wrong class for each label.
    """

    function: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
    help: str


def _another_class(labels: np.ndarray, classes: int, generator: np.random.Generator) -> np.ndarray:
    return (labels + generator.integers(1, classes, len(labels))) % classes


def _next_class(labels: np.ndarray, classes: int, generator: np.random.Generator) -> np.ndarray:
    return (labels + 1) % classes


LABEL_NOISES = {
    "symmetric": LabelNoise(_another_class, "any other class, all equally likely"),
    "pairflip": LabelNoise(_next_class, "the next class, and class 0 for the last"),
}


def part_to_train_on(
    train: Dataset,
    label_column: str,
    seed: int,
    label_noise: float = 0.0,
    label_noise_type: str | None = None,
    validation_fraction: float | None = None,
) -> tuple[Dataset, Dataset | None]:
    """`train` with the wrong labels that these flags ask for, less the part that they hold out; and that part."""
    if label_noise > 0:
        train = add_label_noise(train, label_column, label_noise, label_noise_type or "symmetric", seed)
    if validation_fraction is None:
        return train, None
    return hold_out(train, label_column, validation_fraction, seed, "validation_fraction")


def add_label_noise(train: Dataset, label_column: str, fraction: float, kind: str, seed: int) -> Dataset:
    """`train` with wrong labels on a share of its examples, and the column `IS_WRONG`, which says on which.

    Args:
        fraction: round(fraction * n) of the n examples, drawn with `seed`, get a wrong label.
        kind: a key of `LABEL_NOISES`.

    Raises:
        ValueError: the fraction is so small that no label would change.
    """
    labels, feature = _labels(train, label_column).copy(), train.features[label_column]
    count = round(fraction * len(labels))
    if count == 0:
        raise ValueError(f"label_noise={fraction}: no label of {len(labels)} would change. Raise it, or leave it out.")
    generator = np.random.default_rng(seed)
    wrong = generator.choice(len(labels), count, replace=False)
    labels[wrong] = LABEL_NOISES[kind].function(labels[wrong], feature.num_classes, generator)
    is_wrong = np.zeros(len(labels), dtype=bool)
    is_wrong[wrong] = True
    columns = train.column_names
    train = train.remove_columns(label_column).add_column(label_column, labels, feature=feature)
    return train.select_columns(columns).add_column(IS_WRONG, is_wrong)


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one split as RGB, and names the row of one that it cannot read.

    Args:
        column: the column of images, not decoded.
        split: the name of the split.
        max_value: the value of white in images of more than 8 bits; see `to_rgb`.
        mode: the 8-bit mode that the dataset declares for its images.
    """

    column: str
    split: str
    max_value: float | None
    mode: str | None

    def __call__(self, batch: dict) -> list[PILImage.Image]:
        """The images of `batch`, which also has the column `ROW`. Raises `ValueError` if one cannot be read."""
        return [self.read(file, row) for file, row in zip(batch[self.column], batch[ROW], strict=True)]

    def read(self, file: dict | None, row: int) -> PILImage.Image:
        """One image. Raises `ValueError`, or its subclass `RangeError`, if it cannot be read."""
        where = f"split {self.split!r}, row {row}" + (f" ({file['path']})" if file and file["path"] else "")
        try:
            if file is None:
                raise ValueError("it is missing")
            return to_rgb(Image().decode_example(file), self.max_value, self.mode)
        except RangeError as error:
            raise RangeError(f"{error} The image is from {where}.") from error
        except Exception as error:  # decoders raise errors of many classes
            reason = one_line(error).split(" <_io.")[0]
            raise ValueError(
                f"{where}: the image cannot be used ({reason}). Fix or remove it, or leave out all such examples with "
                "--skip_bad_examples."
            ) from error

    def can_read(self, file: dict | None, row: int) -> bool:
        """Whether the image can be used. A wrong range still raises: skipping would leave out the bright images."""
        try:
            self.read(file, row)
        except RangeError:
            raise
        except ValueError:
            return False
        return True


def _image_files(dataset: Dataset, column: str, split: str, max_value: float | None) -> tuple[Dataset, ImageReader]:
    """`dataset` with its images not decoded, and their reader."""
    mode = dataset.features[column].mode
    reader = ImageReader(column, split, max_value, mode)
    return dataset.cast_column(column, Image(mode=mode, decode=False)), reader


def keep_readable(
    dataset: Dataset,
    split: str,
    skipped: Counter[str],
    image_column: str,
    max_value: float | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """The examples of `dataset` whose images can be read; to find out, all are read.

    Args:
        dataset: from `number_rows`.
        skipped: counts the examples left out, by split.
        max_value: see `to_rgb`.
        num_proc: the number of processes that read.
    """
    files, reader = _image_files(dataset, image_column, split, max_value)
    kept = files.filter(reader.can_read, input_columns=[image_column, ROW], num_proc=num_proc)
    bad = np.setdiff1d(dataset[ROW][:], kept[ROW][:])
    if len(bad):
        _skip_or_raise(split, bad, "the image cannot be used", skipped)
    if not len(kept):
        raise ValueError(f"split {split!r}: no image can be used. Without --skip_bad_examples the error says why.")
    return kept


def preprocess(
    dataset: Dataset,
    image_processor: Callable,
    image_column: str,
    label_column: str,
    split: str = "train",
    max_value: float | None = None,
) -> Dataset:
    """The model's inputs, `pixel_values` and `labels`, computed when they are accessed. `IS_WRONG` is kept.

    Those of a small split are computed once: decoding an image can take longer than the model needs for it.

    Args:
        split: named in errors.
        max_value: the value of white in images of more than 8 bits; see `to_rgb`.
    """
    kept = [IS_WRONG] if IS_WRONG in dataset.column_names else []
    dataset = _numbered(dataset).select_columns([image_column, label_column, ROW, *kept])
    dataset, reader = _image_files(dataset, image_column, split, max_value)
    return dataset.with_transform(_ToModelInputs(image_processor, reader, label_column, len(dataset)))


class _ToModelInputs:
    """Turns a batch of rows into the model's inputs; keeps the pixels if all `count` images fit into `CACHE_BYTES`."""

    def __init__(self, image_processor: Callable, read: ImageReader, label_column: str, count: int):
        self._image_processor = image_processor
        self._read = read
        self._label_column = label_column
        self._count = count
        self._cache: dict[int, Tensor] = {}

    def __call__(self, batch: dict) -> dict:
        rows = batch[ROW]
        if not all(row in self._cache for row in rows):
            images = self._image_processor(self._read(batch), return_tensors="pt")["pixel_values"]
            if images[0].nbytes * self._count <= CACHE_BYTES:
                self._cache.update(zip(rows, images.clone(), strict=True))
        else:
            images = torch.stack([self._cache[row] for row in rows])
        kept = {IS_WRONG: batch[IS_WRONG]} if IS_WRONG in batch else {}
        return {"pixel_values": images, "labels": batch[self._label_column], **kept}


def normalization_of(image_processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and the standard deviation of each color that `image_processor` normalizes by, of values in [0, 1]."""
    if not image_processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return image_processor.image_mean, image_processor.image_std


def with_size(image_processor: Any, side: int) -> Any:
    """`image_processor`, but for square images with `side` pixels per side, such as random crops are taken from."""
    square, settings = {"height": side, "width": side}, image_processor.to_dict()
    settings["size"] = {"shortest_edge": side} if "shortest_edge" in settings["size"] else square
    if settings.get("do_center_crop"):
        settings["crop_size"] = square
    return type(image_processor).from_dict(settings)


def check_first_example(inputs: Dataset, image_column: str, max_value: float | None) -> None:
    """Check the first example of `preprocess`, before training starts."""
    inputs[0]
    file = inputs.with_format(None)[0][image_column]
    if max_value is not None and not is_deep(Image().decode_example(file)):
        logger.warning(f"image_max_value={max_value:g}: no effect on images of 8 bits, such as the first one.")
