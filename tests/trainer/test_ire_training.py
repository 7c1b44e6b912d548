"""IRE inside the trainer: the estimate against a slow reference, what it must not disturb, and the flags."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)

from helpers import toys
from helpers.reference import flat_masks, sampled_label_gradient
from helpers.training import Estimates, Normalized, run
from hf_gr import IRE, GRConfig, GRTrainer
from hf_gr.config import GRArguments


class Spy(TrainerCallback):
    """Keeps, for each choice of coordinates, the step, the weights, the estimate and the masks."""

    def __init__(self, monkeypatch):
        self.updates = []
        original = IRE.update_mask

        def update_mask(ire, *args, **kwargs):
            result = original(ire, *args, **kwargs)
            params = [p for group in ire.param_groups for p in group["params"] if p.requires_grad]
            self.updates.append((ire, {p: p.grad for p in params}, {p: ire._masks[p].clone() for p in params}))
            return result

        monkeypatch.setattr(IRE, "update_mask", update_mask)
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if len(self.updates) > len(self.steps):
            self.steps.append(state.global_step)
            self.weights = [*getattr(self, "weights", []), copy.deepcopy(model)]


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


IRE_FLAGS = {"gr_lambda": 0, "ire_kappa": 2.0, "ire_interval": 2, "ire_start_step": 1}


def batches(data, step, accumulation, size=2):
    first = step * accumulation * size
    micro = [data[first + k * size : first + (k + 1) * size] for k in range(accumulation)]
    return [{key: torch.stack([torch.as_tensor(e[key]) for e in batch]) for key in batch[0]} for batch in micro]


# ---- The estimate ----


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_estimate_and_mask_equal_the_reference(name, accumulation, spy, tmp_path):
    create, examples = {"llama": (toys.llama, toys.text), "vit": (toys.vit, toys.images)}[name]
    data = examples(2 * accumulation * 6)
    trainer = run(
        create(0.3), data, tmp_path, callbacks=[spy], gradient_accumulation_steps=accumulation, seed=5, **IRE_FLAGS
    )
    assert spy.steps == [1, 3, 5]
    names = {p: name for name, p in trainer.model.named_parameters()}
    for step, model, (_, grads, masks) in zip(spy.steps, spy.weights, spy.updates, strict=True):
        expected = sampled_label_gradient(model, [batches(data, step, accumulation)], 5, step)
        expected = dict(zip((n for n, _ in model.named_parameters()), expected, strict=True))
        for p, grad in grads.items():
            # float32, summed in another order
            torch.testing.assert_close(grad, expected[names[p]], rtol=1e-4, atol=1e-7)
        for p, mask in zip(grads, flat_masks(list(grads.values()), 0.6), strict=True):
            assert torch.equal(masks[p].bool(), mask)


def test_labels_are_drawn_alike_with_numpy_1(spy, tmp_path, monkeypatch):
    """There, a uint64 cannot be shifted by an int."""
    flags = {**IRE_FLAGS, "max_steps": 2, "seed": 5}
    run(toys.vit(), toys.images(), tmp_path, callbacks=[spy], **flags)

    class UInt64:
        def __init__(self, value):
            self.value = value

        def __int__(self):
            return int(self.value)

    class SeedSequence(np.random.SeedSequence):
        def generate_state(self, *args):
            return [UInt64(value) for value in super().generate_state(*args)]

    monkeypatch.setattr(np.random, "SeedSequence", SeedSequence)
    run(toys.vit(), toys.images(), tmp_path, callbacks=[spy], **flags)
    first, second = (list(grads.values()) for _, grads, _ in spy.updates)
    assert all(torch.equal(g, h) for g, h in zip(first, second, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("gr", [{"gr_lambda": 0}, {"gr_warmup": "none", "gr_lambda": 0.05}])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"])
def test_with_kappa_0_the_estimate_leaves_no_trace(optim, gr, accumulation, recorder, tmp_path):
    """IRE with kappa = 0, choosing coordinates before every step: bit for bit the run without it, dropout and all."""
    settings = {"gradient_accumulation_steps": accumulation, "optim": optim, **gr}
    plain = copy.deepcopy(recorder)
    without = run(toys.llama(0.3), toys.text(), tmp_path, callbacks=[plain], **settings)
    model = toys.llama(0.3)
    args = GRConfig(**toys.arguments(tmp_path, ire_interval=1, **settings))
    maker = GRTrainer(model=model, args=args)
    ire = IRE(maker.create_optimizer(), kappa=0.0)
    trainer = GRTrainer(model=model, args=args, train_dataset=toys.text(), optimizers=(ire, None), callbacks=[recorder])
    trainer.train()
    assert ire.state_dict()["ire"]["updates"] == 6
    assert all(torch.equal(a, b) for a, b in zip(recorder.path, plain.path, strict=True))
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in trainer.state.log_history if key in e] == [
            e[key] for e in without.state.log_history if key in e
        ]


def test_batch_norm_statistics_are_those_of_training_alone(tmp_path):
    class Classifies(GRTrainer):
        def ire_sampled_losses(self, model, inputs, generator):
            return model(**inputs)["loss"][None]

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "labels": i % 2} for i in range(12)]
    buffers = []
    for kappa in (0.0, 1e-30):
        set_seed(0)
        flags = {"gr_lambda": 0, "ire_kappa": kappa, "ire_interval": 1, "per_device_train_batch_size": 4}
        trainer = run(Normalized(), data, tmp_path, cls=Classifies, max_steps=3, **flags)
        buffers.append([b.clone() for b in trainer.model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    assert buffers[1][2] == 3


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, [2, 2, 2]), (0.5, [2, 1]), (0.1, [1]), (0.9, [2, 2, 2])])
def test_share_of_the_samples(fraction, expected, tmp_path):
    rows = []

    class Counts(GRTrainer):
        def ire_sampled_losses(self, model, inputs, generator):
            rows.append((len(inputs["labels"]), len(inputs["pixel_values"])))
            return super().ire_sampled_losses(model, inputs, generator)

    trainer = run(
        toys.vit(),
        toys.images(6),
        tmp_path,
        cls=Counts,
        gradient_accumulation_steps=3,
        max_steps=1,
        ire_probe_fraction=fraction,
        **{**IRE_FLAGS, "ire_start_step": 0},
    )
    assert rows == [(n, n) for n in expected]
    plain = run(toys.vit(), toys.images(6), tmp_path, gradient_accumulation_steps=3, max_steps=1, gr_lambda=0)
    assert trainer.state.total_flos == pytest.approx(plain.state.total_flos * (1 + fraction))


def test_hook_for_other_outputs(tmp_path):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(192, 1)

        def forward(self, pixel_values, labels):
            return {"loss": (self.linear(pixel_values.flatten(1)).squeeze(1) - labels).square().mean()}

    class Gaussian(GRTrainer):
        def ire_sampled_losses(self, model, inputs, generator):
            mean = model.linear(inputs["pixel_values"].flatten(1)).squeeze(1)
            return 0.5 * (mean.detach() + torch.randn(mean.shape, generator=generator) - mean).square()

    with pytest.raises(ValueError, match=r"IRE .* supports .*, not Regression\. Override .* ire_sampled_losses"):
        run(Regression(), toys.images(), tmp_path, **IRE_FLAGS)
    trainer = run(Regression(), toys.images(), tmp_path, cls=Gaussian, **IRE_FLAGS)
    assert trainer.state.log_history[-2]["ire_flat_fraction"] == pytest.approx(0.6, abs=0.01)


def test_gradients_left_by_an_incomplete_step_are_kept(recorder, tmp_path):
    # Three batches an epoch do not divide by two: Trainer carries the gradient of the odd one over.
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from toys.images(6)

    paths = []
    for flags in ({}, {"ire_kappa": 1e-30, "ire_interval": 1}):
        own = copy.deepcopy(recorder)
        run(
            toys.vit(),
            Stream(),
            tmp_path,
            callbacks=[own],
            gradient_accumulation_steps=2,
            max_steps=4,
            gr_lambda=0,
            **flags,
        )
        paths.append(own.path)
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


@pytest.mark.parametrize("at_once", [True, False])
def test_an_estimate_that_is_not_finite_keeps_the_mask(at_once, tmp_path, caplog):
    """It is told at once, or, as on a GPU, when numbers are read: here at the end."""

    class Overflows(GRTrainer):
        def get_batch_samples(self, *args):
            self.nonfinite_guard.looks_at_once = at_once
            samples = super().get_batch_samples(*args)
            if self.state.global_step == 3:
                assert ("is not finite" in caplog.text) == at_once
            return samples

        def ire_sampled_losses(self, *args):
            return super().ire_sampled_losses(*args) * (math.inf if self.state.global_step == 3 else 1)

    trainer = run(toys.vit(), toys.images(), tmp_path, cls=Overflows, logging_steps=100, **IRE_FLAGS)
    assert "Step 3: the gradient of the sampled labels is not finite. IRE keeps its last choice" in caplog.text
    assert trainer.recorder.record.segments[-1].ire_choices == 2
    assert trainer.ire_optimizer.state_dict()["ire"]["updates"] == 2
    assert toys.weights(trainer.model).isfinite().all()


def test_labels_that_are_all_masked_keep_the_mask(tmp_path, caplog):
    data = toys.text()
    for example in data[6:8]:
        example["labels"][:] = -100
    trainer = run(toys.llama(), data, tmp_path, **IRE_FLAGS)
    assert trainer.ire_optimizer.state_dict()["ire"]["updates"] == 2
    assert "its batch has no label. IRE keeps its last choice of coordinates" in caplog.text
    assert toys.weights(trainer.model).isfinite().all()


def test_gradient_scaler_is_respected(tmp_path):
    class Scaled(Estimates):
        def get_batch_samples(self, *args):
            self.accelerator.native_amp = True
            if self.scale:  # accelerate gives a CPU no scaler: put in the one a GPU would have
                self.accelerator.scaler = self.accelerator.scaler or torch.amp.GradScaler("cpu", init_scale=1024.0)
            return super().get_batch_samples(*args)

    estimates = []
    for scale in (False, True):
        Scaled.scale = scale
        flags = {**IRE_FLAGS, "ire_start_step": 0}
        estimates += run(toys.vit(), toys.images(), tmp_path, cls=Scaled, max_steps=1, **flags).estimates
    for a, b in zip(*estimates, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_activation_checkpointing_changes_nothing(tmp_path):
    flag = "activation_checkpointing" if hasattr(GRConfig, "activation_checkpointing") else "gradient_checkpointing"
    runs = [run(toys.llama(0.2), toys.text(), tmp_path, **IRE_FLAGS, **{flag: on}) for on in (False, True)]
    assert runs[1].model.model.layers[0].gradient_checkpointing
    assert torch.equal(*(toys.weights(trainer.model) for trainer in runs))


def test_torch_compile(tmp_path):
    flags = {**IRE_FLAGS, "max_steps": 3, "optim": "sgd"}
    plain = run(toys.llama(), toys.text(), tmp_path, **flags)
    compiled = run(toys.llama(), toys.text(), tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **flags)
    torch.testing.assert_close(toys.weights(compiled.model), toys.weights(plain.model), rtol=1e-4, atol=1e-6)


def test_bf16_autocast_chooses_nearly_the_same_coordinates(spy, tmp_path):
    for bf16 in (False, True):
        run(toys.llama(), toys.text(), tmp_path, bf16=bf16, max_steps=1, **{**IRE_FLAGS, "ire_start_step": 0})
    exact, rounded = (torch.cat([m.flatten() for m in masks.values()]).bool() for _, _, masks in spy.updates)
    # bf16 has 8 bits, so some of the labels drawn are others as well; by chance 0.43 would agree.
    assert ((exact & rounded).sum() / (exact | rounded).sum()).item() > 0.8


# ---- Optimizers ----


@pytest.mark.parametrize("gr", [{"gr_lambda": 0}, {"gr_warmup": "none"}, {"gr_warmup": "none", "gr_lambda": 0.05}])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor"])
def test_any_optimizer_with_and_without_gr(optim, gr, recorder, tmp_path):
    """Each step of IRE is the step that the base optimizer took, and kappa times it again where the mask is 1."""
    bases, ire_steps = [], []

    class Watches(GRTrainer):
        def create_optimizer(self, *args):
            ire = super().create_optimizer(*args)
            params = [p for group in ire.param_groups for p in group["params"]]
            # A hook on the base keeps IRE from its block-wise path, which tests/test_ire.py compares.
            ire.base_optimizer.register_step_pre_hook(lambda *_: bases.append([[p.detach().clone() for p in params]]))
            ire.base_optimizer.register_step_post_hook(
                lambda *_: bases[-1].append([p.detach().clone() for p in params])
            )
            ire.register_step_post_hook(
                lambda *_: ire_steps.append(
                    (
                        [p.detach().clone() for p in params],
                        [ire._masks.get(p, torch.zeros_like(p)).clone() for p in params],
                    )
                )
            )
            return ire

    trainer = run(toys.llama().double(), toys.text(), tmp_path, cls=Watches, optim=optim, **{**IRE_FLAGS, **gr})
    assert len(bases) == len(ire_steps) == 6
    for step, ((old, base), (new, masks)) in enumerate(zip(bases, ire_steps, strict=True)):
        factor = 2.0 if step >= 1 else 0.0
        for p_old, p_base, p_new, mask in zip(old, base, new, masks, strict=True):
            expected = p_base + factor * mask * (p_base - p_old) if step >= 1 else p_base
            torch.testing.assert_close(p_new, expected, rtol=0, atol=1e-14)
    assert (
        {"gr_perturbed_grad_norm" in e for e in trainer.state.log_history if "loss" in e} == {gr["gr_lambda"] != 0}
        if ("gr_lambda" in gr)
        else {True}
    )


def test_uniform_control_is_a_longer_learning_rate(recorder, tmp_path):
    longer = copy.deepcopy(recorder)
    settings = {"optim": "sgd", "gr_lambda": 0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    run(toys.vit(), toys.images(), tmp_path, callbacks=[longer], learning_rate=0.03, **settings)
    run(
        toys.vit(),
        toys.images(),
        tmp_path,
        callbacks=[recorder],
        learning_rate=0.01,
        ire_kappa=2.0,
        ire_mask="uniform",
        **settings,
    )
    for a, b in zip(recorder.path, longer.path, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_learning_rate_scheduler_reaches_the_base_optimizer(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, **IRE_FLAGS)
    assert [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e] == pytest.approx(
        [1e-2 * (6 - t) / 6 for t in range(6)]
    )
    assert trainer.ire_optimizer.base_optimizer.param_groups[0]["lr"] == 0


def test_only_what_is_trained_has_a_mask(spy, tmp_path):
    model = get_peft_model(toys.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = run(model, toys.text(), tmp_path, **IRE_FLAGS)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = trainer.ire_optimizer.state_dict()["ire"]["masks"]
    assert sum(m.numel() for m in saved.values()) == count < 1000
    assert all(m.dtype == torch.uint8 for m in saved.values())


def test_excluded_by_name(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, ire_exclude=["embeddings", "layernorm", "bias"], **IRE_FLAGS)
    names = {p: name for name, p in trainer.model.named_parameters()}
    masked = {names[p] for p in trainer.ire_optimizer.flat_counts}
    assert masked and not any(word in name for name in masked for word in ("embeddings", "layernorm", "bias"))
    logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("ire_flat_fraction_")}
    assert logged == {"ire_flat_fraction_attention", "ire_flat_fraction_mlp", "ire_flat_fraction_head"}
    with pytest.raises(ValueError, match="ire_exclude: no trainable parameter has 'embedings' in its name"):
        run(toys.vit(), toys.images(), tmp_path, ire_exclude=["embedings"], **IRE_FLAGS)
    with pytest.raises(ValueError, match="nothing is left to amplify"):
        run(toys.vit(), toys.images(), tmp_path, ire_exclude=["weight", "bias", "embeddings"], **IRE_FLAGS)


def test_a_wrapper_that_is_given_to_the_trainer_is_not_dropped(tmp_path):
    """IRE would be around what it wraps, and the wrapper gone."""
    model = toys.vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="IRE around SGD, which wraps SGD"):
        run(model, toys.images(), tmp_path, trainer_kwargs={"optimizers": (optimizer, None)}, **IRE_FLAGS)


def test_an_ire_that_is_given_to_the_trainer_is_used(spy, tmp_path):
    model = toys.vit()
    ire = IRE(torch.optim.AdamW(model.parameters(), lr=1e-2), kappa=3.0)
    args = {"ire_interval": 3, "ire_start_step": 0, "gr_lambda": 0}
    trainer = run(model, toys.images(), tmp_path, trainer_kwargs={"optimizers": (ire, None)}, callbacks=[spy], **args)
    assert spy.steps == [0, 3]
    assert trainer.state.log_history[-2]["ire_kappa"] == 3.0
    trainer.train()  # and a second time
    assert spy.steps == [0, 3, 0, 3]
    with pytest.raises(
        ValueError, match=r"ire_kappa=1.0, but the optimizer of this trainer is already IRE with kappa=3.0"
    ):
        run(model, toys.images(), tmp_path, trainer_kwargs={"optimizers": (ire, None)}, ire_kappa=1.0, **args)


def test_flags_that_a_given_ire_does_not_read_are_named(tmp_path, caplog):
    model = toys.vit()
    ire = IRE(torch.optim.SGD(model.parameters(), lr=1e-2))
    flags = {"gr_lambda": 0, "ire_gamma": 0.7, "ire_mask": "random", "ire_interval": 3}
    trainer = run(model, toys.images(), tmp_path, trainer_kwargs={"optimizers": (ire, None)}, **flags)
    message = "ire_gamma, ire_mask: no effect, the IRE given to the trainer has its own settings."
    assert caplog.text.count(message) == 1
    trainer.train()
    assert caplog.text.count(message) == 1


def test_training_twice_wraps_once(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, **IRE_FLAGS)
    ire = trainer.ire_optimizer
    trainer.train()
    assert trainer.ire_optimizer is ire
    assert not isinstance(ire.base_optimizer, IRE)
    trainer.args.ire_kappa = 0.0  # which would change nothing
    with pytest.raises(ValueError, match=r"ire_kappa=0.0, but the optimizer of this trainer is already IRE"):
        trainer.train()


# ---- Resume ----


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("optim", "flags"),
    [
        ("adamw_torch_fused", {"gr_lambda": 0, "ire_beta": 0.5}),
        ("adamw_torch_fused", {"gr_lambda": 0, "ire_mask": "random"}),
        ("sgd", {"gr_lambda": 0.05, "gr_warmup_steps": 4}),
    ],
)
def test_resume_between_two_masks_is_bit_identical(optim, flags, accumulation, tmp_path):
    def trainer(**kwargs):
        settings = {
            "optim": optim,
            "max_steps": 9,
            "save_strategy": "steps",
            "save_steps": 1,
            "gradient_accumulation_steps": accumulation,
            "train_sampling_strategy": "random",
            "ire_kappa": 2.0,
            "ire_interval": 3,
            "ire_start_step": 2,  # masks at 2, 5, 8
            **flags,
            **kwargs,
        }
        return toys.trainer(tmp_path, toys.llama(0.2), toys.text(), **settings)

    whole = trainer()
    whole.train()
    for step in (1, 3, 4, 5):
        resumed = trainer(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(toys.weights(resumed.model), toys.weights(whole.model))
        logs = [
            [{k: v for k, v in e.items() if k.startswith("ire_")} for e in t.state.log_history if "loss" in e]
            for t in (whole, resumed)
        ]
        assert logs[0] == logs[1]


def test_ire_can_be_switched_on_when_resuming(spy, tmp_path):
    """From a checkpoint that no run of another method has signed, such as one of `Trainer`."""
    run(toys.vit(), toys.images(), tmp_path, gr_lambda=0, max_steps=4, save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-2" / "run.json").unlink()
    trainer = toys.trainer(tmp_path, callbacks=[spy], max_steps=6, **{**IRE_FLAGS, "ire_interval": 4})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert spy.steps == [2, 5]  # at once, since there is no mask yet, and then on the usual steps


# ---- Log ----


def test_logged_values(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, ire_kappa_schedule="lr", **{**IRE_FLAGS, "ire_start_step": 2})
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["ire_kappa"] for e in logs] == pytest.approx([0, 0, 2 * 4 / 6, 2 * 3 / 6, 2 * 2 / 6, 2 * 1 / 6])
    assert [e["ire_flat_fraction"] for e in logs] == pytest.approx([0, 0, 0.6, 0.6, 0.6, 0.6], abs=1e-4)
    kinds = ("embedding", "attention", "mlp", "norm", "bias", "head")
    sizes = dict.fromkeys(kinds, 0)
    for p, kind in trainer.ire._kinds.items():
        sizes[kind] += p.numel()
    total = sum(logs[-1][f"ire_flat_fraction_{kind}"] * sizes[kind] for kind in kinds) / sum(sizes.values())
    assert total == pytest.approx(logs[-1]["ire_flat_fraction"])
    assert ["ire_mask_overlap" in e for e in logs] == [False] * 4 + [True] * 2
    assert 0.3 < logs[-1]["ire_mask_overlap"] < 1


def test_nothing_is_logged_when_ire_is_off(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path)
    assert not any(key.startswith("ire_") for entry in trainer.state.log_history for key in entry)


def test_says_what_it_is_going_to_do(tmp_path, caplog):
    caplog.set_level("INFO", "hf_gr")
    run(toys.vit(), toys.images(), tmp_path, **IRE_FLAGS)
    assert "IRE: kappa = 2.0, gamma = 0.6, mask 'flat' every 2 steps from step 1 of 6" in caplog.text


# ---- The guard ----


class Diverges(GRTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (100 if self.state.global_step == 4 else 1)


@pytest.mark.parametrize("gr", [{"gr_lambda": 0}, {"gr_warmup": "none"}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_kappa_is_halved_when_the_loss_diverges(accumulation, gr, tmp_path, caplog):
    settings = {**IRE_FLAGS, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-4, **gr}
    if "gr_lambda" not in gr:
        del settings["gr_lambda"]
    trainer = run(toys.vit(), toys.images(), tmp_path, cls=Diverges, **settings)
    kappas = [e["ire_kappa"] for e in trainer.state.log_history if "loss" in e]
    assert kappas == [0, 2, 2, 2, 1, 1]
    assert caplog.text.count("has diverged since IRE started. kappa is halved to 1.") == 1
    caplog.clear()
    trainer = run(toys.vit(), toys.images(), tmp_path, cls=Diverges, ire_guard=0, **settings)
    assert trainer.state.log_history[-2]["ire_kappa"] == 2
    assert "diverged" not in caplog.text


# ---- Flags ----


@pytest.mark.parametrize(
    ("preset", "kappa", "gamma", "start"),
    [("llama", 4, 0.6, None), ("vit_imagenet", 2, 0.8, 1 / 3), ("vit_cifar", 20, 0.6, None), ("cnn", 1, 0.9, None)],
)
def test_presets(preset, kappa, gamma, start):
    args = GRArguments(ire_preset=preset)
    assert (args.ire_kappa, args.ire_gamma, args.ire_start_step) == (kappa, gamma, start)
    args = GRArguments(ire_preset=preset, ire_kappa=7.0, ire_start_step=5)
    assert (args.ire_kappa, args.ire_gamma, args.ire_start_step) == (7, gamma, 5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ire_kappa": -1}, "ire_kappa=-1: must be >= 0"),
        ({"ire_gamma": 1.5}, "ire_gamma=1.5: the fraction of flat coordinates"),
        ({"ire_interval": 0}, "ire_interval=0: must be a whole number of steps, at least 1"),
        ({"ire_start_step": 1.5}, "ire_start_step=1.5: give a whole number of steps, or a fraction"),
        ({"ire_probe_fraction": 0}, r"ire_probe_fraction=0: must be in \(0, 1\]"),
        ({"ire_guard": 0.5}, "ire_guard=0.5: must be more than 1"),
        ({"ire_mask": "sharp"}, "ire_mask='sharp': choose one of flat, inverted, random, uniform"),
        ({"ire_preset": "bert"}, "ire_preset='bert': choose one of llama, vit_imagenet, vit_cifar, cnn"),
        ({"ire_beta": 1}, "ire_beta=1: must be in"),
        ({"ire_scope": "x"}, "ire_scope='x': choose one of global, per_tensor"),
        ({"ire_kappa_schedule": "x"}, "ire_kappa_schedule='x': choose one of constant, lr"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        GRArguments(**flags)


def test_start_step():
    assert GRArguments().get_ire_start_step(7, 100) == 7
    assert GRArguments(ire_start_step=12).get_ire_start_step(7, 100) == 12
    assert GRArguments(ire_start_step=1 / 3).get_ire_start_step(7, 100) == 34
    assert GRArguments(ire_start_step=0).get_ire_start_step(7, 100) == 0


def test_starts_at_the_end_of_the_learning_rate_warmup(spy, tmp_path):
    run(
        toys.vit(), toys.images(), tmp_path, callbacks=[spy], warmup_steps=3, gr_lambda=0, ire_kappa=1.0, ire_interval=2
    )
    assert spy.steps == [3, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ire_gamma": 0.7, "ire_interval": 5}, "ire_gamma=0.7, ire_interval=5 have no effect with ire_kappa=0.0."),
        (
            {"ire_kappa": 1.0, "ire_mask": "uniform", "ire_gamma": 0.7},
            "ire_gamma=0.7 has no effect with ire_mask='uniform'",
        ),
        ({"ire_kappa": 1.0, "ire_mask": "random", "ire_probe_fraction": 0.5}, "ire_probe_fraction=0.5 has no effect"),
        (
            {"ire_kappa": 1.0, "warmup_steps": 6},
            "IRE starts after 6 steps, at or after the end of the run of 6, and never",
        ),
        ({"ire_kappa": 1.0, "ire_amplify_weight_decay": False}, "ire_amplify_weight_decay=False has no effect with we"),
        (
            {"ire_kappa": 1.0, "ire_kappa_schedule": "lr", "lr_scheduler_type": "constant"},
            "ire_kappa_schedule='lr' has no effect with lr_scheduler_type='constant'",
        ),
    ],
)
def test_warns_of_a_flag_without_effect(flags, message, tmp_path, caplog):
    run(toys.vit(), toys.images(), tmp_path, gr_lambda=0, **flags)
    assert message in caplog.text


def test_refuses_a_start_after_the_end(tmp_path):
    with pytest.raises(
        ValueError, match="ire_start_step=6: IRE starts after 6 steps, at or after the end of the run of 6"
    ):
        run(toys.vit(), toys.images(), tmp_path, **{**IRE_FLAGS, "ire_start_step": 6})


# ---- Heads ----


def t5():
    set_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=20, **sizes, decoder_start_token_id=0))


def bert(cls, **settings):
    def create():
        set_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        return cls(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes, **settings))

    return create


def examples(shape, labels):
    """Six of them, with tokens of this shape."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 20, (6, *shape), generator=draw)
    return [{"input_ids": row, "labels": torch.tensor(labels)} for row in ids]


HEADS = {  # a model, examples, and how many labels of the six are drawn
    "masked_lm": (bert(BertForMaskedLM), examples((4,), [-100, 7, -100, 3]), 12),
    "token_classification": (bert(BertForTokenClassification), examples((4,), [-100, 0, 1, 1]), 18),
    "multiple_choice": (bert(BertForMultipleChoice), examples((3, 4), 2), 6),
    "multi_label": (
        bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        examples((4,), [1.0, 0.0, 1.0]),
        18,
    ),
    "regression": (bert(BertForSequenceClassification, num_labels=1), examples((4,), 0.5), 6),
    "seq2seq": (t5, examples((4,), [5, 9, 1, -100, -100]), 18),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_is_trained_and_its_coordinates_are_chosen(name, tmp_path):
    create, data, count = HEADS[name]
    drawn = []

    class Counts(GRTrainer):
        def ire_sampled_losses(self, model, inputs, generator):
            losses = super().ire_sampled_losses(model, inputs, generator)
            drawn.append(losses.count_nonzero())
            return losses

    flags = {"gr_lambda": 0, "ire_interval": 1, "max_steps": 1, "per_device_train_batch_size": 6}
    without = run(create(), data, tmp_path, **flags)
    trainer = run(create(), data, tmp_path, cls=Counts, ire_kappa=2.0, ire_start_step=0, **flags)
    assert drawn == [count]
    changed = [
        (trainer.ire_optimizer._masks[p].bool(), p, q)
        for p, q in zip(trainer.model.parameters(), without.model.parameters(), strict=True)
    ]
    amplified = sum(mask.sum() for mask, *_ in changed) / sum(mask.numel() for mask, *_ in changed)
    assert 0.59 < amplified < 0.65
    assert any(not torch.equal(p[mask], q[mask]) for mask, p, q in changed)
    assert all(torch.equal(p[~mask], q[~mask]) for mask, p, q in changed)
    assert trainer.state.log_history[0]["ire_flat_fraction"] == pytest.approx(amplified.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_decoder_reads_the_original_labels_and_predicts_the_drawn_ones(smoothing, spy, tmp_path):
    """Also with label smoothing, for which the batch has the inputs of the decoder."""
    data = HEADS["seq2seq"][1]
    decoder_inputs = torch.tensor([[0, 5, 9, 1, 0]])  # the labels, shifted; -100 is padding
    if smoothing:
        data = [{**example, "decoder_input_ids": decoder_inputs[0]} for example in data]
    flags = {**IRE_FLAGS, "ire_start_step": 0, "max_steps": 1, "per_device_train_batch_size": 6, "seed": 5}
    trainer = run(t5(), data, tmp_path, callbacks=[spy], label_smoothing_factor=smoothing, **flags)
    model = t5()
    inputs = {key: torch.stack([example[key] for example in data]) for key in ("input_ids", "labels")}

    class Shifted(nn.Module):  # for the reference, which knows only input_ids
        def __init__(self):
            super().__init__()
            self.t5 = model

        def forward(self, input_ids):
            logits = model(input_ids, decoder_input_ids=decoder_inputs.expand(6, -1)).logits
            return SimpleNamespace(logits=logits.flatten(0, 1))

    batch = {"input_ids": inputs["input_ids"], "labels": inputs["labels"].flatten()}
    expected = sampled_label_gradient(Shifted(), [[batch]], 5, 0)
    ((_, grads, _),) = spy.updates
    for p, reference in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(grads[p], reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (bert(BertForQuestionAnswering), {}, "IRE .* supports .*masked.*, not BertForQuestionAnswering"),
        (
            lambda: toys.vit().bfloat16(),
            {},
            "IRE cannot be used with trainable weights in bfloat16.*or set ire_kappa=0",
        ),
        (toys.vit, {"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw: it keeps an average of the weights"),
        (toys.vit, {"optim": "lomo"}, "optim=lomo: it updates the weights during the backward pass"),
    ],
)
def test_refused_at_construction(model, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GRTrainer(model=model(), args=GRConfig(**toys.arguments(tmp_path, gr_lambda=0, ire_kappa=1.0, **flags)))
    if "optim" not in flags:
        GRTrainer(model=model(), args=GRConfig(**toys.arguments(tmp_path, gr_lambda=0, **flags)))


def test_a_control_needs_no_distribution(tmp_path):
    flags = {"gr_lambda": 0, "ire_kappa": 1.0, "ire_mask": "uniform"}
    model = bert(BertForQuestionAnswering)()
    GRTrainer(model=model, args=GRConfig(**toys.arguments(tmp_path, **flags)))


def test_batches_without_labels_are_named(tmp_path):
    class OwnLoss(GRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).logits.square().mean()

    data = [{"input_ids": e["input_ids"]} for e in toys.text()]
    with pytest.raises(
        ValueError, match=r"ire_kappa=2.0: the batch has no labels, and IRE must know which positions count"
    ):
        run(toys.llama(), data, tmp_path, cls=OwnLoss, **IRE_FLAGS)
