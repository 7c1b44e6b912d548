"""The sizes of the presets against spec and paper; the metrics against counting by hand."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_gr.metrics import classification_metrics, rank_classes
from hf_gr.models import create_vit


@pytest.mark.parametrize(
    ("preset", "parameters"), [("vit-ti", 5_362_762), ("vit-s", 21_342_346), ("vit-b", 85_152_010)]
)
def test_presets_have_the_size_of_the_paper(preset, parameters):
    with torch.device("meta"):
        model = create_vit(preset, [str(i) for i in range(10)])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_paper_preset():
    model = create_vit("vit-micro", ["a", "b"])
    assert not model.classifier.weight.any() and not model.vit.embeddings.cls_token.any()
    weight = model.vit.layers[0].mlp.fc1.weight  # uniform on +-sqrt(6 / (fan in + fan out))
    assert weight.abs().max().item() == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.01)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1
    assert model.config.id2label == {0: "a", 1: "b"}
    with pytest.raises(ValueError, match="image_size=9: vit-micro cuts images into patches of 2 pixels"):
        create_vit("vit-micro", ["a", "b"], image_size=9)
    with pytest.raises(ValueError, match="model='vit-xl': choose one of vit-micro"):
        create_vit("vit-xl", ["a", "b"])


@pytest.mark.parametrize("classes", [4, 10, 11, 100])
def test_metrics_equal_counting(classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(300, classes), torch.randint(0, classes, (300,))
    ranked = rank_classes(logits, labels)
    metrics = classification_metrics(EvalPrediction(predictions=ranked.numpy(), label_ids=labels.numpy()))
    right = np.mean([int(np.argmax(row) == label) for row, label in zip(logits.numpy(), labels.numpy(), strict=True)])
    assert metrics["accuracy"] == pytest.approx(right)
    assert metrics["error"] == pytest.approx(1 - right)
    assert ("top5_accuracy" in metrics) == (classes > 10)
    if classes > 10:
        five = [label in np.argsort(-row)[:5] for row, label in zip(logits.numpy(), labels.numpy(), strict=True)]
        assert metrics["top5_accuracy"] == pytest.approx(np.mean(five))


def test_rank_classes_takes_the_logits_out_of_a_tuple():
    logits = torch.tensor([[0.1, 0.9]])
    assert rank_classes((logits, torch.zeros(1)), None).tolist() == [[1]]
