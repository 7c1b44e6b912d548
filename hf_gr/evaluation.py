"""Evaluation metrics: image classification, generated text and answers, multiple choice.

They need no download, unlike `evaluate.load("accuracy")`, which fetches its code from the Hub.
"""

import math
import tempfile
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import extra

with extra("scripts"):
    import datasets
    import evaluate

#: The label that PyTorch's cross entropy ignores.
IGNORED = -100


class TopKAccuracy(evaluate.Metric):
    """Top-1 accuracy and error, and top-5 accuracy if the predictions rank at least five classes.

    `compute(predictions=..., references=...)`: class ids, best first, of shape (examples, k), and true ids of shape
    (examples,). All values are fractions between 0 and 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 accuracy and error, top-5 accuracy.",
            citation="",
            inputs_description="predictions: ranked class ids, best first; references: true class ids.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        accuracy = float(hits[:, 0].mean())
        result = {"accuracy": accuracy, "error": 1 - accuracy}
        if hits.shape[1] >= 5:
            result["top5_accuracy"] = float(hits[:, :5].any(axis=1).mean())
        return result


def rank_classes(logits: Tensor | tuple, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For `Trainer(preprocess_logits_for_metrics=...)`: what `classification_metrics` needs of the logits.

    Only this, not the logits, is gathered from all processes and kept in memory: the ids of the best class, or of the
    best five of more than ten, of shape (examples, k); the probability of the best class, of shape (examples,); and
    -log p of the label, of the same shape, NaN without labels.
    """
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    log_probabilities = first.float().log_softmax(-1)
    best = torch.topk(first, 5 if first.shape[-1] > 10 else 1, dim=-1).indices
    confidence = log_probabilities.max(-1).values.exp()
    if labels is None:
        return best, confidence, torch.full_like(confidence, math.nan)
    return best, confidence, -log_probabilities.gather(-1, labels.clamp(min=0)[:, None])[:, 0]


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`, after `rank_classes`, on the examples of all processes.

    Accuracy, error and top-5 accuracy; `nll`, the mean of -log p of the label, which label smoothing leaves alone; and
    `ece`, the `expected_calibration_error`. Examples labeled `IGNORED` do not count, as in the loss.
    """
    counted = np.asarray(prediction.label_ids) != IGNORED
    if not counted.any():
        raise ValueError("The evaluation data has no labeled examples.")
    labels = np.asarray(prediction.label_ids)[counted]
    best, confidence, nll = (np.asarray(values)[counted] for values in prediction.predictions)
    return compute(TopKAccuracy, predictions=best, references=labels) | {
        "nll": float(nll.mean(dtype=float)),
        "ece": expected_calibration_error(confidence, best[:, 0] == labels),
    }


def expected_calibration_error(confidence: np.ndarray, is_right: np.ndarray, bins: int = 15) -> float:
    """sum_b n_b / n |accuracy - mean confidence in b|, over `bins` bins b of equal width, (i / bins, (i + 1) / bins].

    "On Calibration of Modern Neural Networks", Guo et al., ICML 2017, Eq. 5.

    Args:
        confidence: the probability that was given to each prediction, of shape (examples,).
        is_right: whether it was right.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, is_right - confidence.astype(float), bins)
    return float(np.abs(gaps).sum() / len(confidence))


def compute(kind: type[evaluate.Metric], **inputs: Any) -> dict[str, float]:
    """The value of the metric class `kind` on `inputs`.

    `evaluate` creates a cache folder in the home directory, even for a metric that is kept in memory and writes nothing
    there. With a temporary one the home directory need not be writable.
    """
    with tempfile.TemporaryDirectory() as folder:
        return kind(keep_in_memory=True, cache_dir=folder).compute(**inputs)


class AnswerMatch(evaluate.Metric):
    """Exact match and ROUGE-L of generated texts.

    `compute(predictions=..., references=...)`: one text and one reference per example. Words are lowercased.
    ROUGE-L is the F-measure of the longest common subsequence of words (Lin, 2004), weighting precision and recall
    equally.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match and ROUGE-L.",
            citation="",
            inputs_description="predictions: generated texts; references: one text each.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [(p.lower().split(), r.lower().split()) for p, r in zip(predictions, references, strict=True)]
        return {
            "exact_match": float(np.mean([p == r for p, r in pairs])),
            "rouge_l": float(np.mean([_rouge_l(p, r) for p, r in pairs])),
        }


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    lengths = np.zeros(len(reference) + 1, dtype=int)  # of the longest common subsequence with each prefix
    for word in prediction:
        previous = lengths.copy()
        for j, reference_word in enumerate(reference):
            lengths[j + 1] = previous[j] + 1 if word == reference_word else max(previous[j + 1], lengths[j])
    common = lengths[-1]
    return 2 * common / (len(prediction) + len(reference))


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 60,
    seed: int | None = None,
    **kwargs: Any,
) -> str:
    """The continuation of `prompt`, greedy or, with a seed, sampled. Leaves the random state alone."""
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompt or tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").to(model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=seed is not None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **kwargs,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed)
            ids = cast(Any, model).generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
            )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


# ---- Multiple choice, zero-shot: the answer is the choice with the highest probability ----


@torch.no_grad()
def choice_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, choices: list[str]
) -> list[float]:
    """log p(choice | context) of each choice: the sum over its tokens, in nats.

    A context too long for the model is truncated at its beginning.

    Raises:
        ValueError: a choice is empty, or too long for the model by itself.
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
                    f"The choice {choice[:40]!r}... has {len(choice_ids)} tokens; the model's context is {limit}."
                )
        inputs = torch.tensor([ids], device=model.device)
        log_probabilities = model(input_ids=inputs).logits[0, :-1].float().log_softmax(-1)
        picked = log_probabilities.gather(1, inputs[0, 1:, None])[:, 0]
        scores.append(picked[-len(choice_ids) :].sum().item())
    return scores


def _split(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of the context, at least one, and of the choice as its continuation."""
    ids = tokenizer(context, add_special_tokens=False)["input_ids"] if context else [tokenizer.eos_token_id]
    whole = tokenizer(context + choice, add_special_tokens=False)["input_ids"]
    if context and whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, tokenizer(choice, add_special_tokens=False)["input_ids"]  # a token spans the boundary


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    context_column: str = "context",
    choices_column: str = "choices",
    label_column: str = "label",
) -> dict[str, float]:
    """`accuracy`, and `accuracy_norm`, which divides each log-likelihood by the number of bytes of its choice.

    Args:
        dataset: one question per row: a text, a list of texts, and the index of the correct one.

    Raises:
        ValueError: a column is missing, or a row is not a question with choices and the index of the correct one.
    """
    for flag, column in (("context", context_column), ("choices", choices_column), ("label", label_column)):
        if column not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise ValueError(
                f"{flag}_column={column!r} is not a column of the dataset, which has {columns}. Name one of these."
            )
    if not len(dataset):
        raise ValueError("The dataset has no questions. Give another split, or check the data.")
    for row, question in enumerate(dataset):
        if (reason := _why_bad(question[context_column], question[choices_column], question[label_column])) is not None:
            raise ValueError(f"row {row}: {reason}. Fix or remove it.")
    model.eval()
    correct = correct_norm = 0
    for row in dataset:
        choices, label = row[choices_column], int(row[label_column])
        scores = choice_log_likelihoods(model, tokenizer, row[context_column], choices)
        per_byte = [score / len(choice.encode()) for score, choice in zip(scores, choices, strict=True)]
        correct += max(range(len(choices)), key=scores.__getitem__) == label
        correct_norm += max(range(len(choices)), key=per_byte.__getitem__) == label
    return {"accuracy": correct / len(dataset), "accuracy_norm": correct_norm / len(dataset), "examples": len(dataset)}


def _why_bad(context: Any, choices: Any, label: Any) -> str | None:
    """Why the row is not a valid question, or None."""
    if not isinstance(context, str):
        return f"the context is {context!r}, not a text"
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        return f"the choices are {choices!r}, not a list of texts"
    if not _is_index(label, len(choices)):
        return f"the label {label!r} is not the index of one of {len(choices)} choices, 0 to {len(choices) - 1}"
    return None


def _is_index(label: Any, count: int) -> bool:
    try:
        return not isinstance(label, bool) and float(label) in range(count)
    except (TypeError, ValueError):
        return False
