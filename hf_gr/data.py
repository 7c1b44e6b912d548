"""Image data: loading, finding the columns and splits, preprocessing, augmentation."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from torch import Tensor, nn
from torch.nn import functional as F

from .mistakes import explained

EVAL_SPLITS = ("test", "validation", "valid")
DIGITS_EVAL_SIZE = 360


def load_image_dataset(name: str, config: str | None = None) -> DatasetDict:
    """`digits`, a parquet file, a folder (of parquet files, or of images in one folder per class), or a Hub data set.

    `digits` comes with scikit-learn: 1,797 scans of handwritten digits, 8 x 8 pixels in 17 shades of gray. Its split is
    ours: 360 test images, drawn per class with a fixed seed.
    """
    if name == "digits":
        if config is not None:
            raise ValueError(f"dataset_config_name={config!r}: 'digits' has no configurations. Leave it out.")
        return _load_digits()
    if name.endswith(".parquet") and config is not None:
        raise ValueError(f"dataset_config_name={config!r}: a file has no configurations. Leave it out.")
    remedy = (
        "Give 'digits' (embedded), a parquet file, a folder with parquet files or with one folder of images per class, "
        "or the name of a dataset on the Hub that can be reached from here."
    )
    with explained(f"dataset_name={name!r} could not be loaded", remedy):
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files=name)
        return load_dataset(name, config)


def _load_digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    scans = load_digits()
    # Intensities are counts from 0 to 16.
    images = (scans.images * (255 / 16)).round().astype("uint8")
    dataset = Dataset.from_dict(
        {"image": list(images), "label": scans.target},
        features=Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])}),
    )
    return dataset.train_test_split(test_size=DIGITS_EVAL_SIZE, stratify_by_column="label", seed=0)


def find_image_column(features: Features, name: str | None = None) -> str:
    """The column to take images from: `name`, or the only one of type `Image`."""
    if name is not None:
        if name not in features:
            raise ValueError(
                f"image_column_name={name!r} is not a column of the data set, which has {_list(features)}."
            )
        if not isinstance(features[name], Image):
            raise ValueError(f"image_column_name={name!r} holds {_type(features[name])}, not images.")
        return name
    return _only_column(features, Image, "image", "image_column_name")


def find_label_column(features: Features, name: str | None = None) -> tuple[str, list[str]]:
    """The column to take classes from, and the names of the classes: `name`, or the only one of type `ClassLabel`."""
    if name is not None and name not in features:
        raise ValueError(f"label_column_name={name!r} is not a column of the data set, which has {_list(features)}.")
    if name is None:
        name = _only_column(features, ClassLabel, "class label", "label_column_name")
    if not isinstance(features[name], ClassLabel):
        raise ValueError(
            f"label_column_name={name!r} holds {_type(features[name])}, not class labels. Give the column its classes, "
            f"dataset = dataset.class_encode_column({name!r}), and save the data set again."
        )
    return name, features[name].names


def _only_column(features: Features, kind: type, what: str, flag: str) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{column} ({_type(feature)})" for column, feature in features.items())
    if not found:
        raise ValueError(f"The data set has no {what} column; its columns are {columns}. Name one with --{flag}.")
    raise ValueError(f"The data set has several {what} columns: {', '.join(found)}. Choose one with --{flag}.")


def _type(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _list(features: Features) -> str:
    return ", ".join(features)


def split_train_eval(
    dataset: DatasetDict, label_column: str, eval_fraction: float | None, seed: int
) -> tuple[Dataset, Dataset, str]:
    """(train, evaluation, name of the evaluation split).

    The evaluation split is `test`, `validation` or `valid`, whichever is there first with labels (benchmarks hide those
    of their test split, and put -1). Without any, it is a share of `train`, drawn per class with `seed`: 10 % unless
    `eval_fraction` says otherwise.
    """
    if "train" not in dataset:
        raise ValueError(f"The data set has no split 'train', only {', '.join(dataset)}.")
    for name in EVAL_SPLITS:
        if name in dataset and _is_labelled(dataset[name], label_column):
            if eval_fraction is not None:
                raise ValueError(
                    f"eval_fraction={eval_fraction} has no effect: the data set has a split {name!r} to evaluate on. "
                    "Leave it out."
                )
            return dataset["train"], dataset[name], name
    fraction = 0.1 if eval_fraction is None else eval_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction}: must be a share between 0 and 1.")
    parts = dataset["train"].train_test_split(test_size=fraction, stratify_by_column=label_column, seed=seed)
    return parts["train"], parts["test"], f"{fraction:g} of train"


def _is_labelled(dataset: Dataset, label_column: str) -> bool:
    label = dataset.select_columns([label_column])[0][label_column] if len(dataset) else None
    return label is not None and label >= 0


def keep_first(dataset: Dataset, count: int | None, seed: int, flag: str) -> Dataset:
    """`count` examples of a shuffled `dataset`, or all if `count` is None. `flag` is named in errors."""
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise ValueError(f"{flag}={count}: give at least 1, or leave it out for all.")
    return dataset.shuffle(seed=seed).select(range(count))


def preprocess(dataset: Dataset, image_processor: Callable, image_column: str, label_column: str) -> Dataset:
    """Examples as the model takes them, made when they are asked for: `pixel_values` and `labels`."""
    transform = functools.partial(
        _to_model_inputs, image_processor=image_processor, image_column=image_column, label_column=label_column
    )
    return dataset.with_transform(transform)


def _to_model_inputs(batch: dict, image_processor: Callable, image_column: str, label_column: str) -> dict:
    images = [image.convert("RGB") for image in batch[image_column]]
    return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"], "labels": batch[label_column]}


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Each image of (n, c, h, w) shifted by up to `padding` pixels both ways, the border filled by reflection."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    image = torch.arange(n, device=images.device)
    # Advanced indices around a slice put their own axes first: (n, h, w, c).
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor) -> Tensor:
    """Each image of (n, c, h, w) mirrored left to right, or not, with equal chance."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(-1), images)


def add_augmentation(model: nn.Module, *, flip: bool, crop_padding: int) -> None:
    """Let `model` augment its own `pixel_values` in training mode: flip, then crop, as the released code of GR does.

    Done in the forward pass, on the model's device and from the training's random stream, so that both passes of GR
    see the same images and a resumed run the ones it would have seen. In the data loader neither would hold.
    """
    if flip or crop_padding:
        model.register_forward_pre_hook(
            functools.partial(_augment, flip=flip, crop_padding=crop_padding), with_kwargs=True
        )


def _augment(module: nn.Module, args: tuple, kwargs: dict, *, flip: bool, crop_padding: int) -> tuple[tuple, dict]:
    if module.training:
        images = kwargs["pixel_values"]
        images = random_flip(images) if flip else images
        kwargs["pixel_values"] = random_crop(images, crop_padding) if crop_padding else images
    return args, kwargs
