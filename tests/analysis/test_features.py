"""k nearest neighbors against a loop, and the probe against its optimum."""

import numpy as np
import pytest
import torch

from hf_gr.analysis.features import knn_predictions, linear_probe


def data(n: int, seed: int, classes: int = 3, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one center per class, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % classes
    features = centers[labels] + 1.5 * torch.randn(n, width, generator=generator)
    return features * (0.5 + torch.rand(n, 1, generator=generator)), labels


def voted(bank, bank_labels, row, k, temperature):
    similarity = np.array([float(row @ other / (row.norm() * other.norm())) for other in bank])
    votes = np.zeros(3)
    for i in np.argsort(-similarity)[:k]:
        votes[bank_labels[i]] += np.exp(similarity[i] / temperature)
    return votes.argmax()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (10, 0.1), (10, 5.0), (60, 0.1), (200, 0.1)])
def test_neighbors_vote_as_defined(k, temperature):
    bank, (features, _) = data(60, 0), data(40, 1)
    expected = [voted(*bank, row, k, temperature) for row in features]
    assert knn_predictions(*bank, features, 3, k, temperature).tolist() == expected


def test_only_the_direction_of_features_counts():
    bank, (features, _) = data(60, 0), data(40, 1)
    scaled = features * torch.linspace(0.1, 9, 40).unsqueeze(1)
    assert torch.equal(knn_predictions(*bank, features, 3, 10), knn_predictions(*bank, scaled, 3, 10))


def test_probe_is_at_its_optimum():
    """The gradient of sum_i -log p(y_i | x_i) + ||W||^2 / (2 C) vanishes, and another C gives other weights."""
    from sklearn.linear_model import LogisticRegression

    (features, labels), (other, _) = data(90, 0), data(30, 1)
    probe = linear_probe(features, labels, other, inverse_decay=0.5)
    assert probe.has_converged and 1 < probe.iterations < 1000 and 0.5 < probe.train_accuracy < 1
    scaled = (features - features.mean(0)) / features.std(0, correction=0)
    exact = LogisticRegression(C=0.5, tol=1e-6, max_iter=10_000, solver="newton-cholesky").fit(scaled.numpy(), labels)
    there = (other - features.mean(0)) / features.std(0, correction=0)
    assert probe.predictions.tolist() == exact.predict(there.numpy()).tolist()


def test_a_probe_that_was_stopped_says_so():
    (features, labels), (other, _) = data(90, 0), data(30, 1)
    assert not linear_probe(features, labels, other, max_iterations=2).has_converged
