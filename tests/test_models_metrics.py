"""The sizes of the presets against spec and paper; the metrics against counting by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, EvalPrediction

from hf_gr.metrics import classification_metrics, rank_classes
from hf_gr.models import RESNET_STEMS, WEIGHT_INITS, create_resnet, create_vit, initialize_weights


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


@pytest.mark.parametrize(("preset", "parameters"), [("resnet-18", 11_181_642), ("resnet-34", 21_289_802)])
def test_resnets_have_the_size_of_the_paper(preset, parameters):
    names = [str(i) for i in range(10)]
    model = create_resnet(preset, names)
    assert sum(p.numel() for p in model.parameters()) == parameters
    small = create_resnet(preset, names, stem="cifar")
    assert sum(p.numel() for p in small.parameters()) == parameters - 3 * 64 * (49 - 9)  # 7 x 7 became 3 x 3


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("cifar", 4)])
def test_stems_keep_or_divide_the_resolution(stem, side, tmp_path):
    torch.manual_seed(0)
    model = create_resnet("resnet-18", ["a", "b"], stem).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model.resnet(images).last_hidden_state.shape == (2, 512, side, side)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    assert (tmp_path / "cifar_resnet.py").exists() == (stem == "cifar")


def test_mistakes_in_resnets_are_named():
    with pytest.raises(ValueError, match="stem='tiny': choose one of imagenet, cifar"):
        create_resnet("resnet-18", ["a", "b"], "tiny")
    with pytest.raises(ValueError, match="model='resnet-19': choose one of resnet-18, resnet-34"):
        create_resnet("resnet-19", ["a", "b"])
    assert RESNET_STEMS == ("imagenet", "cifar")


@pytest.mark.parametrize("scheme", WEIGHT_INITS)
def test_weight_inits_draw_what_they_say(scheme):
    """The standard deviation, and the bound if there is one, of linear layers and convolutions; nothing else moves."""
    torch.manual_seed(0)
    model = create_resnet("resnet-18", [str(i) for i in range(100)])
    others = {name: p.clone() for name, p in model.named_parameters() if p.ndim < 2}
    initialize_weights(model, scheme)
    conv = model.resnet.encoder.stages[1].layers[1].layer[0].convolution.weight
    for weight in (model.classifier[1].weight, conv):
        field = weight[0, 0].numel()
        fan_out, fan_in = weight.shape[0] * field, weight.shape[1] * field
        variance = 2 / (fan_in + fan_out) if scheme.startswith("xavier") else 2 / fan_in
        assert weight.std().item() == pytest.approx(variance**0.5, rel=0.02)  # 51,200 draws: error 0.3 %
        if scheme.endswith("uniform"):
            assert weight.abs().max().item() == pytest.approx((3 * variance) ** 0.5, rel=1e-3)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if p.ndim < 2)
    with pytest.raises(ValueError, match="weight_init='zeros': choose one of xavier_uniform"):
        initialize_weights(model, "zeros")


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
