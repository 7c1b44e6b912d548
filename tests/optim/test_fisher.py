"""The gradient of sampled labels: against closed forms, and what it must leave alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from helpers import toys
from hf_gr import IRE
from hf_gr.optim.fisher import (
    HEADS,
    causal_lm_losses,
    classification_losses,
    first_rows,
    head_of,
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
    """Labels are drawn for all positions; those without one have the loss 0."""
    logits = torch.randn(2, 5, 7, generator=generator())
    labels = torch.tensor([[-100, 1, 2, -100, 4], [-100, -100, -100, -100, 3]])
    losses = causal_lm_losses(logits, labels, generator(1))
    rows = logits[:, :-1].flatten(0, 1)  # each predicts the next token
    expected = F.cross_entropy(rows, sample_labels(rows, generator(1)), reduction="none")
    counts = torch.tensor([True, True, False, True, False, False, False, True])
    assert torch.equal(losses, expected * counts)
    assert classification_losses(logits[:, 0], torch.tensor([-100, 3]), generator()).count_nonzero() == 1
    # A process may have nothing to count, and must still take part in the reduction.
    weight = logits.clone().requires_grad_()
    causal_lm_losses(weight, torch.full((2, 5), -100), generator()).sum().backward()
    assert not weight.grad.any()


#: For each head, the shape of the logits of one batch and its labels; -100 does not count.
CASES = {
    "masked_lm": ((2, 3, 4), [[-100, 2, -100], [0, -100, 3]]),
    "causal_lm": ((2, 3, 4), [[-100, 2, -100], [0, -100, 3]]),
    "seq2seq": ((1, 3, 4), [[1, 0, -100]]),
    "token_classification": ((2, 2, 3), [[-100, 1], [2, 0]]),
    "multiple_choice": ((2, 4), [3, 0]),
    "classification": ((3, 4), [1, -100, 2]),
    "multi_label": ((2, 3), [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
    "regression": ((3, 1), [0.5, -1.0, 2.0]),
}


def covariance(name: str, logits: torch.Tensor) -> torch.Tensor:
    """The Fisher matrix of one position with respect to its logits, in closed form."""
    if name == "regression":
        return torch.eye(logits.shape[-1])
    if name == "multi_label":
        p = logits.sigmoid()
        return torch.diag_embed(p * (1 - p))
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


@pytest.mark.parametrize("name", HEADS)
def test_mean_of_the_estimate_is_the_exact_fisher_matrix_of_the_head(name):
    draws, (shape, labels) = 20_000, CASES[name]
    base, labels = torch.randn(shape, generator=generator(3)), torch.tensor(labels)
    logits = base.expand(draws, *shape).flatten(0, 1).clone().requires_grad_()
    losses = HEADS[name].losses(logits, labels.expand(draws, *labels.shape).flatten(0, 1), generator())
    losses.sum().backward()
    scores = logits.grad.view(draws, *shape)
    estimate = torch.einsum("n...i,n...j->...ij", scores, scores) / draws

    counts = torch.ones(shape[:-1]) if HEADS[name].allows_fractions else (labels != -100).float()
    if name == "causal_lm":  # a position predicts the token after it; the last one predicts none
        counts = torch.cat([counts[:, 1:], torch.zeros(len(counts), 1)], dim=1)
    exact = covariance(name, base) * counts[..., None, None]
    # Five standard deviations of a mean of products whose variance is at most 2: 0.05.
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)
    assert (estimate[counts == 0] == 0).all()
    per_position = shape[-1] if HEADS[name].allows_fractions else 1
    assert losses.count_nonzero() == draws * counts.sum() * per_position


def test_estimate_of_a_masked_language_model_is_its_exact_fisher_diagonal():
    """Down to the weights: the sum over all words at both masked positions, against the mean of 3000 draws."""
    torch.manual_seed(0)
    model = tiny_bert(BertForMaskedLM, vocab_size=6).eval()
    ids, labels = torch.tensor([[2, 1, 3, 1]]), torch.tensor([[-100, 4, -100, 5]])
    bias = model.cls.predictions.bias
    weight = model.bert.encoder.layer[0].output.dense.bias
    model.cls.predictions.decoder.weight.data.mul_(20)  # far from uniform
    logits = model(ids).logits

    def gradient(loss):
        return torch.cat(torch.autograd.grad(loss, (bias, weight), retain_graph=True))

    log_p = logits[0, labels[0] != -100].log_softmax(-1)
    exact = sum(p.exp().item() * gradient(-p).square() for p in log_p.flatten())
    draw, total = generator(), 0.0
    for _ in range(3000):
        total = total + gradient(HEADS["masked_lm"].losses(logits, labels, draw).sum()).square()
    torch.testing.assert_close(total / 3000, exact, rtol=0.15, atol=1e-3 * exact.max().item())
    assert torch.corrcoef(torch.stack([total, exact]))[0, 1] > 0.999


def tiny_bert(cls, **settings):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return cls(BertConfig(**{"vocab_size": 20, **sizes, **settings}))


def test_head_is_known_or_not():
    single, multi = {"num_labels": 3}, {"num_labels": 3, "problem_type": "multi_label_classification"}
    t5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    prophet = {"vocab_size": 20, "hidden_size": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    prophet |= {f"num_{side}_{kind}": 1 for side in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
    expected = [
        (toys.llama(), "causal_lm"),
        (tiny_bert(BertLMHeadModel, is_decoder=True), "causal_lm"),
        (toys.vit(), "classification"),
        (tiny_bert(BertForMaskedLM), "masked_lm"),
        (XLNetLMHeadModel(XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8)), "masked_lm"),
        (tiny_bert(BertForTokenClassification), "token_classification"),
        (tiny_bert(BertForMultipleChoice), "multiple_choice"),
        (tiny_bert(BertForSequenceClassification, **single), "classification"),
        (tiny_bert(BertForSequenceClassification, **multi), "multi_label"),
        (tiny_bert(BertForSequenceClassification, num_labels=1), "regression"),
        (tiny_bert(BertForSequenceClassification, num_labels=2, problem_type="regression"), "regression"),
        (T5ForConditionalGeneration(T5Config(**t5)), "seq2seq"),
        (T5ForSequenceClassification(T5Config(**t5, num_labels=3)), "classification"),
    ]
    for model, name in expected:
        assert head_of(model) is HEADS[name], type(model).__name__
    unknown = [
        nn.Linear(2, 2),
        tiny_bert(BertForPreTraining),
        tiny_bert(BertForQuestionAnswering),
        ProphetNetForConditionalGeneration(ProphetNetConfig(**prophet)),  # three tokens per position
    ]
    assert [head_of(model) for model in unknown] == [None] * 4


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
