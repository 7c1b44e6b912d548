"""Measure how much pretrained language models forget when they are fine-tuned on other data.

    python scripts/evaluate_forgetting.py FOLDER --finetune_dataset_name FILE_FOLDER_OR_HUB_NAME --target_loss 4
    python scripts/evaluate_forgetting.py out/gr out/adamw --dataset_name PRETRAINING --finetune_dataset_name python
    python scripts/evaluate_forgetting.py out/gr_0 out/gr_1 out/adamw_0 out/adamw_1 --labels gr gr adamw adamw ...

Where hf_gr is installed, `hf-gr forgetting` is the same command.

A copy of each causal language model is fine-tuned by AdamW with a fresh state and a fixed learning rate, on the same
batches for all. Every --eval_steps steps both losses are measured on held-out data, on --max_examples blocks of each
(by default 200). Forgetting is the pretraining loss at the fine-tuning loss --target_loss minus the pretraining loss
before: at equal fine-tuning loss, not at equal steps. It is interpolated between the two measured points around the
target. A model that does not reach the target within --max_steps has no value. (Losses of models with different
tokenizers are not comparable.)

Without --target_loss all models are fine-tuned for --max_steps, and the target is the lowest loss that all of them
reach. --labels names the group of each checkpoint, such as a method with several seeds: the table then also has the
mean and standard deviation of each group, and the picture a color for each.

Without a validation or test split, the pretraining data are what the run held out of its training data, by the seed in
its run.json. With --output_dir the table is also written to forgetting.md, all results to forgetting.json, and the
frontiers, pretraining loss against fine-tuning loss, are drawn in forgetting.png.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..analysis.forgetting import FineTuning, Point, common_target
from ..cli import forgetting, script
from ..cli.checkpoints import (
    TEXT,
    add_checkpoints,
    add_data,
    block_size,
    check_data,
    labels,
    load_checkpoint,
    load_tokenizer,
    resolve_kind,
)
from ..cli.output_folder import require_writable
from ..errors import extra

with extra("report"):
    from ..reporting.forgetting_plots import plot_forgetting

RECORDED = ("dataset_name", "finetune_dataset_name", "batch_size", "max_examples")
#: Result -> its column in the table.
SHOWN = {
    "pretraining_loss_before": "pretraining loss, before",
    "finetuning_loss_before": "fine-tuning loss, before",
    "steps": "steps to the target",
    "pretraining_loss": "pretraining loss, at the target",
    "forgetting": "forgetting",
}


def evaluate(name: str, options: argparse.Namespace, how: FineTuning) -> dict[str, Any]:
    """What forgetting.json says of a checkpoint, but for the results at the target."""
    checkpoint = load_checkpoint(name, TEXT, options)
    held_out, split = TEXT.load_data(checkpoint, options, False)
    source = options.finetune_dataset_name, options.finetune_dataset_config_name
    size = block_size(checkpoint, options.block_size)
    data = forgetting.load_finetuning_data(
        *source, load_tokenizer(checkpoint), size, options.max_examples, options.seed
    )
    points = forgetting.measure(checkpoint.model, held_out, data, options.batch_size, how)
    return {
        "split": split,
        "examples": len(held_out),
        "finetune_split": data.eval_split,
        "finetune_examples": len(data.evaluation),
        "finetune_train_examples": len(data.train),
        "block_size": size,
        "frontier": [point._asdict() for point in points],
    }


def points_of(found: dict[str, Any]) -> list[Point]:
    return [Point(**point) for point in found["frontier"]]


def report(options: argparse.Namespace, target: float, checkpoints: dict[str, Any]) -> str:
    """The content of forgetting.md: a row per checkpoint, and per group if there are any."""
    origin = "" if options.target_loss is not None else ", the lowest that all checkpoints reach"
    lines = [
        f"- {name}: {found['examples']} blocks of {options.dataset_name}, split {found['split']}; fine-tuned on "
        f"{options.finetune_dataset_name}, {found['finetune_examples']} blocks of its split {found['finetune_split']}."
        for name, found in checkpoints.items()
    ]
    lines += [
        f"- AdamW, learning rate {options.learning_rate:g}, {options.batch_size} blocks per step; losses every "
        f"{options.eval_steps} of at most {options.max_steps} steps.",
        f"- Target: fine-tuning loss {target:.4g}{origin}; interpolated between the two measured points around it.",
    ]
    lines += [
        f"- {name} {why}: no value."
        for name, found in checkpoints.items()
        if (why := forgetting.why_missing(points_of(found), target))
    ]
    rows = [[name, *(cell([found["results"][key]]) for key in SHOWN)] for name, found in checkpoints.items()]
    text = "\n".join([*lines, "", *table("checkpoint", rows)])
    if not options.labels:
        return text
    groups = grouped(options.labels, [found["results"] for found in checkpoints.values()])
    rows = [[f"{name} ({len(r)})", *(cell([x[key] for x in r]) for key in SHOWN)] for name, r in groups.items()]
    return "\n".join([text, "", *table("mean ± standard deviation (checkpoints)", rows)])


def table(first: str, rows: Iterable[list[str]]) -> list[str]:
    head = [first, *SHOWN.values()]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def cell(values: list[float | None]) -> str:
    """A value, or the mean and standard deviation of several; a dash if one is missing: that one may be the worst."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.4g}{spread}"


def grouped(labels: list[str], values: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {label: [] for label in labels}
    for label, value in zip(labels, values, strict=True):
        groups[label].append(value)
    return groups


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, FineTuning]:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoints(parser)
    parser.add_argument("--labels", nargs="+", help="the group of each checkpoint, in their order")
    parser.add_argument("--finetune_dataset_name", required=True, help="the second dataset, as --dataset_name")
    parser.add_argument("--finetune_dataset_config_name")
    parser.add_argument("--target_loss", type=float, help="fine-tuning loss to compare at (default: see above)")
    defaults = FineTuning()
    for flag, about in (
        ("learning_rate", "of AdamW, fixed"),
        ("weight_decay", "of AdamW"),
        ("max_grad_norm", "clip the gradient to this norm; 0: do not"),
        ("max_steps", "of fine-tuning"),
        ("eval_steps", "steps between two measurements"),
        ("seed", "of the batches, of what is held out of the second dataset, and of --max_examples"),
    ):
        default = getattr(defaults, flag)
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=f"{about} (default: {default:g})")
    add_data(parser, "forgetting", [TEXT])
    parser.set_defaults(max_examples=forgetting.MAX_EXAMPLES)
    options = parser.parse_args(argv)
    check_data(options)
    check(options)
    how = FineTuning(**{flag: getattr(options, flag) for flag in vars(defaults)})
    resolve_kind(options, [TEXT])
    return options, how


def check(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a flag that does not go with others."""
    if options.labels and len(options.labels) != len(options.checkpoints):
        raise ValueError(
            f"labels={' '.join(options.labels)}: {len(options.labels)} for {len(options.checkpoints)} checkpoints. "
            "Give one for each, or leave them out."
        )
    first, second = options.dataset_name or TEXT.default_dataset, options.finetune_dataset_name
    if (first, options.dataset_config_name) == (second, options.finetune_dataset_config_name):
        raise ValueError(f"finetune_dataset_name={second!r}: it is the pretraining data, too. Give other data.")


def main(argv: list[str] | None = None) -> None:
    options, how = parse_args(argv)
    if options.output_dir is not None:
        require_writable(options.output_dir)
    checkpoints = {name: evaluate(name, options, how) for name in options.checkpoints}
    frontiers = [points_of(found) for found in checkpoints.values()]
    target = common_target(frontiers) if options.target_loss is None else options.target_loss
    for found, points in zip(checkpoints.values(), frontiers, strict=True):
        found["results"] = forgetting.results(points, target)
    text = report(options, target, checkpoints)
    print(text)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        shared = {key: getattr(options, key) for key in RECORDED} | asdict(how) | {"target": target}
        content = json.dumps({**shared, "labels": options.labels, "checkpoints": checkpoints}, indent=2)
        (folder / "forgetting.json").write_text(content + "\n", encoding="utf-8")
        (folder / "forgetting.md").write_text(text + "\n", encoding="utf-8")
        names = options.labels or [shown[2:] or "checkpoint" for shown in labels(list(checkpoints)).values()]
        plot_forgetting(grouped(names, frontiers), folder / "forgetting.png", target)


if __name__ == "__main__":
    script.run(main)
