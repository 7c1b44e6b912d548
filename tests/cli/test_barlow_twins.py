"""pretrain_barlow_twins.py, its trainer, and evaluate_features.py on what it wrote."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers import Trainer as PlainTrainer

from helpers import scripts, toys
from helpers.scripts import load_script
from hf_gr import GRConfig
from hf_gr.analysis.features import knn_predictions
from hf_gr.cli.barlow_twins import BarlowTwinsTrainer, Views
from hf_gr.data.augmentation import Augmentation
from hf_gr.models import BarlowTwinsForPretraining
from hf_gr.models.barlow_twins import remove_head
from hf_gr.models.presets import create_image_model
from hf_gr.reporting.record import read_record

FLAGS = ("--model", "resnet-20", "--image_size", 8, "--projector_sizes", 12, 8, "--per_device_train_batch_size", 20,
         "--knn_k", 500, "--eval_fraction", 0.3, "--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2,
         "--learning_rate", 0.01, "--logging_steps", 1)  # fmt: skip
QUIET = ("--use_cpu", "--report_to", "none", "--save_strategy", "no")


def call(name, *argv):
    load_script(name).main([str(word) for word in argv])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset without a test split."""
    path = tmp_path_factory.mktemp("images") / "data.parquet"
    pixels = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict({"image": list(pixels), "label": [0, 1, 2] * 40}, features=features).to_parquet(path)
    return ("--dataset_name", path)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "barlow"
    return folder, scripts.launch(*data, *FLAGS, *QUIET, "--output_dir", folder, script="pretrain_barlow_twins.py")


def test_run_ends_in_accuracy_pictures_and_a_backbone(run):
    folder, printed = run
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_knn_accuracy"] + results["eval_knn_error"] == 1 and "eval_loss" not in results
    assert f"kNN accuracy {100 * results['eval_knn_accuracy']:.2f} % on 36 images, with 84 neighbors." in printed
    assert "knn_k=500: there are only 84 training images" in printed
    for name in ("views.png", "cross_correlation.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_knn_error" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 4]
    assert all(entry["evaluated_examples"] == 36 for entry in evaluations)
    classifier = AutoModelForImageClassification.from_pretrained(folder / "backbone")
    assert classifier.config.id2label == {0: "a", 1: "b", 2: "c"}
    remove_head(classifier.eval())
    model, images = BarlowTwinsForPretraining.from_pretrained(folder).eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images).features, classifier(images).logits)
    assert AutoImageProcessor.from_pretrained(folder / "backbone").size == {"height": 8, "width": 8}


def test_card_says_what_was_done(run):
    folder, _ = run
    card, results = (folder / "README.md").read_text(), json.loads((folder / "all_results.json").read_text())
    assert "pipeline_tag: image-feature-extraction" in card and "without labels, by Barlow Twins" in card
    assert f"| knn_accuracy | {results['eval_knn_accuracy']:.4g} |" in card and "w = 0.0051" in card
    assert "| `projector_sizes` | [12, 8] |" in card and "zbontar2021barlow" in card and "TVLARS" in card
    assert "![Training images, and the two views of each](views.png)" in card
    assert "two views of 20 training images" in card
    assert f"{results['correlation_diagonal']:.3f} on the diagonal, {results['correlation_off_diagonal']:.3f}" in card
    assert "predicted by the 84 training images" in card and "exp(cosine similarity / 0.1)" in card
    facts = read_record(folder).further
    assert set(facts["pictures"]) == {"views.png", "cross_correlation.png"}
    assert facts["barlow_twins"] == {"off_diagonal_weight": 0.0051, "k": 84, "temperature": 0.1}


def test_code_of_the_card_runs(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    (code,) = re.findall(r"## How to use\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    PILImage.new("L", (20, 30)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    Path("barlow").symlink_to(folder)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("tensor([[")


@pytest.mark.distributed
def test_two_processes_evaluate_all_images(data, tmp_path):
    """With a learning rate of 0 the features are those of one process, and so are their neighbors."""
    flags = (*data, "--model", "vit-micro", "--projector_sizes", 8, "--per_device_eval_batch_size", 7,
             "--eval_fraction", 0.3, "--max_steps", 1, "--learning_rate", 0, "--knn_k", 9, *QUIET)  # fmt: skip
    accuracies = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        batch = ("--per_device_train_batch_size", 20 // processes)
        scripts.launch(*flags, *batch, "--output_dir", folder, processes=processes, script="pretrain_barlow_twins.py")
        accuracies.append(json.loads((folder / "all_results.json").read_text())["eval_knn_accuracy"])
        (entry, *_) = [e for e in read_record(folder).log.history if "eval_knn_error" in e]
        assert entry["evaluated_examples"] == 36 and read_record(folder).recorded[-1].batch_size == 20
    assert accuracies[0] == accuracies[1]


def test_features_side_by_side(run, data, tmp_path, capsys):
    folder, _ = run
    capsys.readouterr()
    call("evaluate_features", folder, folder / "backbone", *data, "--random_weights", 1, "--pixels",
         "--device", "cpu", "--output_dir", tmp_path)  # fmt: skip
    found, table = json.loads((tmp_path / "features.json").read_text()), (tmp_path / "features.md").read_text()
    assert capsys.readouterr().out == table
    mine, control, pixels, backbone = found["checkpoints"].values()
    assert list(found["checkpoints"])[1:3] == ["random weights 0", "pixels"] and pixels["features"] == 3 * 8 * 8
    # The backbone's folder has no run.json, and so another seed and fraction of held-out images.
    assert (mine["examples"], mine["train_examples"], mine["split"]) == (36, 84, "0.3 of train")
    assert backbone["examples"] == 12 and control["examples"] == 36 and control["knn_accuracy"] != mine["knn_accuracy"]
    assert mine["k"] == 84 and mine["features"] == 64 and mine["probe_train_accuracy"] > mine["probe_accuracy"]
    results = json.loads((folder / "all_results.json").read_text())
    assert mine["knn_accuracy"] == results["eval_knn_accuracy"]
    assert f"| kNN, accuracy | {100 * mine['knn_accuracy']:.2f} % |" in table


def test_features_of_a_classifier_and_fewer_images(run, data, tmp_path):
    folder, _ = run
    call("train_vit", *data, "--model_name_or_path", folder / "backbone", "--max_steps", 2, "--eval_fraction", 0.3,
         "--gr_lambda", 0, *QUIET, "--output_dir", tmp_path / "tuned")  # fmt: skip
    call("evaluate_features", tmp_path / "tuned", *data, "--methods", "knn", "--k", 3, "--max_train_examples", 30,
         "--max_examples", 10, "--output_dir", tmp_path, "--device", "cpu")  # fmt: skip
    (found,) = json.loads((tmp_path / "features.json").read_text())["checkpoints"].values()
    assert (found["k"], found["train_examples"], found["examples"]) == (3, 30, 10)
    assert "probe_accuracy" not in found


def test_pretraining_goes_on_from_a_backbone(run, data, tmp_path):
    folder, _ = run
    call("pretrain_barlow_twins", *data, "--model_name_or_path", folder / "backbone", "--projector_sizes", 12, 8,
         "--max_steps", 1, "--learning_rate", 0, "--eval_fraction", 0.3, "--per_device_train_batch_size", 20, *QUIET,
         "--output_dir", tmp_path)  # fmt: skip
    before, after = (BarlowTwinsForPretraining.from_pretrained(path).backbone for path in (folder, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert "trained from a local checkpoint" in (tmp_path / "README.md").read_text()


BAD = [
    (["--crop_scale", 0.5], ["crop_scale=[0.5]", "give 2 numbers"]),
    (["--crop_scale", 0.5, 2], ["crop_scale=(0.5, 2.0)", "shares between 0 and 1"]),
    (["--color_jitter", 0.4, 0.4, 0.2], ["color_jitter=[0.4, 0.4, 0.2]", "give 4 numbers"]),
    (["--color_jitter", 0.4, 0.4, 0.2, 0.9], ["color_jitter", "hue"]),
    (["--blur", 2, 0], ["blur=[2.0, 0.0]", "probabilities from 0 to 1"]),
    (["--blur", 0, 0, "--blur_sigma", 1, 2], ["blur_sigma=[1.0, 2.0]", "no effect with blur=[0.0, 0.0]"]),
    (["--grayscale", 1.5], ["grayscale=1.5"]),
    (["--projector_sizes", 8, 1], ["projector_sizes=[8, 1]", "2 or more"]),
    (["--off_diagonal_weight", -1], ["off_diagonal_weight=-1"]),
    (["--knn_k", 0], ["knn_k=0"]),
    (["--knn_temperature", 0], ["knn_temperature=0"]),
    (["--label_noise", 0.4], ["--label_noise", "there is no such flag"]),
    (["--model", "vit-micro", "--stem", "cifar"], ["stem=cifar", "no effect with model='vit-micro'"]),
    (["--label_smoothing_factor", 0.1], ["label_smoothing_factor=0.1 has no effect", "Set it to 0"]),
    (["--per_device_train_batch_size", 2000], ["dataloader_drop_last=True", "Lower per_device_train_batch_size"]),
]


def test_a_run_that_ends_before_its_last_metrics_is_not_finished(data, tmp_path, monkeypatch):
    """compare.py takes a run with trainer_state.json for finished, and would never repeat it."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BarlowTwinsTrainer, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        call("pretrain_barlow_twins", *data, *FLAGS, *QUIET, "--output_dir", tmp_path)
    assert (tmp_path / "eval_results.json").is_file() and not (tmp_path / "trainer_state.json").exists()


@pytest.mark.parametrize(("flags", "words"), BAD, ids=lambda value: str(value[0]))
def test_bad_inputs(flags, words, tmp_path):
    scripts.check(load_script("pretrain_barlow_twins").main, ["--output_dir", tmp_path, *flags], *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "knn", "--probe_c", 1), "probe_c=1.0 has no effect with --methods knn"),
        (("--methods", "probe", "--k", 1), "k=1 has no effect with --methods probe"),
        (("--k", 0), "k=0"),
        (("--random_weights", -1), "random_weights=-1"),
        (("--block_size", 4), "block_size=4 has no effect with an image model"),
        (("--max_train_examples", 0), "max_train_examples=0"),
    ],
)
def test_bad_inputs_of_evaluate_features(flags, message, run, data):
    with pytest.raises(ValueError, match=message):
        call("evaluate_features", run[0], *data, *flags)


def test_checkpoints_that_are_no_image_models(run, data, tmp_path):
    toys.llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a causal language model. Give an image classifier or a Barlow Twins"):
        call("evaluate_features", tmp_path, *data)
    with pytest.raises(ValueError, match="is given twice"):
        call("evaluate_features", run[0], run[0], *data)
    with pytest.raises(ValueError, match="could not be loaded"):
        call("evaluate_features", tmp_path / "none", *data)


# ---- The trainer ----


def trainer_of(folder, cls=BarlowTwinsTrainer, preset="resnet-20", **flags) -> BarlowTwinsTrainer:
    torch.manual_seed(0)
    model = BarlowTwinsForPretraining.of(create_image_model(preset, ["a", "b"]), projector_sizes=[8, 6])
    augmentation = Augmentation((0.5,) * 3, (0.5,) * 3, crop_scale=(0.3, 1.0), flip=0.5)
    rows = Dataset.from_list([{**row, "labels": row["labels"] % 2} for row in toys.images(24)]).with_format("torch")
    settings = {"per_device_train_batch_size": 8, "label_names": ["labels"], "remove_unused_columns": False, **flags}
    args = GRConfig(**toys.arguments(folder, **settings))
    return cls(model, args, train_dataset=rows, eval_dataset=rows.select(range(10)), memory=rows, classes=2,
               views=Views(augmentation, augmentation), k=5)  # fmt: skip


class Seen(BarlowTwinsTrainer):
    """Keeps the views of all passes."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)
        self.model.register_forward_pre_hook(
            lambda module, args, kwargs: (
                self.seen.append(kwargs["pixel_values"].clone()) if "second_pixel_values" in kwargs else None
            ),
            with_kwargs=True,
        )


def test_both_passes_of_gr_see_the_same_views(tmp_path):
    trainer = trainer_of(tmp_path, Seen, max_steps=2, gr_warmup="none")
    trainer.train()
    first, again, second, _ = trainer.seen
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(first, torch.stack([trainer.memory[i]["pixel_values"] for i in range(8)]))


def test_ire_takes_the_gradient_of_the_loss(tmp_path):
    """That of the views that the step is about to see, in evaluation mode."""
    estimates = []

    class Kept(Seen):
        def ire_sampled_losses(self, model, inputs, generator):
            losses = super().ire_sampled_losses(model, inputs, generator)
            estimates.append((losses.shape, losses.mean().item(), model.training))
            return losses

    flags = {"gr_lambda": 0, "ire_kappa": 1.0, "ire_start_step": 0, "ire_interval": 2, "max_steps": 4}
    trainer = trainer_of(tmp_path, Kept, **flags)
    trainer.train()
    assert [shape for shape, _, _ in estimates] == [torch.Size([8])] * 2 and not any(mode for *_, mode in estimates)
    assert len(trainer.seen) == 6 and torch.equal(trainer.seen[0], trainer.seen[1])
    masks = trainer.ire_optimizer.flat_fraction
    assert masks == pytest.approx(0.6, abs=0.01)


def test_resumed_run_sees_the_views_it_would_have_seen(tmp_path):
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gr_warmup": "none", "optim": "lars"}
    whole = trainer_of(tmp_path, **flags)
    whole.train()
    resumed = trainer_of(tmp_path, **flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluation_is_that_of_all_features_and_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path, preset="vit-micro", per_device_eval_batch_size=4)
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())
    images = torch.stack([row["pixel_values"] for row in trainer.memory])
    labels = torch.stack([row["labels"] for row in trainer.memory])
    with torch.no_grad():
        features = trainer.model.eval()(images).features
    predicted = knn_predictions(features, labels, features[:10], 2, 5)
    assert metrics["eval_knn_accuracy"] == (predicted == labels[:10]).double().mean().item()
    assert issubclass(BarlowTwinsTrainer, PlainTrainer) and "eval_loss" not in metrics


def test_sharpness_is_of_the_same_views_at_each_call(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=8)
    first, second = (trainer.sharpness(batches=1, quantities=("sam",))["sam"].value for _ in range(2))
    assert first == second > 0
