"""MNIST-1D as images: the sequence that a ViT sees, and the dataset that is written."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import ROOT
from hf_gr.data.images import find_image_column, find_label_column, load_image_dataset, split_train_eval
from hf_gr.models.presets import create_vit

spec = importlib.util.spec_from_file_location("make_mnist1d", ROOT / "benchmarks" / "make_mnist1d.py")
make_mnist1d = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_mnist1d)
#: Each of 64 values as a shade of gray of its own, in multiples of 4.
RAMP = (np.arange(64) * 4) / 255 * 8 - 4


def test_a_patch_of_the_vit_holds_four_consecutive_values():
    """A projection that passes one pixel of its patch on shows the patches in the order of the sequence."""
    (image,) = torch.as_tensor(make_mnist1d.as_images(RAMP[None]), dtype=torch.float32)
    projection = create_vit("vit-micro", ["a", "b"]).vit.embeddings.patch_embeddings.projection
    for position in range(4):
        with torch.no_grad():
            projection.weight.zero_()
            projection.weight[0, 0].view(-1)[position] = 1
        patches = projection(image.expand(1, 3, 8, 8)).flatten(2)[0, 0]
        assert patches.tolist() == [4 * (4 * patch + position) for patch in range(16)]


def test_what_is_beyond_black_and_white_is_clipped():
    image = make_mnist1d.as_images(np.array([[-5.0, 5.0, 0.0, 4.0] * 16]))[0]
    assert image[:2, :2].tolist() == [[0, 255], [128, 255]]


def test_the_written_dataset_is_one_of_train_vit(tmp_path, monkeypatch):
    """The package is imitated: the bench extra is not installed for the tests."""
    digits = np.arange(10)
    data = {"x": np.stack([RAMP] * 10), "y": digits, "x_test": np.stack([-RAMP] * 10), "y_test": digits}
    fake = ModuleType("mnist1d.data")
    fake.get_dataset_args = SimpleNamespace
    fake.make_dataset = lambda args: data if args.final_seq_length == 64 else {}
    monkeypatch.setitem(sys.modules, "mnist1d", ModuleType("mnist1d"))
    monkeypatch.setitem(sys.modules, "mnist1d.data", fake)
    monkeypatch.setattr(sys, "argv", ["make_mnist1d.py", str(tmp_path / "out")])
    make_mnist1d.main()
    dataset = load_image_dataset(str(tmp_path / "out"))
    assert find_image_column(dataset["train"].features) == "image"
    assert find_label_column(dataset["train"].features) == ("label", [str(digit) for digit in range(10)])
    train, test, split = split_train_eval(dataset, "label", None, 0)
    assert (len(train), len(test), split) == (10, 10, "test")
    assert np.asarray(train[3]["image"]).tolist() == make_mnist1d.as_images(RAMP[None])[0].tolist()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf_gr\[bench\]'"):
        make_mnist1d.generate()
