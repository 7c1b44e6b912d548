"""The gradient of sampled labels: against closed forms, and what it must leave alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, T5Config, T5ForConditionalGeneration

from helpers import toys
from hf_gr import IRE
from hf_gr.optim.fisher import (
    causal_lm_losses,
    classification_losses,
    distribution_of,
    first_rows,
    layer_kinds,
    sample_labels,
    without_randomness,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_labels_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf]).expand(200_000, 4)
    counts = torch.bincount(sample_labels(logits, generator()), minlength=4)
    # Five standard deviations of a share of 200,000 draws: 0.0056.
    torch.testing.assert_close(counts / 200_000, logits[0].softmax(0), rtol=0, atol=0.0056)


def test_a_logit_that_is_not_a_number_spoils_the_loss_and_not_the_program():
    losses = classification_losses(torch.tensor([[0.0, math.nan], [0.0, 0.0]]), torch.tensor([0, 1]), generator())
    assert losses.isnan().tolist() == [True, False]


def test_estimate_equals_the_exact_fisher_diagonal_of_a_softmax_regression():
    """z = W x has F_cd = mean_b p_c (1 - p_c) x_d^2 in closed form; B g^2 averages to it over draws of the labels."""
    torch.manual_seed(0)
    x = torch.randn(64, 20, dtype=torch.float64) * torch.logspace(-1, 1, 20, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(5, 20, dtype=torch.float64) * 0.3)
    p = (x @ weight.detach().T).softmax(dim=1)
    exact = (p * (1 - p)).T @ x.square() / len(x)

    # The average over n updates is what a moving average with beta -> 1 and bias correction is.
    ire = IRE(torch.optim.SGD([weight], lr=1.0), gamma=0.6, beta=1 - 1e-9)
    draw = generator()
    overlaps = {}
    for n in range(1, 4001):
        weight.grad = None
        classification_losses(x @ weight.T, torch.zeros(64, dtype=torch.long), draw).mean().backward()
        ire.update_mask()
        if n in (1, 4000):
            saved = ire.state_dict()["ire"]
            mask, best = saved["masks"][0].bool(), exact <= exact.flatten().sort().values[59]
            overlaps[n] = ((mask & best).sum() / (mask | best).sum()).item()
    estimate = 64 * saved["averages"][0]
    # A mean of n squares of normal numbers has the relative error sqrt(2/n) = 2.2 %; the worst of 100: 3.5 times that.
    torch.testing.assert_close(estimate, exact, rtol=0.08, atol=0)
    assert torch.corrcoef(torch.stack([estimate.flatten(), exact.flatten()]))[0, 1] > 0.999
    assert overlaps[4000] > 0.95
    assert 0.6 < overlaps[1] < overlaps[4000]  # one batch, as in training; chance would give 0.43


def test_language_model_counts_each_position_with_a_label_once():
    logits = torch.randn(2, 5, 7, generator=generator())
    labels = torch.tensor([[-100, 1, 2, -100, 4], [-100, -100, -100, -100, 3]])
    losses = causal_lm_losses(logits, labels, generator(1))
    rows = torch.stack([logits[0, 0], logits[0, 1], logits[0, 3], logits[1, 3]])  # each predicts the next token
    expected = F.cross_entropy(rows, sample_labels(rows, generator(1)), reduction="none")
    assert torch.equal(losses, expected)
    assert len(classification_losses(logits[:, 0], torch.tensor([-100, 3]), generator())) == 1
    # A process may have nothing to count, and must still take part in the reduction.
    weight = logits.clone().requires_grad_()
    causal_lm_losses(weight, torch.full((2, 5), -100), generator()).sum().backward()
    assert not weight.grad.any()


def test_distribution_is_known_or_not():
    assert distribution_of(toys.llama()) == "causal_lm"
    assert distribution_of(toys.vit()) == "classification"
    assert distribution_of(nn.Linear(2, 2)) is None
    tiny = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    for labels, problem, expected in (
        (3, None, "classification"),
        (1, None, None),
        (3, "multi_label_classification", None),
    ):
        model = AutoModelForSequenceClassification.from_config(
            BertConfig(**tiny, num_labels=labels, problem_type=problem)
        )
        assert distribution_of(model) == expected
    t5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert distribution_of(T5ForConditionalGeneration(t5)) is None


def test_first_rows_cuts_what_is_per_example():
    inputs = {
        "x": torch.arange(8).view(4, 2),
        "y": torch.arange(4),
        "other": torch.zeros(3),
        "scalar": torch.tensor(4.0),
    }
    part = first_rows(inputs, 3, 4)
    assert {key: tuple(value.shape) for key, value in part.items()} == {
        "x": (3, 2),
        "y": (3,),
        "other": (3,),
        "scalar": (),
    }
    assert torch.equal(part["x"], inputs["x"][:3])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_also_with_activation_checkpointing(checkpointing):
    model = toys.llama(dropout=0.5)
    model.train()
    model.model.norm.eval()  # a module that the user has frozen in evaluation mode stays there
    if checkpointing:
        # Renamed in transformers 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    ids = toys.text(2)[0]["input_ids"][None]
    modes = [m.training for m in model.modules()]
    runs = []
    layer = model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with without_randomness(model):
        first = model(ids, use_cache=False).logits
        assert torch.equal(first, model(ids, use_cache=False).logits)
        runs.clear()
        first.sum().backward()
    assert len(runs) == checkpointing  # recomputed in the backward pass: the activations had not been kept
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(KeyError), without_randomness(model):
        raise KeyError
    assert [m.training for m in model.modules()] == modes


def test_running_statistics_stand_still():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with without_randomness(model):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model[1].training and model[2].training


def test_kinds_of_layers():
    model = toys.vit()
    kinds = layer_kinds(model)
    names = {name: kinds[p] for name, p in model.named_parameters()}
    assert names["vit.embeddings.cls_token"] == "embedding"
    assert names["classifier.weight"] == "head"
    assert names["classifier.bias"] == "bias"
    assert names["vit.layernorm.weight"] == "norm"
    assert {kinds[p] for p in toys.llama().parameters() if p in kinds} == set()
    assert set(layer_kinds(toys.llama()).values()) == {"embedding", "attention", "mlp", "norm", "head"}
    assert set(names.values()) == {"embedding", "attention", "mlp", "norm", "head", "bias"}
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert list(layer_kinds(network).values()) == ["conv", "bias", "norm", "bias", "other", "bias"]
