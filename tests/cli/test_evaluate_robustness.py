"""evaluate_robustness.py on what the training scripts wrote, offline. Mistakes are in test_bad_inputs_*.py."""

import json
import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from helpers.scripts import load_script
from hf_gr.models.presets import create_image_model

QUIET = ("--use_cpu", "--report_to", "none", "--gr_lambda", 0, "--save_strategy", "no")
TEXT = "\n\n".join(f"line {i}: the quick brown fox jumps over {i % 11} lazy dogs and {i % 5} cats." for i in range(200))


def call(script: str, *argv) -> None:
    load_script(script).main([str(word) for word in argv])


def evaluate(folder, *argv) -> dict:
    """The content of robustness.json."""
    call("evaluate_robustness", *argv, "--device", "cpu", "--output_dir", folder)
    return json.loads((folder / "robustness.json").read_text())


def results_of(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A dataset without a test split, and two runs with different seeds on it."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    columns = {"image": list(generator.integers(0, 256, (120, 8, 8), dtype=np.uint8)), "label": [0, 1, 2] * 40}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "data.parquet")
    data = ("--dataset_name", folder / "data.parquet")
    for seed in (1, 2):
        call("train_vit", *data, "--model", "vit-micro", "--eval_fraction", 0.3, "--max_steps", 20, "--seed", seed,
             "--learning_rate", 3e-3, "--output_dir", folder / f"run-{seed}", *QUIET)  # fmt: skip
    return folder, data


def test_classifiers_side_by_side_on_what_each_run_held_out(images, tmp_path, capsys):
    folder, data = images
    runs = [folder / f"run-{seed}" for seed in (1, 2)]
    capsys.readouterr()
    found = evaluate(tmp_path, *runs, *data, "--bits", 8, 2, "--noise", 0.5, "--noise_samples", 3, "--seed", 7)
    assert capsys.readouterr().out == (tmp_path / "robustness.md").read_text()
    shared = {"granularity": "channel", "noise_samples": 3, "seed": 7, "dataset_name": str(data[1])}
    shared["quantizer"] = "nearest"
    assert found == {**shared, "checkpoints": found["checkpoints"]}
    for run in runs:
        checkpoint = found["checkpoints"][str(run)]
        assert checkpoint["examples"] == 36 and checkpoint["split"] == "0.3 of train"
        assert 0.9 < checkpoint["disturbed_share"] < 1
        results = checkpoint["results"]
        assert list(results) == ["none", "8 bits", "2 bits", "noise 0.5"]
        assert [len(entry["draws"]) for entry in results.values()] == [1, 1, 1, 3]
        expected = results_of(run)
        for metric, value in results["none"]["mean"].items():
            assert value == pytest.approx(expected[f"eval_{metric}"], abs=1e-6)
        assert results["none"]["mean"].keys() == {"accuracy", "error", "nll", "ece"}
        assert results["8 bits"]["mean"]["nll"] == pytest.approx(expected["eval_nll"], rel=0.02)
        assert results["8 bits"]["mean"]["nll"] != results["none"]["mean"]["nll"]
        nlls = [draw["nll"] for draw in results["noise 0.5"]["draws"]]
        assert results["noise 0.5"]["mean"]["nll"] == pytest.approx(np.mean(nlls))
        assert results["noise 0.5"]["std"]["nll"] == pytest.approx(np.std(nlls, ddof=1)) and len(set(nlls)) == 3
        assert results["2 bits"]["std"] == {}


def test_the_table(images, tmp_path):
    folder, data = images
    runs = [folder / f"run-{seed}" for seed in (1, 2)]
    found = evaluate(tmp_path, *runs, *data, "--bits", 2, "--noise", 0.5, "--noise_samples", 2, "--max_examples", 10)
    lines = (tmp_path / "robustness.md").read_text().splitlines()
    assert lines[0].startswith(f"- {runs[0]}: 10 examples of {data[1]}, split 0.3 of train; 9")
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    metrics = ("accuracy", "error", "nll", "ece")
    assert head == ["disturbance", *(f"{metric}, run-{seed}" for metric in metrics for seed in (1, 2))]
    assert [row[0] for row in rows] == ["none", "2 bits", "noise 0.5"]
    second = found["checkpoints"][str(runs[1])]["results"]
    assert rows[1][6] == f"{second['2 bits']['mean']['nll']:.4g}"
    noise = second["noise 0.5"]
    assert rows[2][6] == f"{noise['mean']['nll']:.4g} ± {noise['std']['nll']:.2g}"


def test_equal_names_are_shown_as_paths(images, tmp_path):
    folder, data = images
    shutil.copytree(folder / "run-1", tmp_path / "other" / "run-1")
    quick = ("--bits", "--noise", 1, "--noise_samples", 1, "--max_examples", 3)
    found = evaluate(tmp_path, folder / "run-1", tmp_path / "other" / "run-1", *data, *quick)
    text = (tmp_path / "robustness.md").read_text()
    assert f"accuracy, {folder / 'run-1'} | accuracy, {tmp_path / 'other' / 'run-1'}" in text
    assert "Bits" not in text and "bits" not in text
    one, other = found["checkpoints"].values()
    assert one == other  # the same noise, too
    alone = evaluate(tmp_path, folder / "run-1", *data, *quick)["checkpoints"]
    assert alone == {str(folder / "run-1"): one}
    assert "| accuracy | error |" in (tmp_path / "robustness.md").read_text()


def test_options_reach_the_disturbances(images, tmp_path):
    folder, data = images
    quick = (folder / "run-1", *data, "--max_examples", 12)

    def nlls(*flags):
        results = evaluate(tmp_path, *quick, *flags)["checkpoints"][str(folder / "run-1")]["results"]
        return {name: entry["mean"]["nll"] for name, entry in results.items()}

    base = nlls("--bits", 2, "--noise", 1, "--noise_samples", 1)
    coarse = nlls("--bits", 2, "--noise", "--granularity", "tensor")
    assert coarse.keys() == {"none", "2 bits"} and coarse["2 bits"] != base["2 bits"]
    other = nlls("--bits", "--noise", 1, "--noise_samples", 1, "--seed", 1)  # other images, too
    assert other.keys() == {"none", "noise 1"} and other["noise 1"] != base["noise 1"]
    assert nlls("--bits", 2, "--noise", 1, "--noise_samples", 1, "--batch_size", 5) == pytest.approx(base, rel=1e-4)


def test_bad_examples_are_skipped_if_asked(images, tmp_path):
    folder, _ = images
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    good = {"image": [np.zeros((8, 8), np.uint8)] * 6, "label": [0, 1, 2] * 2}
    bad = {"image": [None, *good["image"][1:]], "label": [*good["label"][:5], -1]}
    for split, columns in (("train", good), ("test", bad)):
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    argv = (folder / "run-1", "--dataset_name", tmp_path / "data", "--bits", "--noise")
    with pytest.raises(ValueError, match="split 'test', row 5"):
        evaluate(tmp_path, *argv)
    checkpoint = evaluate(tmp_path, *argv, "--skip_bad_examples")["checkpoints"][str(folder / "run-1")]
    assert checkpoint["examples"] == 4 and checkpoint["split"] == "test"


@pytest.mark.parametrize("model", ["cait-micro", "resnet-18", "wrn-10-1"])
def test_models_of_our_own_on_the_digits(model, tmp_path):
    folder = tmp_path / model
    stem = "cifar" if model == "resnet-18" else None
    create_image_model(model, [str(digit) for digit in range(10)], stem=stem).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    quick = ("--max_examples", 8, "--bits", 2, "--noise", 1e30, "--noise_samples", 2)
    checkpoint = evaluate(tmp_path, folder, *quick)["checkpoints"][str(folder)]
    assert checkpoint["split"] == "test" and checkpoint["examples"] == 8  # as much noise overflows: not an error


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "stream"])
def pretrained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    call("pretrain_llama", "--dataset_name", folder / "text.txt", "--output_dir", folder / "llama", "--vocab_size", 300,
         "--eval_documents", 30, "--block_size", 32, "--max_steps", 2, "--per_device_train_batch_size", 4, "--seed", 5,
         "--streaming", request.param, "--ire_kappa", 0, *QUIET)  # fmt: skip
    return folder


def test_a_language_model_on_what_its_run_held_out(pretrained, tmp_path):
    run = pretrained / "llama"
    argv = (run, "--dataset_name", pretrained / "text.txt", "--bits", 8, 3, "--noise", 0.5, "--noise_samples", 2)
    before = load_file(run / "model.safetensors")
    checkpoint = evaluate(tmp_path, *argv)["checkpoints"][str(run)]
    expected, results = results_of(run), checkpoint["results"]
    assert results["none"]["mean"] == pytest.approx(
        {"loss": expected["eval_loss"], "perplexity": expected["eval_perplexity"]}, rel=1e-5
    )
    assert checkpoint["examples"] == round(expected["eval_runtime"] * expected["eval_samples_per_second"])
    assert 0 < abs(results["8 bits"]["mean"]["loss"] - expected["eval_loss"]) < 0.01
    assert results["noise 0.5"]["std"]["perplexity"] > 0
    assert all((before[name] == weight).all() for name, weight in load_file(run / "model.safetensors").items())
    few = evaluate(tmp_path, *argv, "--max_examples", 3, "--block_size", 16)["checkpoints"][str(run)]
    assert few["examples"] == 3


def test_the_seed_of_the_run_is_what_makes_them_equal(pretrained, tmp_path):
    """Without run.json the evaluation data are others, and the loss is not the same."""
    run = tmp_path / "llama"
    shutil.copytree(pretrained / "llama", run)
    (run / "run.json").unlink()
    argv = (run, "--dataset_name", pretrained / "text.txt", "--bits", "--noise", "--block_size", 32)
    loss = evaluate(tmp_path, *argv)["checkpoints"][str(run)]["results"]["none"]["mean"]["loss"]
    assert loss != pytest.approx(results_of(run)["eval_loss"], rel=1e-5)
