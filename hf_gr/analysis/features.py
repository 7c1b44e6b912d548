"""How well the features of a frozen model tell classes apart: k nearest neighbors, and a linear probe."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Images that are compared with all of the training set at once.
ROWS = 1024


def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    """The class of each row of `features`, (n,): the one with the largest sum of exp(s / T) over the k training
    examples of the highest cosine similarity s. (Wu et al., CVPR 2018, arXiv:1805.01978, Section 3.4.)

    Args:
        train_features: (m, d); train_labels: (m,), with values below `classes`.
        features: (n, d).
        k: at most m are used.
        temperature: T.
    """
    bank = F.normalize(train_features.float(), dim=1)
    predictions = []
    for rows in F.normalize(features.float(), dim=1).split(ROWS):
        similarity, neighbors = (rows @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, train_labels[neighbors], ((similarity - 1) / temperature).exp())  # a common factor
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


@dataclass(frozen=True)
class Probe:
    """The result of `linear_probe`.

    Attributes:
        predictions: the class of each evaluated example.
        train_accuracy: the share of the training examples that it classifies as they are labeled.
        iterations: of L-BFGS; `has_converged` is False if they were too few.
    """

    predictions: Tensor
    train_accuracy: float
    iterations: int
    has_converged: bool


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    inverse_decay: float = 1.0,
    max_iterations: int = 1000,
) -> Probe:
    """Logistic regression on frozen features, each scaled to zero mean and unit variance over the training set.

    It minimizes sum_i -log p(y_i | x_i) + ||W||^2 / (2 C) by L-BFGS, so that it needs neither a learning rate nor a
    schedule.

    Args:
        train_features: (m, d); train_labels: (m,).
        features: (n, d).
        inverse_decay: C.
        max_iterations: L-BFGS stops there, converged or not.
    """
    from ..errors import extra  # which loads transformers

    with extra("scripts"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=inverse_decay, max_iter=max_iterations)
    probe = make_pipeline(StandardScaler(), regression)
    inputs, labels = train_features.double().cpu().numpy(), train_labels.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(inputs, labels)
    iterations = int(regression.n_iter_.max())
    return Probe(
        predictions=torch.from_numpy(probe.predict(features.double().cpu().numpy())),
        train_accuracy=float(probe.score(inputs, labels)),
        iterations=iterations,
        has_converged=iterations < max_iterations,
    )
