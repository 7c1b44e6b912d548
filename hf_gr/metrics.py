"""Classification metrics that need no download: `evaluate.load("accuracy")` fetches its code from the Hub."""

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction


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
    """For `Trainer(compute_metrics=...)`, after `rank_classes`. `Trainer` has gathered all processes' examples."""
    metric = TopKAccuracy(keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
