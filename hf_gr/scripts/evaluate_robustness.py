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
embedding layers, and leave biases and norms alone. With --quantizer torchao the rounding is that of torchao's
IntxWeightOnlyConfig, for 2 to 8 bits, whose grid has one more value, below zero.

Without a test split, the evaluation data are what the run held out of its training data, by the seed in its run.json.
With --output_dir the table is also written to robustness.md, and all results to robustness.json.
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, default_data_collator

from ..analysis.robustness import GRANULARITIES, QUANTIZERS, Metrics, robustness, weight_matrices
from ..checks import COUNT, POSITIVE, Limit, check_ranges, check_value
from ..cli import script
from ..cli.checkpoints import (
    IMAGES,
    TEXT,
    Kind,
    add_checkpoints,
    add_data,
    check_data,
    labels,
    load_checkpoint,
    resolve_kind,
)
from ..cli.output_folder import require_writable
from ..cli.trainers import perplexity
from ..errors import extra
from ..evaluation import classification_metrics, rank_classes


@torch.no_grad()
def classify(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> Metrics:
    rows = []
    for batch in batches:
        labels = batch["labels"].to(model.device)
        logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits
        rows.append((*rank_classes(logits, labels), labels))
    *ranked, references = (torch.cat(parts).cpu().numpy() for parts in zip(*rows, strict=True))
    return classification_metrics(EvalPrediction(cast(Any, tuple(ranked)), references))


@torch.no_grad()
def predict_tokens(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> Metrics:
    total = count = 0.0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        total += len(ids) * model(input_ids=ids, labels=ids, use_cache=False).loss.item()
        count += len(ids)
    return {"loss": total / count, "perplexity": perplexity(total / count)}


#: By the name of the kind.
MEASURES: dict[str, Callable[[PreTrainedModel, Iterable], Metrics]] = {IMAGES.name: classify, TEXT.name: predict_tokens}


def evaluate(name: str, kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """What robustness.json says of a checkpoint."""
    checkpoint = load_checkpoint(name, kind, options)
    model = checkpoint.model
    data, split = kind.load_data(checkpoint, options, False)
    loader = DataLoader(data, options.batch_size, collate_fn=default_data_collator)
    how = {key: getattr(options, key) for key in ("bits", "noise", "granularity", "noise_samples", "seed", "quantizer")}
    steps = robustness(model, partial(MEASURES[kind.name], model, loader), **how)
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
        by = "to nearest" if options.quantizer == "nearest" else f"by {options.quantizer}"
        lines.append(f"- Bits: weights rounded {by}, one scale per {options.granularity}.")
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


def cell(found: dict[str, Metrics], metric: str) -> str:
    spread = f" ± {found['std'][metric]:.2g}" if metric in found["std"] else ""
    return f"{found['mean'][metric]:.4g}{spread}"


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Kind]:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoints(parser)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3, 2], help="default: 8 4 3 2")
    parser.add_argument("--quantizer", choices=tuple(QUANTIZERS), help="what rounds the weights (default: nearest)")
    parser.add_argument("--granularity", choices=GRANULARITIES, help="what has a scale of its own (default: channel)")
    parser.add_argument("--noise", type=float, nargs="*", default=[0.1, 0.25, 0.5, 1.0], help="default: 0.1 0.25 0.5 1")
    parser.add_argument("--noise_samples", type=int, help="draws of each noise (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of --max_examples (default: 0)")
    add_data(parser, "robustness")
    options = parser.parse_args(argv)
    check(options)
    kind = resolve_kind(options)
    defaults = {"granularity": "channel", "noise_samples": 5, "quantizer": "nearest"}
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options, kind


def check(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a flag that is out of range or has no effect."""
    for flag, limit in (("bits", Limit(2, 16)), ("noise", POSITIVE)):
        for value in getattr(options, flag):
            check_value(flag, value, limit)
    check_ranges(options, {"noise_samples": COUNT})
    check_data(options)
    if not options.bits:
        script.refuse(options, ("granularity", "quantizer"), "an empty --bits")
    if options.quantizer == "torchao":
        script.refuse(options, ("granularity",), "quantizer=torchao")
        for bits in options.bits:
            check_value("bits", bits, Limit(2, 8, rule="torchao has 2 to 8. Change it, or leave quantizer out."))
        with extra("quantization"):
            importlib.import_module("torchao")
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
        shared = {
            key: getattr(options, key) for key in ("dataset_name", "granularity", "noise_samples", "seed", "quantizer")
        }
        content = json.dumps({**shared, "checkpoints": checkpoints}, indent=2)
        (folder / "robustness.json").write_text(content + "\n", encoding="utf-8")
        (folder / "robustness.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    script.run(main)
