"""The measurement of forgetting, as evaluate_forgetting.py and pretrain_llama.py make it; see `analysis.forgetting`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

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
from ..errors import extra

with extra("scripts"):
    from datasets import Dataset


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
    return list(frontier(model, loss, batches, lambda tuned: (mean_loss(tuned, second), mean_loss(tuned, first)), how))


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["input_ids"].to(model.device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def mean_loss(model: Any, batches: DataLoader) -> float:
    """Per token; all blocks are of the same length."""
    total = count = 0.0
    for batch in batches:
        size = len(batch["input_ids"])
        total += size * loss(model, batch).item()
        count += size
    return total / count


def results(points: Sequence[Point], target: float) -> dict[str, float | None]:
    """What is reported of a frontier; None where the target is not reached."""
    reached = at_target(points, target)
    return {
        "pretraining_loss_before": points[0].pretraining_loss,
        "finetuning_loss_before": points[0].finetuning_loss,
        "steps": None if reached is None else reached.step,
        "pretraining_loss": None if reached is None else reached.pretraining_loss,
        "forgetting": forgetting(points, target),
    }
