"""Measure how sharp the loss of trained models is at their weights.

    python scripts/evaluate_sharpness.py FOLDER                                  # an image classifier
    python scripts/evaluate_sharpness.py out/gr out/none --output_dir out        # side by side
    python scripts/evaluate_sharpness.py LLAMA --dataset_name FILE_FOLDER_OR_HUB_NAME --quantities sam top

Where hf_gr is installed, `hf-gr sharpness` is the same command.

--quantities, cheapest first: sam, the rise of the loss within --r along the gradient; average, its mean rise under
noise of --sigma times each weight; trace and top, the trace and the largest eigenvalue of the Hessian. The standard
errors are those of the random draws; that of top bounds its error. All are of the first --batches batches, which are
the same for all checkpoints, in evaluation mode and without augmentation.

Sharpness is not generalization: across models they are hardly correlated (Andriushchenko et al., 2023,
arXiv:2302.07011). Compare the metric on held-out data too.

With --output_dir the table is also written to sharpness.md, and all results to sharpness.json.
"""

import argparse
import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..analysis.curvature import METHODS, QUANTITIES, measure
from ..checks import COUNT, POSITIVE, check_ranges
from ..cli import script
from ..cli.checkpoints import Kind, add_checkpoints, add_data, check_data, labels, load_checkpoint, resolve_kind
from ..cli.output_folder import require_writable

RECORDED = ("dataset_name", "quantities", "batches", "batch_size", "r", "sigma", "samples", "seed")
#: flag -> the quantities that it belongs to.
NEEDS = {"r": ("sam",), "sigma": ("average",), "samples": ("average", "trace"), "method": ("trace", "top")}
DEFAULTS = {"r": 0.05, "sigma": 0.05, "samples": 32}


def evaluate(name: str, kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """What sharpness.json says of a checkpoint."""
    checkpoint = load_checkpoint(name, kind, options)
    data, split = kind.load_data(checkpoint, options, options.split == "train")
    loader = DataLoader(data, options.batch_size, collate_fn=default_data_collator)
    batches = list(islice(loader, options.batches))
    arguments = {
        "sam": {"r": options.r},
        "average": {"sigma": options.sigma, "num_samples": options.samples},
        "trace": {"num_samples": options.samples},
        "top": {},
    }
    chosen = {
        key: value if key == "sam" else {**value, "generator": Generator().manual_seed(options.seed)}
        for key, value in arguments.items()
        if key in options.quantities
    }
    found = measure(checkpoint.model, kind.loss, batches, options.quantities, options.method, chosen)
    return {
        "split": split,
        "examples": min(len(data), options.batches * options.batch_size),
        "results": {key: asdict(estimate) for key, estimate in found.items()},
    }


def report(options: argparse.Namespace, checkpoints: dict[str, Any]) -> str:
    """The content of sharpness.md: a row per quantity, a column per checkpoint."""
    lines = [
        f"- {name}: {found['examples']} examples of {options.dataset_name}, split {found['split']}."
        for name, found in checkpoints.items()
    ]
    shown = {
        "sam": f"L(theta + {options.r:g} g/norm(g)) - L(theta)",
        "average": f"E L(theta + {options.sigma:g} abs(theta) z) - L(theta)",
        "trace": "tr(H)",
        "top": "lambda_max(H)",
    }
    names = labels(list(checkpoints))
    rows = [["quantity", *("value" + names[name] for name in checkpoints)], ["---"] * (1 + len(checkpoints))]
    rows += [
        [f"{key}: {shown[key]}", *(cell(found["results"][key]) for found in checkpoints.values())]
        for key in options.quantities
    ]
    return "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in rows)])


def cell(result: dict[str, float]) -> str:
    error = result["standard_error"]
    return f"{result['value']:.4g}" + (f" ± {error:.2g}" if error != 0 else "")


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Kind]:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoints(parser)
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES), help="default: all")
    parser.add_argument(
        "--split", choices=("train", "eval"), default="train", help="data to measure on (default: train)"
    )
    parser.add_argument("--batches", type=int, default=8, help="the first so many (default: 8)")
    parser.add_argument("--r", type=float, help="radius of sam (default: 0.05)")
    parser.add_argument("--sigma", type=float, help="noise of average, as a share of each weight (default: 0.05)")
    parser.add_argument("--samples", type=int, help="random draws of average and of trace (default: 32)")
    parser.add_argument("--method", choices=METHODS, help="of products of the Hessian (default: exact where possible)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, and of --max_examples (default: 0)")
    add_data(parser, "sharpness")
    options = parser.parse_args(argv)
    check_data(options)
    check_ranges(options, {"batches": COUNT, "samples": COUNT, "r": POSITIVE, "sigma": POSITIVE})
    for flag, quantities in NEEDS.items():
        if not set(quantities) & set(options.quantities):
            script.refuse(options, (flag,), f"--quantities {' '.join(options.quantities)}")
    for flag, default in DEFAULTS.items():
        if getattr(options, flag) is None:
            setattr(options, flag, default)
    return options, resolve_kind(options)


def main(argv: list[str] | None = None) -> None:
    options, kind = parse_args(argv)
    if options.output_dir is not None:
        require_writable(options.output_dir)
    checkpoints = {name: evaluate(name, kind, options) for name in options.checkpoints}
    text = report(options, checkpoints)
    print(text)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        content = {key: getattr(options, key) for key in RECORDED} | {"checkpoints": checkpoints}
        (folder / "sharpness.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "sharpness.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    script.run(main)
