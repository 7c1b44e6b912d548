"""Multiple choice, zero-shot: the answer is the choice to which the model gives the highest probability."""

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def choice_log_likelihoods(
    model: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase, context: str, choices: list[str]
) -> list[float]:
    """log p(choice | context) of each choice: the sum over its tokens, natural logarithm.

    A context that is too long for the model loses its beginning.

    Raises:
        ValueError: a choice is empty, or alone too long for the model.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    scores = []
    for choice in choices:
        context_ids, choice_ids = _split(tokenizer, context, choice)
        if not choice_ids:
            raise ValueError(f"The choice {choice!r} has no tokens.")
        ids = [*context_ids, *choice_ids]
        if limit is not None and len(ids) > limit:
            ids = ids[-limit:]
            if len(choice_ids) >= limit:
                raise ValueError(
                    f"The choice {choice[:40]!r}... has {len(choice_ids)} tokens, the model room for {limit}."
                )
        inputs = torch.tensor([ids], device=model.device)
        log_probabilities = model(input_ids=inputs).logits[0, :-1].float().log_softmax(-1)
        picked = log_probabilities.gather(1, inputs[0, 1:, None])[:, 0]
        scores.append(picked[-len(choice_ids) :].sum().item())
    return scores


def _split(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of the context, of which there is at least one, and of the choice as it goes on from there."""
    ids = tokenizer(context, add_special_tokens=False)["input_ids"] if context else [tokenizer.eos_token_id]
    whole = tokenizer(context + choice, add_special_tokens=False)["input_ids"]
    if context and whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, tokenizer(choice, add_special_tokens=False)["input_ids"]  # a token spans the border


def evaluate_multiple_choice(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    context_column: str = "context",
    choices_column: str = "choices",
    label_column: str = "label",
) -> dict[str, float]:
    """`accuracy`, and `accuracy_norm`, for which each log-likelihood is divided by the bytes of its choice.

    Args:
        dataset: one question per row: a text, a list of texts, and the index of the right one.

    Raises:
        ValueError: a column is missing, or a row is not a question with choices and the index of the right one.
    """
    for flag, column in (("context", context_column), ("choices", choices_column), ("label", label_column)):
        if column not in dataset.column_names:
            listed = ", ".join(dataset.column_names)
            raise ValueError(
                f"{flag}_column={column!r} is not a column of the data set, which has {listed}. Name one of these."
            )
    if not len(dataset):
        raise ValueError("The data set has no questions. Give another split, or look at the data.")
    for row, question in enumerate(dataset):
        if (reason := _why_bad(question[context_column], question[choices_column], question[label_column])) is not None:
            raise ValueError(f"row {row}: {reason}. Mend or remove it.")
    model.eval()
    right = right_norm = 0
    for row in dataset:
        choices, label = row[choices_column], int(row[label_column])
        scores = choice_log_likelihoods(model, tokenizer, row[context_column], choices)
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
        right += max(range(len(choices)), key=scores.__getitem__) == label
        right_norm += max(range(len(choices)), key=per_byte.__getitem__) == label
    return {"accuracy": right / len(dataset), "accuracy_norm": right_norm / len(dataset), "examples": len(dataset)}


def _why_bad(context: Any, choices: Any, label: Any) -> str | None:
    """Why this is not a question."""
    if not isinstance(context, str):
        return f"the context is {context!r}, not a text"
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        return f"the choices are {choices!r}, not a list of texts"
    if not _is_index(label, len(choices)):
        return f"The label {label!r} is not the index of one of {len(choices)} choices, 0 to {len(choices) - 1}"
    return None


def _is_index(label: Any, count: int) -> bool:
    try:
        return not isinstance(label, bool) and float(label) in range(count)
    except (TypeError, ValueError):
        return False
