"""Measure how well the features of trained image models tell classes apart, whatever they were trained for.

    python scripts/evaluate_features.py FOLDER                                 # of any script that trains images
    python scripts/evaluate_features.py out/lars out/tvlars --output_dir out   # side by side
    python scripts/evaluate_features.py FOLDER --random_weights 3 --pixels --dataset_name FILE_FOLDER_OR_HUB_NAME

Where hf_gr is installed, `hf-gr features` is the same command.

The features are what the last linear layer of an image classifier gets, or the output of the backbone of a Barlow Twins
model: in evaluation mode, of images that are neither flipped nor cropped. knn predicts the class of an evaluation image
from the --k training images with the most similar features, each with the weight exp(cosine similarity /
--temperature). probe is logistic regression on the features, each scaled to zero mean and unit variance, fitted by
L-BFGS with the penalty norm(W)^2 / (2 C): no learning rate, no schedule.

--random_weights adds controls: the architecture of the first checkpoint with random weights, the running statistics of
its BatchNorm taken from the training images. --pixels adds another: the pixels themselves, as the first checkpoint gets
them.

Without a test split, the evaluation data are what the run held out of its training data, by the seed in its run.json.
The training images are those of the run, up to its --max_train_samples, with their right labels. With --output_dir the
table is also written to features.md, and all results to features.json.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, default_data_collator, set_seed
from transformers.modeling_outputs import ImageClassifierOutput

from ..analysis.features import knn_predictions, linear_probe
from ..checks import COUNT, POSITIVE, check_ranges
from ..cli import script
from ..cli.checkpoints import (
    IMAGES,
    REMEDY,
    TEXT,
    TRAINING_PART,
    Checkpoint,
    add_checkpoints,
    add_data,
    check_data,
    images_of,
    kind_of,
    labels,
    load_checkpoint,
    refuse_repeated,
    settings_of,
)
from ..cli.output_folder import require_writable
from ..errors import explained, extra
from ..models.barlow_twins import BarlowTwinsConfig, BarlowTwinsForPretraining, remove_head

with extra("scripts"):
    from datasets import Dataset

logger = logging.getLogger(__name__)

METHODS = ("knn", "probe")
RECORDED = ("dataset_name", "methods", "k", "temperature", "probe_c", "seed")
#: flag -> the method that it belongs to.
NEEDS = {"k": "knn", "temperature": "knn", "probe_c": "probe", "probe_iterations": "probe"}
DEFAULTS = {"k": 200, "temperature": 0.1, "probe_c": 1.0, "probe_iterations": 1000}
#: Result -> its row in the table; all are shares.
SHOWN = {
    "knn_accuracy": "kNN, accuracy",
    "probe_accuracy": "linear probe, accuracy",
    "probe_train_accuracy": "linear probe, accuracy on its training images",
}


class Split(NamedTuple):
    """The features of a split, and its labels."""

    features: Tensor
    labels: Tensor


def load(name: str, options: argparse.Namespace) -> Checkpoint:
    """A checkpoint whose model has no head: its logits are its features."""
    with explained(f"checkpoint={name!r} could not be loaded", REMEDY):
        config = AutoConfig.from_pretrained(name)
    if isinstance(config, BarlowTwinsConfig):
        with explained(f"checkpoint={name!r} could not be loaded", REMEDY):
            model = BarlowTwinsForPretraining.from_pretrained(name, dtype="float32").backbone
        with explained(f"device={options.device!r} cannot be used", "Give cpu, or cuda where there is a GPU."):
            model.to(options.device)
        checkpoint = Checkpoint(name, model.eval(), settings_of(name, options.dataset_name))
    elif kind_of(name) is not IMAGES:
        raise ValueError(f"checkpoint={name!r} is {kind_of(name).name}. Give an image classifier or a Barlow Twins.")
    else:
        checkpoint = load_checkpoint(name, IMAGES, options)
        remove_head(checkpoint.model)
    settings = {flag: value for flag, value in checkpoint.settings.items() if flag not in TRAINING_PART}
    return checkpoint._replace(settings=settings)


class Pixels(NamedTuple):
    """A model whose features are its input."""

    device: torch.device

    def __call__(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=pixel_values.flatten(1))


@torch.no_grad()
def features_of(model: PreTrainedModel | Pixels, images: Dataset, batch_size: int) -> Split:
    parts = [
        (model(pixel_values=batch["pixel_values"].to(model.device)).logits, batch["labels"])
        for batch in DataLoader(images, batch_size, collate_fn=default_data_collator)
    ]
    features, labels = map(torch.cat, zip(*parts, strict=True))
    return Split(features, labels.to(features.device))


def with_random_weights(checkpoint: Checkpoint, images: Dataset, seed: int, batch_size: int) -> PreTrainedModel:
    """Its architecture, freshly initialized."""
    set_seed(seed)
    model = AutoModelForImageClassification.from_config(checkpoint.model.config).to(checkpoint.model.device)
    remove_head(model)
    loader = DataLoader(images, batch_size, collate_fn=default_data_collator)
    update_bn((batch["pixel_values"] for batch in loader), model, checkpoint.model.device)
    return model.eval()


def evaluate(name: str, options: argparse.Namespace, is_first: bool) -> dict[str, Any]:
    """Name -> what features.json says of it: of a checkpoint, and of the controls if it is the first."""
    checkpoint = load(name, options)
    of_training = argparse.Namespace(**{**vars(options), "max_examples": options.max_train_examples})
    training, *_ = images_of(checkpoint, of_training, is_training=True)
    images, split, label_names = images_of(checkpoint, options)
    if "knn" in options.methods and options.k > len(training):
        logger.warning(f"k={options.k}: {name} has only {len(training)} training images, and all of them vote.")
    models: dict[str, Any] = {name: checkpoint.model}
    for seed in range(options.seed, options.seed + options.random_weights if is_first else 0):
        models[f"random weights {seed}"] = with_random_weights(checkpoint, training, seed, options.batch_size)
    if options.pixels and is_first:
        models["pixels"] = Pixels(checkpoint.model.device)
    found = {}
    for key, model in models.items():
        train, test = (features_of(model, part, options.batch_size) for part in (training, images))
        found[key] = {
            "split": split,
            "examples": len(images),
            "train_examples": len(training),
            "features": train.features.shape[1],
            **measure(train, test, len(label_names), options),
        }
    return found


def measure(train: Split, test: Split, classes: int, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "knn" in options.methods:
        predicted = knn_predictions(*train, test.features, classes, options.k, options.temperature)
        found |= {"k": min(options.k, len(train.labels)), "knn_accuracy": _share(predicted == test.labels)}
    if "probe" in options.methods:
        probe = linear_probe(*train, test.features, options.probe_c, options.probe_iterations)
        found |= {
            "probe_accuracy": _share(probe.predictions == test.labels.cpu()),
            "probe_train_accuracy": probe.train_accuracy,
            "probe_iterations": probe.iterations,
            "probe_has_converged": probe.has_converged,
        }
    return found


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def report(options: argparse.Namespace, checkpoints: dict[str, Any]) -> str:
    """The content of features.md: a row per quantity, a column per model."""
    lines = [
        f"- {name}: {found['features']} features; {found['examples']:,} images of {options.dataset_name}, split "
        f"{found['split']}, and {found['train_examples']:,} training images"
        + ("" if found.get("probe_has_converged", True) else f"; the probe stopped after {found['probe_iterations']} "
           "iterations, before it converged")
        + "."
        for name, found in checkpoints.items()
    ]  # fmt: skip
    names = labels(list(checkpoints))
    rows = [["quantity", *("value" + names[name] for name in checkpoints)], ["---"] * (1 + len(checkpoints))]
    rows += [
        [title, *(f"{100 * found[key]:.2f} %" for found in checkpoints.values())]
        for key, title in SHOWN.items()
        if all(key in found for found in checkpoints.values())
    ]
    return "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in rows)])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoints(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    parser.add_argument("--k", type=int, help="nearest neighbors that vote (default: 200)")
    parser.add_argument("--temperature", type=float, help="of their votes (default: 0.1)")
    parser.add_argument("--probe_c", type=float, help="C of the probe, the inverse of its penalty (default: 1)")
    parser.add_argument("--probe_iterations", type=int, help="L-BFGS stops there at the latest (default: 1000)")
    parser.add_argument("--random_weights", type=int, default=0, help="number of controls (default: 0)")
    parser.add_argument("--pixels", action="store_true", help="add the pixels themselves as a control")
    parser.add_argument("--max_train_examples", type=int, help="use at most this many training images")
    parser.add_argument("--seed", type=int, default=0, help="of the controls and --max_*examples (default: 0)")
    add_data(parser, "features")
    options = parser.parse_args(argv)
    check_data(options)
    check_ranges(options, dict.fromkeys(("k", "probe_iterations", "max_train_examples"), COUNT))
    check_ranges(options, {"temperature": POSITIVE, "probe_c": POSITIVE})
    if options.random_weights < 0:
        raise ValueError(f"random_weights={options.random_weights}: give the number of controls, or leave it out.")
    script.refuse(options, TEXT.flags, "an image model")
    for name, method in NEEDS.items():
        if method not in options.methods:
            script.refuse(options, (name,), f"--methods {' '.join(options.methods)}")
        elif getattr(options, name) is None:
            setattr(options, name, DEFAULTS[name])
    refuse_repeated(options.checkpoints)
    for name, default in (("dataset_name", IMAGES.default_dataset), ("batch_size", 256)):
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    if options.output_dir is not None:
        require_writable(options.output_dir)
    checkpoints: dict[str, Any] = {}
    for name in options.checkpoints:
        checkpoints |= evaluate(name, options, is_first=not checkpoints)
    text = report(options, checkpoints)
    print(text)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        content = {key: getattr(options, key) for key in RECORDED} | {"checkpoints": checkpoints}
        (folder / "features.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "features.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    script.run(main)
