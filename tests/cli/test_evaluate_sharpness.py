"""evaluate_sharpness.py on what the training scripts wrote, offline."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import AutoModelForImageClassification

from helpers.scripts import load_script
from hf_gr.analysis import hessian_trace, sam_sharpness

QUIET = ("--use_cpu", "--report_to", "none", "--gr_lambda", 0, "--save_strategy", "no")


def call(script, *argv):
    load_script(script).main([str(word) for word in argv])


def evaluate(folder, *argv):
    """The content of sharpness.json."""
    call("evaluate_sharpness", *argv, "--device", "cpu", "--output_dir", folder)
    return json.loads((folder / "sharpness.json").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A dataset without a test split, and two runs on it."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"image": list(pixels), "label": [0, 1, 2] * 40}, features=features).to_parquet(
        folder / "data.parquet"
    )
    data = ("--dataset_name", folder / "data.parquet")
    for steps in (2, 12):
        call("train_vit", *data, "--model", "vit-micro", "--eval_fraction", 0.3, "--max_steps", steps,
             "--learning_rate", 3e-3, "--output_dir", folder / f"run-{steps}", *QUIET)  # fmt: skip
    return folder, data


def test_classifiers_side_by_side(images, tmp_path, capsys):
    folder, data = images
    runs = [folder / "run-2", folder / "run-12"]
    capsys.readouterr()
    found = evaluate(tmp_path, *runs, *data, "--quantities", "sam", "trace", "--batches", 2, "--batch_size", 10,
                     "--samples", 2, "--r", 0.1, "--seed", 3)  # fmt: skip
    text = (tmp_path / "sharpness.md").read_text()
    assert capsys.readouterr().out == text
    assert found["batches"] == 2 and found["r"] == 0.1 and list(found["checkpoints"]) == [*map(str, runs)]
    for run in runs:
        checkpoint = found["checkpoints"][str(run)]
        assert checkpoint["examples"] == 20 and checkpoint["split"] == "train"
        assert checkpoint["results"]["sam"]["standard_error"] == 0 < checkpoint["results"]["trace"]["standard_error"]
    first, second = (found["checkpoints"][str(run)]["results"] for run in runs)
    assert first != second
    trace = first["trace"]
    cell = f"{trace['value']:.4g} ± {trace['standard_error']:.2g}"
    assert "| quantity | value, run-2 | value, run-12 |" in text and f"| trace: tr(H) | {cell} |" in text


def test_the_training_data_are_those_that_the_run_had(images, tmp_path):
    """Less what it held out, and with its wrong labels."""
    _, data = images
    flags = ("--label_noise", 0.4, "--label_noise_type", "pairflip", "--validation_fraction", 0.25, "--seed", 7,
             "--max_train_samples", 60)  # fmt: skip
    train = load_script("train_vit")
    seen = {}

    class Keep(train.ImageTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen["labels"] = [row["labels"] for row in self.train_dataset]
            seen["pixels"] = self.train_dataset[3]["pixel_values"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ImageTrainer", Keep)
        call(
            "train_vit",
            *data,
            "--model",
            "vit-micro",
            "--max_steps",
            1,
            "--output_dir",
            tmp_path / "run",
            *flags,
            *QUIET,
        )
    script = load_script("evaluate_sharpness")
    options, kind = script.parse_args([str(tmp_path / "run"), *map(str, data), "--device", "cpu"])
    rows = kind.load_data(script.load_checkpoint(str(tmp_path / "run"), kind, options), options, True)[0]
    assert [row["labels"] for row in rows] == seen["labels"] and len(rows) == 45
    assert set(rows[0]) == {"pixel_values", "labels"}
    assert np.allclose(np.asarray(rows[3]["pixel_values"]), np.asarray(seen["pixels"]))


def test_values_are_those_of_the_held_out_images(images, tmp_path):
    folder, data = images
    found = evaluate(tmp_path, folder / "run-12", *data, "--split", "eval", "--quantities", "sam", "trace",
                     "--samples", 2)  # fmt: skip
    checkpoint = found["checkpoints"][str(folder / "run-12")]
    assert checkpoint["examples"] == 36 and checkpoint["split"] == "0.3 of train"
    script = load_script("evaluate_sharpness")
    options, kind = script.parse_args([str(folder / "run-12"), *map(str, data), "--device", "cpu"])
    model = AutoModelForImageClassification.from_pretrained(folder / "run-12")
    rows = kind.load_data(script.load_checkpoint(str(folder / "run-12"), kind, options), options, False)[0]
    batch = {
        "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    loss = lambda model, batch: model(**batch).loss  # noqa: E731
    results = checkpoint["results"]
    assert results["sam"]["value"] == pytest.approx(sam_sharpness(model, loss, [batch]).value, rel=1e-4)
    assert results["trace"]["value"] == pytest.approx(hessian_trace(model, loss, [batch], 2).value, rel=1e-3)


def test_a_language_model(tmp_path):
    text = "\n\n".join(f"line {i}: the quick brown fox jumps over {i % 11} lazy dogs." for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    data = ("--dataset_name", tmp_path / "text.txt")
    call("pretrain_llama", *data, "--vocab_size", 300, "--eval_documents", 30, "--block_size", 32, "--max_steps", 2,
         "--per_device_train_batch_size", 4, "--ire_kappa", 0, "--output_dir", tmp_path / "run", *QUIET)  # fmt: skip
    found = evaluate(tmp_path, tmp_path / "run", *data, "--quantities", "sam", "--batches", 2, "--batch_size", 3)
    (checkpoint,) = found["checkpoints"].values()
    assert checkpoint["examples"] == 6 and checkpoint["results"]["sam"]["value"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--quantities", "top", "--r", 0.1), "r=0.1 has no effect with --quantities top"),
        (("--quantities", "sam", "--method", "exact"), "method=exact has no effect with --quantities sam"),
        (("--batches", 0), "batches=0"),
        (("--sigma", -1), "sigma=-1"),
        (("--block_size", 4), "block_size=4 has no effect with an image classifier"),
    ],
)
def test_mistakes(images, flags, message):
    folder, data = images
    with pytest.raises(ValueError, match=message):
        call("evaluate_sharpness", folder / "run-2", *data, *flags)
