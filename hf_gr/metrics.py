"""Classification metrics that need no download: `evaluate.load("accuracy")` fetches its code from the Hub."""

import tempfile
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

#: The label that PyTorch's cross entropy leaves out.
IGNORED = -100


class TopKAccuracy(evaluate.Metric):
    """Top-1 accuracy and error; top-5 accuracy too, if the predictions rank at least five classes.

    `compute(predictions=..., references=...)`: class ids, best first, of shape (examples, k), and the true ids of shape
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


def rank_classes(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """For `Trainer(preprocess_logits_for_metrics=...)`: the ids of the best classes, one or, of more than ten, five.

    Only these travel between processes and stay in memory, not the logits.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    return torch.topk(logits, 5 if logits.shape[-1] > 10 else 1, dim=-1).indices


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`, after `rank_classes`. `Trainer` has gathered all processes' examples.

    Those labelled `IGNORED` do not count, as in the loss.
    """
    counted = prediction.label_ids != IGNORED
    if not counted.any():
        raise ValueError("The evaluation data has no labelled example.")
    return compute(TopKAccuracy, predictions=prediction.predictions[counted], references=prediction.label_ids[counted])


def compute(kind: type[evaluate.Metric], **inputs: Any) -> dict[str, float]:
    """What a metric of the class `kind` says of `inputs`.

    `evaluate` makes a cache folder in the home directory, into which a metric that is kept in memory writes nothing;
    here it need not be writable.
    """
    with tempfile.TemporaryDirectory() as folder:
        return kind(keep_in_memory=True, cache_dir=folder).compute(**inputs)


class AnswerMatch(evaluate.Metric):
    """Exact match and ROUGE-L of generated texts.

    `compute(predictions=..., references=...)`: one text and one reference each. Words are compared in lower case.
    ROUGE-L is the F-measure of the longest common subsequence of words (Lin, 2004), with equal weights of precision and
    recall.
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
    lengths = np.zeros(len(reference) + 1, dtype=int)  # of the longest common subsequence with each beginning
    for word in prediction:
        previous = lengths.copy()
        for j, other in enumerate(reference):
            lengths[j + 1] = previous[j] + 1 if word == other else max(previous[j + 1], lengths[j])
    common = lengths[-1]
    return 2 * common / (len(prediction) + len(reference))
