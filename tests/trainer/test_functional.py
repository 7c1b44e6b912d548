"""The functional second pass of models of transformers: what reaches the logits, and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, set_seed

from helpers import toys
from helpers.training import relative_error_of_path, run, sum_of_token_losses
from hf_gr import GRMixin, GRTrainer
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm
from hf_gr.optim.second_passes import OutputGradients

R, STEPS = 0.1, 3
FUNCTIONAL = {"gr_second_pass_kind": "functional", "gr_r": R, "gr_warmup": "none"}
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": STEPS}


def reference(model: nn.Module, windows, label_smoothing: float = 0.0, share: float = 1.0) -> list[torch.Tensor]:
    """The path of SGD along (1 - share) g1 + share g2, written with one call of autograd per gradient."""

    def logits_and_loss(of: nn.Module, window):
        count = sum((e["labels"][1:] != -100).sum() for e in window)
        logits = of(input_ids=torch.stack([e["input_ids"] for e in window])).logits
        return logits, sum_of_token_losses(
            lambda **_: type("Output", (), {"logits": logits}), window, label_smoothing
        ) / count

    params, path = list(model.parameters()), [toys.weights(model)]
    for window in windows:
        logits, loss = logits_and_loss(model, window)
        g1 = torch.autograd.grad(loss, params, retain_graph=True)
        (weight,) = torch.autograd.grad(loss, logits)
        length = torch.cat([g.reshape(-1) for g in g1]).norm()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), g1, strict=True):
                p += R * g / length
        g2 = torch.autograd.grad(logits_and_loss(moved, window)[0], list(moved.parameters()), weight)
        with torch.no_grad():
            for p, a, b in zip(params, g1, g2, strict=True):
                p -= SGD["learning_rate"] * ((1 - share) * a + share * b)
        path.append(toys.weights(model))
    return path


def windows_of(data, size):
    return [data[k * size : (k + 1) * size] for k in range(STEPS)]


def train(folder, model, data=None, cls=GRTrainer, **flags):
    recorder = toys.PathRecorder()
    run(model, toys.text() if data is None else data, folder, cls=cls, callbacks=[recorder],
        **{**FUNCTIONAL, **SGD, **flags})  # fmt: skip
    return recorder.path


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("flags", [{}, {"label_smoothing_factor": 0.2}, {"gr_lambda": 0.4 * R}], ids=str)
def test_a_language_model_equals_the_reference(flags, accumulation, tmp_path):
    """Masks, the number of tokens of the whole window and label smoothing are all in the gradient of the logits. (Llama
    computes its norms and its loss in float32, also in a model of float64.)"""
    path = train(tmp_path, toys.llama().double(), gradient_accumulation_steps=accumulation, **flags)
    share = flags.get("gr_lambda", R) / R
    windows = windows_of(toys.text(), 2 * accumulation)
    expected = reference(toys.llama().double(), windows, flags.get("label_smoothing_factor", 0.0), share)
    assert relative_error_of_path(path, expected) <= 1e-6


def test_it_differs_from_the_plain_second_pass(tmp_path):
    functional = train(tmp_path, toys.llama())
    full = train(tmp_path, toys.llama(), gr_second_pass_kind="full")
    assert relative_error_of_path(functional, full) > 1e-3


class Linear(nn.Module):
    """Its Jacobian is the same everywhere."""

    def __init__(self):
        super().__init__()
        set_seed(0)
        self.layer = nn.Linear(192, 10)

    def forward(self, pixel_values, labels):
        logits = self.layer(pixel_values.flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_for_a_linear_model_both_gradients_are_the_same(tmp_path):
    functional = train(tmp_path, Linear(), toys.images())
    plain = train(tmp_path, Linear(), toys.images(), gr_lambda=0.0)
    assert torch.equal(functional[-1], plain[-1])
    assert not torch.equal(train(tmp_path, Linear(), toys.images(), gr_second_pass_kind="full")[-1], plain[-1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])  # the loss is of the logits in bf16, or of a copy in float32
def test_bf16(smoothing, tmp_path):
    """A short radius leaves the plain gradient, up to the rounding of bf16."""
    flags = {"bf16": True, "label_smoothing_factor": smoothing}
    functional = train(tmp_path, toys.llama(), **flags)
    plain = train(tmp_path, toys.llama(), **flags, gr_lambda=0.0)
    full = train(tmp_path, toys.llama(), **flags, gr_second_pass_kind="full")
    exact = reference(toys.llama(), windows_of(toys.text(), 2), smoothing)
    error = relative_error_of_path(functional, exact)
    assert error < 0.02  # bf16 has 8 bits
    assert relative_error_of_path(plain, exact) > 3 * error < relative_error_of_path(full, exact)


def test_dropout_and_checkpointing(tmp_path):
    """Both passes draw the same masks."""
    path = train(tmp_path, toys.llama(dropout=0.3), gradient_accumulation_steps=2)
    checkpointed = train(tmp_path, toys.llama(dropout=0.3), gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert torch.equal(path[-1], checkpointed[-1])
    tiny = train(tmp_path, toys.llama(dropout=0.3), gr_r=1e-5)
    plain = train(tmp_path, toys.llama(dropout=0.3), gr_lambda=0.0)
    assert relative_error_of_path(tiny, plain) < 1e-3


def test_a_gradient_scaler_changes_nothing(tmp_path):
    plain = train(tmp_path, toys.llama().double(), gradient_accumulation_steps=2)
    scaled = train(tmp_path, toys.llama().double(), gradient_accumulation_steps=2, cls=toys.ScaledTrainer)
    assert relative_error_of_path(scaled, plain) <= 1e-12


def test_adapters(tmp_path):
    def adapted():
        model = get_peft_model(toys.llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        return model.double()

    set_seed(1)
    model = adapted()
    start = {name: p.clone() for name, p in model.named_parameters()}
    path = train(tmp_path, model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    set_seed(1)
    assert relative_error_of_path(path, train(tmp_path, adapted(), gr_second_pass_kind="full")) > 1e-4


def next_token_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Tempered(Trainer):
    """Divides the logits in place, and runs a reference model first."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        with torch.no_grad():
            model(input_ids=inputs["input_ids"])
        logits = model(input_ids=inputs["input_ids"]).logits
        logits.div_(0.7)
        return (
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        )


class InPlace(GRMixin, Tempered):
    pass


class OutOfPlace(GRMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits / 0.7
        labels = inputs["labels"]
        return (
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        )


def test_logits_that_a_trainer_changes_in_place(tmp_path):
    changed = train(tmp_path, toys.llama(), cls=InPlace)
    assert torch.equal(changed[-1], train(tmp_path, toys.llama(), cls=OutOfPlace)[-1])


# ---- What is refused ----


def mixture(coefficient: float):
    set_seed(0)
    config = MixtralConfig(vocab_size=toys.VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
                           output_router_logits=coefficient > 0, router_aux_loss_coef=coefficient)  # fmt: skip
    return MixtralForCausalLM(config)


class Other(nn.Module):
    """A loss of the features."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(192, 4), nn.Linear(4, 10)

    def forward(self, pixel_values, labels):
        features = self.layer(pixel_values.flatten(1))
        return {"loss": features.square().mean(), "logits": self.head(features)}


class Unnamed(Linear):
    def forward(self, pixel_values, labels):
        return {"loss": super().forward(pixel_values, labels)["loss"]}


def test_a_mixture_of_experts_is_refused_with_its_auxiliary_loss_only(tmp_path):
    with pytest.raises(
        ValueError, match="gr_second_pass_kind='functional': the loss depends on parameters not only thr"
    ):
        train(tmp_path, mixture(0.01))
    assert relative_error_of_path(train(tmp_path, mixture(0.0)), train(tmp_path, mixture(0.0), gr_lambda=0.0)) > 1e-3


@pytest.mark.parametrize(
    ("model", "message"), [(Unnamed, "Unnamed returns no logits"), (Other, "the loss depends on parameters not only")]
)
def test_a_loss_of_something_else_is_refused(model, message, tmp_path):
    model = model()
    before = toys.weights(model)
    with pytest.raises(ValueError, match=f"gr_second_pass_kind='functional': {message}.* Set gr_second_pass_kind=full"):
        train(tmp_path, model, toys.images())
    assert torch.equal(toys.weights(model), before)


def test_a_compiled_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="with torch_compile, the gradient of the logits stays inside"):
        toys.trainer(tmp_path, **FUNCTIONAL, torch_compile=True, torch_compile_backend="aot_eager")
    toys.trainer(tmp_path, **FUNCTIONAL, gr_lambda=0.0, torch_compile=True, torch_compile_backend="aot_eager")


# ---- Without a trainer ----


def test_the_loop_of_the_docstring(tmp_path):
    model, batch = toys.llama().double(), toys.text()[:2]
    inputs = {key: torch.stack([e[key] for e in batch]) for key in ("input_ids", "labels")}
    params, outputs = list(model.parameters()), OutputGradients()
    with outputs.of(model) as logits:
        loss = model(**inputs).loss
        outputs.record(loss, loss.backward, logits)
    perturbation = Perturbation(params)
    perturbation.apply(R, gradient_norm(params), grad_scale=0.0)
    with outputs.of(model) as logits:
        model(**inputs)
        outputs.replay(logits)
    perturbation.restore()
    with torch.no_grad():
        for p in params:
            p -= SGD["learning_rate"] * p.grad
    expected = reference(toys.llama().double(), [batch])
    assert relative_error_of_path([expected[0], toys.weights(model)], expected) <= 1e-6


def test_half_precision_weights(tmp_path):
    """The first pass has logits in bfloat16, the second in float32."""
    flags = {"gr_half_precision_weights": True, "learning_rate": 1.0}
    functional = train(tmp_path, toys.llama().bfloat16(), **flags)
    exact = train(tmp_path, toys.llama(), **flags | {"gr_half_precision_weights": False})
    assert relative_error_of_path([w.float() for w in functional], exact) < 0.2
