"""Evaluate how well trained models tolerate quantization of their weights and noise on them.

    python scripts/evaluate_robustness.py FOLDER                              # an image classifier, on scans of digits
    python scripts/evaluate_robustness.py FOLDER --bits 4 3 --noise           # quantization alone
    python scripts/evaluate_robustness.py out/gr out/none --output_dir out    # side by side
    python scripts/evaluate_robustness.py LLAMA --dataset_name FILE_FOLDER_OR_HUB_NAME

Where hf_gr is installed, `hf-gr robustness` is the same command.

Image classifiers are compared by accuracy, error, negative log-likelihood (nll) and calibration error (ece), causal
language models by loss per token and perplexity. (Losses of models with different tokenizers are not comparable.)

--bits rounds weights to the nearest value of a symmetric grid: scale * round(w / scale), where scale = max|w| /
(2^(bits - 1) - 1) of each output channel. --noise adds s * std(w) * z, with z ~ N(0, 1) and the standard deviation of
each weight matrix; results are means and standard deviations over several draws. Both act on linear, convolutional and
embedding layers, and leave biases and norms alone.

Without a test split, the evaluation data are what the run held out of its training data, by the seed in its run.json.
With --output_dir the table is also written to robustness.md, and all results to robustness.json.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
)

from ..analysis.robustness import GRANULARITIES, Metrics, robustness, weight_matrices
from ..checks import COUNT, POSITIVE, Limit, check_ranges, check_value
from ..cli import script
from ..cli.output_folder import require_writable
from ..cli.trainers import perplexity
from ..data.images import (
    find_image_column,
    find_label_column,
    keep_first,
    keep_readable,
    load_image_dataset,
    number_rows,
    preprocess,
    split_train_eval,
)
from ..data.text import (
    features_of,
    find_text_column,
    load_text_dataset,
    pack,
    split_documents,
    without_null_documents,
)
from ..errors import explained, extra
from ..evaluation import classification_metrics, rank_classes
from ..models import presets  # noqa: F401  makes its own architectures known to AutoModel
from ..reporting.record import read_record

with extra("scripts"):
    from datasets import Dataset

REMEDY = "Give a folder with a model (adapters: merged into theirs), or a name on the Hub."
#: Tokens per example for a model with a longer context, unless its run had others.
MAX_BLOCK_SIZE = 1024
#: Examples of a stream, unless --max_examples is given; as in pretrain_llama.py.
MAX_STREAMED_EXAMPLES = 1000


class Checkpoint(NamedTuple):
    """A loaded checkpoint, and the settings of its run as far as they are known."""

    name: str
    model: PreTrainedModel
    settings: dict[str, Any]

    def held_out(self, size: str) -> tuple[Any, int]:
        """(size, seed) of the evaluation data that the run drew. `size` is the name of the flag; None: its default."""
        return self.settings.get(size), self.settings.get("seed", 42)


class Kind(NamedTuple):
    """A kind of model: how its checkpoints are recognized, loaded and measured.

    Attributes:
        marks: one of them is in the name of the architecture.
        flags: those without effect on other kinds.
    """

    name: str
    marks: tuple[str, ...]
    auto_class: Any
    default_dataset: str
    default_batch_size: int
    flags: tuple[str, ...]
    load_data: Callable[[Checkpoint, argparse.Namespace], tuple[Dataset, str]]
    measure: Callable[[PreTrainedModel, Iterable], Metrics]


# ---- Image classifiers ----


def load_images(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[Dataset, str]:
    """The model's inputs, and the name of their split."""
    dataset = load_image_dataset(options.dataset_name, options.dataset_config_name)
    features = next(iter(dataset.values())).features
    image_column = find_image_column(features, options.image_column_name)
    label_column, label_names = find_label_column(features, options.label_column_name)
    if (classes := checkpoint.model.config.num_labels) != len(label_names):
        raise ValueError(
            f"checkpoint={checkpoint.name!r} has {classes} classes, dataset_name={options.dataset_name!r} "
            f"{len(label_names)}. Give the dataset that the model was trained on."
        )
    skipped: Counter[str] | None = Counter() if options.skip_bad_examples else None
    held_out = checkpoint.held_out("eval_fraction")
    _, images, split = split_train_eval(number_rows(dataset), label_column, *held_out, skipped)
    images = keep_first(images, options.max_examples, options.seed, "max_examples")
    if skipped is not None:
        images = keep_readable(images, split, skipped, image_column, options.image_max_value)
    with explained(f"checkpoint={checkpoint.name!r}: its image processor could not be loaded", REMEDY):
        image_processor = AutoImageProcessor.from_pretrained(checkpoint.name)
    return preprocess(images, image_processor, image_column, label_column, split, options.image_max_value), split


@torch.no_grad()
def classify(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> Metrics:
    rows = []
    for batch in batches:
        labels = batch["labels"].to(model.device)
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        rows.append((*rank_classes(logits, labels), labels))
    *ranked, references = (torch.cat(parts).cpu().numpy() for parts in zip(*rows, strict=True))
    return classification_metrics(EvalPrediction(cast(Any, tuple(ranked)), references))


# ---- Causal language models ----


def load_blocks(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[Dataset, str]:
    """Blocks of tokens, and the name of their split."""
    is_stream = checkpoint.settings.get("streaming", False)  # of which other documents are held out
    dataset = load_text_dataset(options.dataset_name, options.dataset_config_name, is_stream)
    column = find_text_column(features_of(dataset), options.text_column_name)
    dataset = without_null_documents(dataset, column, Counter() if options.skip_bad_examples else None)
    _, documents, split = split_documents(dataset, *checkpoint.held_out("eval_documents"))
    with explained(f"checkpoint={checkpoint.name!r}: its tokenizer could not be loaded", REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name)
    rows = cast(nn.Embedding, checkpoint.model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"checkpoint={checkpoint.name!r}: its tokenizer has {len(tokenizer)} tokens, but the model embeddings for "
            f"{rows}. They do not belong together."
        )
    blocks = pack(documents, tokenizer, column, block_size(checkpoint, options.block_size))
    if is_stream:
        return Dataset.from_list(list(blocks.take(options.max_examples or MAX_STREAMED_EXAMPLES))), split
    return keep_first(blocks, options.max_examples, options.seed, "max_examples"), split


def block_size(checkpoint: Checkpoint, size: int | None) -> int:
    """`size`, or by default that of the run, or the model's context up to `MAX_BLOCK_SIZE`."""
    context = getattr(checkpoint.model.config, "max_position_embeddings", None) or MAX_BLOCK_SIZE
    if size is None:
        return checkpoint.settings.get("block_size") or min(context, MAX_BLOCK_SIZE)
    if not 1 < size <= context:
        raise ValueError(
            f"block_size={size}: {checkpoint.name} has a context of {context} tokens; give 2 to {context}."
        )
    return size


@torch.no_grad()
def predict_tokens(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> Metrics:
    total = count = 0.0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        total += len(ids) * model(input_ids=ids, labels=ids, use_cache=False).loss.item()
        count += len(ids)
    return {"loss": total / count, "perplexity": perplexity(total / count)}


# ---- Both ----

IMAGE_FLAGS = ("image_column_name", "label_column_name", "image_max_value")
IMAGES = Kind("an image classifier", ("ForImageClassification",), AutoModelForImageClassification, "digits", 64,
              IMAGE_FLAGS, load_images, classify)  # fmt: skip
TEXT_FLAGS = ("text_column_name", "block_size")
TEXT = Kind("a causal language model", ("ForCausalLM", "LMHeadModel"), AutoModelForCausalLM, "python", 8, TEXT_FLAGS,
            load_blocks, predict_tokens)  # fmt: skip
KINDS = (IMAGES, TEXT)


def kind_of(name: str) -> Kind:
    with explained(f"checkpoint={name!r} could not be loaded", REMEDY):
        architectures = AutoConfig.from_pretrained(name).architectures or ["of no architecture"]
    for kind in KINDS:
        if any(mark in architectures[0] for mark in kind.marks):
            return kind
    raise ValueError(f"checkpoint={name!r} is {architectures[0]}. Give an image classifier or a causal language model.")


def common_kind(names: list[str]) -> Kind:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"checkpoint={repeated[0]!r} is given twice. Give it once.")
    kinds = {name: kind_of(name) for name in names}
    first = kinds[names[0]]
    if others := [name for name, kind in kinds.items() if kind is not first]:
        raise ValueError(
            f"checkpoint={others[0]!r} is {kinds[others[0]].name}, but {names[0]!r} is {first.name}. Evaluate "
            "each kind by itself."
        )
    return first


def settings_of(name: str, dataset_name: str) -> dict[str, Any]:
    """The settings of the run whose output folder is `name`; empty if it has no record.

    Those that describe evaluation data are left out if the run's dataset was another one.
    """
    record = read_record(name)
    if record is None or not record.recorded:
        return {}
    path = Path(dataset_name)
    is_same = record.data.get("dataset_name") == (path.resolve().name if path.exists() else dataset_name)
    left_out = () if is_same else ("eval_fraction", "eval_documents", "streaming")
    return {flag: value for flag, value in record.recorded[-1].settings.items() if flag not in left_out}


def evaluate(name: str, kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """What robustness.json says of a checkpoint."""
    with explained(f"checkpoint={name!r} could not be loaded", REMEDY):
        model = kind.auto_class.from_pretrained(name, dtype="float32")
    with explained(f"device={options.device!r} cannot be used", "Give cpu, or cuda where there is a GPU."):
        model.to(options.device)
    data, split = kind.load_data(Checkpoint(name, model, settings_of(name, options.dataset_name)), options)
    loader = DataLoader(data, options.batch_size, collate_fn=default_data_collator)
    how = {key: getattr(options, key) for key in ("bits", "noise", "granularity", "noise_samples", "seed")}
    steps = robustness(model, partial(kind.measure, model, loader), **how)
    total = 1 + len(options.bits) + len(options.noise)
    with np.errstate(invalid="ignore"):  # noise can make outputs overflow; the results say so
        results = {disturbance: summary(draws) for disturbance, draws in tqdm(steps, name, total, leave=False)}
    disturbed, parameters = (sum(w.numel() for w in ws) for ws in (weight_matrices(model), model.parameters()))
    return {"split": split, "examples": len(data), "disturbed_share": disturbed / parameters, "results": results}


def summary(draws: list[Metrics]) -> dict[str, Any]:
    """The draws, their mean and, of several, their standard deviation, by metric."""
    by_metric = {metric: [draw[metric] for draw in draws] for metric in draws[0]}
    mean = {metric: statistics.fmean(values) for metric, values in by_metric.items()}
    std = {metric: float(np.std(values, ddof=1)) for metric, values in by_metric.items() if len(values) > 1}
    return {"mean": mean, "std": std, "draws": draws}


def report(options: argparse.Namespace, checkpoints: dict[str, Any]) -> str:
    """The content of robustness.md."""
    lines = [
        f"- {name}: {found['examples']} examples of {options.dataset_name}, split {found['split']}; "
        f"{100 * found['disturbed_share']:.4g} % of the parameters are disturbed."
        for name, found in checkpoints.items()
    ]
    if options.bits:
        lines.append(f"- Bits: weights rounded to nearest, one scale per {options.granularity}.")
    if options.noise:
        lines.append(
            "- Noise: Gaussian, in units of each weight matrix's standard deviation; mean ± standard deviation of "
            f"{options.noise_samples} draws."
        )
    return "\n".join([*lines, "", table({name: found["results"] for name, found in checkpoints.items()})])


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row per disturbance, a column per metric and checkpoint."""
    disturbances = next(iter(results.values()))
    shown = labels(list(results))
    columns = [(metric, name) for metric in disturbances["none"]["mean"] for name in results]
    rows = [["disturbance", *(metric + shown[name] for metric, name in columns)], ["---"] * (1 + len(columns))]
    rows += [
        [disturbance, *(cell(results[name][disturbance], metric) for metric, name in columns)]
        for disturbance in disturbances
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def labels(names: list[str]) -> dict[str, str]:
    """What a column is called after its metric: nothing, the folder's name, or, if two are equal, its path."""
    folders = {name: Path(name).name for name in names}
    if len(set(folders.values())) < len(names):
        folders = {name: name for name in names}
    return {name: f", {folder}" if len(names) > 1 else "" for name, folder in folders.items()}


def cell(found: dict[str, Metrics], metric: str) -> str:
    spread = f" ± {found['std'][metric]:.2g}" if metric in found["std"] else ""
    return f"{found['mean'][metric]:.4g}{spread}"


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Kind]:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="output folders of training scripts, or names on the Hub")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3, 2], help="default: 8 4 3 2")
    parser.add_argument("--granularity", choices=GRANULARITIES, help="what has a scale of its own (default: channel)")
    parser.add_argument("--noise", type=float, nargs="*", default=[0.1, 0.25, 0.5, 1.0], help="default: 0.1 0.25 0.5 1")
    parser.add_argument("--noise_samples", type=int, help="draws of each noise (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of --max_examples (default: 0)")
    parser.add_argument("--dataset_name", help="as for the training scripts (default: digits; for Llamas, python)")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--image_column_name", help="default: the column of type Image")
    parser.add_argument("--label_column_name", help="default: the column of type ClassLabel")
    parser.add_argument("--image_max_value", type=float, help="value of white in images of more than 8 bits")
    parser.add_argument("--text_column_name", help="default: text, or the only column of strings")
    parser.add_argument("--block_size", type=int, help="tokens per example (default: as in training)")
    parser.add_argument("--max_examples", type=int, help="evaluate on at most this many images or blocks of tokens")
    parser.add_argument("--skip_bad_examples", action="store_true", help="skip what cannot be read")
    parser.add_argument("--batch_size", type=int, help="default: 64 images, or 8 blocks of tokens")
    parser.add_argument("--output_dir", help="where to write robustness.json and robustness.md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    check(options)
    kind = common_kind(options.checkpoints)
    for other in KINDS:
        script.refuse(options, other.flags if other is not kind else (), kind.name)
    defaults = {"granularity": "channel", "noise_samples": 5}
    defaults |= {"dataset_name": kind.default_dataset, "batch_size": kind.default_batch_size}
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options, kind


def check(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a flag that is out of range or has no effect."""
    for flag, limit in (("bits", Limit(2, 16)), ("noise", POSITIVE)):
        for value in getattr(options, flag):
            check_value(flag, value, limit)
    check_ranges(options, dict.fromkeys(("noise_samples", "block_size", "max_examples", "batch_size"), COUNT))
    check_ranges(options, {"image_max_value": POSITIVE, "seed": script.LIMITS["seed"]})
    if not options.bits:
        script.refuse(options, ("granularity",), "an empty --bits")
    if not options.noise:
        script.refuse(options, ("noise_samples",), "an empty --noise")


def main(argv: list[str] | None = None) -> None:
    options, kind = parse_args(argv)
    if options.output_dir is not None:
        require_writable(options.output_dir)
    checkpoints = {name: evaluate(name, kind, options) for name in options.checkpoints}
    text = report(options, checkpoints)
    print(text)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        shared = {key: getattr(options, key) for key in ("dataset_name", "granularity", "noise_samples", "seed")}
        content = json.dumps({**shared, "checkpoints": checkpoints}, indent=2)
        (folder / "robustness.json").write_text(content + "\n", encoding="utf-8")
        (folder / "robustness.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    script.run(main)
