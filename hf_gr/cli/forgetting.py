"""The measurement of forgetting, as evaluate_forgetting.py and pretrain_llama.py make it; see `analysis.forgetting`."""

import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
)

from ..analysis.forgetting import FineTuning, Point, at_target, forgetting, frontier
from ..data.images import keep_first
from ..data.text import (
    features_of,
    find_text_column,
    load_text_dataset,
    pack,
    split_documents,
    without_null_documents,
)
from ..errors import explained, extra
from ..reporting.record import FRONTIER
from .checkpoints import TEXT

with extra("scripts"):
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Blocks that each loss is measured on; they are measured many times.
MAX_EXAMPLES = 200


class FineTuningData(NamedTuple):
    """Blocks of tokens of the second dataset."""

    train: Dataset
    evaluation: Dataset
    eval_split: str


def load_finetuning_data(
    name: str,
    config: str | None,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_examples: int | None,
    seed: int,
    flag: str = "finetune_dataset_name",
) -> FineTuningData:
    """The second dataset. What is held out of it depends on `seed` alone, so it is the same for all models. `flag` is
    named in errors."""
    dataset = load_text_dataset(name, config, flag=flag)
    column = find_text_column(features_of(dataset))
    train, evaluation, split = split_documents(without_null_documents(dataset, column, None), None, seed)
    train, evaluation = (pack(documents, tokenizer, column, block_size) for documents in (train, evaluation))
    return FineTuningData(train, keep_first(evaluation, max_examples, seed, flag), split)


def measure(
    model: PreTrainedModel, held_out: Dataset, data: FineTuningData, batch_size: int, how: FineTuning
) -> list[Point]:
    """The frontier of a causal language model. `held_out` are blocks of the first dataset."""
    generator = torch.Generator().manual_seed(how.seed)
    batches = DataLoader(data.train, batch_size, shuffle=True, collate_fn=default_data_collator, generator=generator)
    second, first = (
        DataLoader(part, batch_size, collate_fn=default_data_collator) for part in (data.evaluation, held_out)
    )
    return list(
        frontier(model, TEXT.loss, batches, lambda tuned: (mean_loss(tuned, second), mean_loss(tuned, first)), how)
    )


def mean_loss(model: Any, batches: DataLoader) -> float:
    """Per token; all blocks are of the same length."""
    total = count = 0.0
    for batch in batches:
        size = len(batch["input_ids"])
        total += size * TEXT.loss(model, batch).item()
        count += size
    return total / count


def results(points: Sequence[Point], target: float) -> dict[str, Any]:
    """What is reported of a frontier; None where the target is not reached."""
    reached = at_target(points, target)
    return {
        "pretraining_loss_before": points[0].pretraining_loss,
        "finetuning_loss_before": points[0].finetuning_loss,
        "steps": None if reached is None else reached.step,
        "pretraining_loss": None if reached is None else reached.pretraining_loss,
        "forgetting": forgetting(points, target),
    }


def why_missing(points: Sequence[Point], target: float) -> str:
    """Why a frontier has no value at the target, as the end of a sentence; empty if it has one."""
    if at_target(points, target) is not None:
        return ""
    if points[0].finetuning_loss <= target:
        return f"is at the target before fine-tuning, with a fine-tuning loss of {points[0].finetuning_loss:.4g}"
    lowest = min(point.finetuning_loss for point in points)
    return f"does not reach the target in {points[-1].step:g} steps; its lowest fine-tuning loss is {lowest:.4g}"


def at_end(
    args: TrainingArguments, evaluation: Iterable[dict[str, Any]], data: FineTuningData, how: FineTuning
) -> dict[str, Any]:
    """Measure the model that a run saved to its output folder, with its batch size, and write the frontier to
    `FRONTIER` there. Returns the results as metrics.

    Args:
        evaluation: the blocks that the run is evaluated on, of which the first `MAX_EXAMPLES` are used.
    """
    folder = Path(str(args.output_dir))
    remedy = "Measure it with evaluate_forgetting.py, once it is a whole checkpoint."
    with explained("final_forgetting: the saved model could not be loaded", remedy):
        model = TEXT.auto_class.from_pretrained(folder, dtype="float32").to(args.device)
    held_out = Dataset.from_list(list(itertools.islice(evaluation, MAX_EXAMPLES)))
    points = measure(model, held_out, data, args.per_device_train_batch_size, how)
    content = {**asdict(how), "frontier": [point._asdict() for point in points]}
    (folder / FRONTIER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    target = cast(float, how.target_loss)
    if why := why_missing(points, target):
        logger.warning(f"forgetting has no value: the model {why}.")
    found = results(points, target)
    return {name if name == "forgetting" else f"forgetting_{name}": value for name, value in found.items()}
