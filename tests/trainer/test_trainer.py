"""`GRTrainer` against an independent loop, against `Trainer` where they must be equal, and with Trainer's options."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn import functional as F
from transformers import (
    SchedulerType,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from helpers import toys
from helpers.reference import flat_gradient
from helpers.reference import train as reference_train
from helpers.training import Normalized, relative_error_of_path, run, sum_of_token_losses
from hf_gr import GRArguments, GRConfig, GRMixin, GRTrainer
from hf_gr.cli import search_spaces


def llama_windows(data, accumulation, steps, batch=2, label_smoothing=0.0):
    """Loss of each optimizer step: the mean over all its label tokens, however the micro-batches share them."""
    size = batch * accumulation
    windows = [data[k * size : (k + 1) * size] for k in range(steps)]

    def loss(window):
        count = sum(int((e["labels"][1:] != -100).sum()) for e in window)
        return lambda model: sum_of_token_losses(model, window, label_smoothing) / count

    return [loss(window) for window in windows]


def vit_windows(data, accumulation, steps, batch=2):
    size = batch * accumulation

    def loss(window):
        pixels, labels = torch.stack([e["pixel_values"] for e in window]), torch.tensor([e["labels"] for e in window])
        # Trainer gives a model with **kwargs the number of items and leaves the division to it; the loss of image
        # classification ignores that number, so the gradients of the micro-batch means add up.
        return lambda model: accumulation * F.cross_entropy(model(pixel_values=pixels).logits, labels)

    return [loss(data[k * size : (k + 1) * size]) for k in range(steps)]


MODELS = {"llama": (toys.llama, toys.text, llama_windows), "vit": (toys.vit, toys.images, vit_windows)}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("degree", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("strategy", ["none", "r", "lambda", "zero"])
@pytest.mark.parametrize("name", MODELS)
def test_path_equals_the_reference(name, strategy, degree, accumulation, recorder, tmp_path):
    create, examples, windows = MODELS[name]
    r, steps = 0.1, 6
    data = examples(count=2 * accumulation * steps)
    clip = 0.5  # below every gradient norm of these runs, so that clipping acts in each step
    expected = reference_train(
        create(),
        windows(data, accumulation, steps),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        strategy=strategy,
        warmup_steps=3,
        r=r,
        lambda_=degree * r,
        max_grad_norm=clip,
    )
    trainer = run(
        create(),
        data,
        tmp_path,
        callbacks=[recorder],
        optim="sgd",
        optim_args="momentum=0.9",
        lr_scheduler_type="constant",
        learning_rate=0.1,
        max_steps=steps,
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulation,
        gr_r=r,
        gr_lambda=degree * r,
        gr_warmup=strategy,
        gr_warmup_steps=None if strategy == "none" else 3,
    )
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == steps and min(logged) > clip
    # float32: the two sum in a different order; 1e-5 is 80 roundings, and an error of the method is above 1e-3.
    assert relative_error_of_path(recorder.path, expected) <= 1e-5


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "rmsprop", "sgd", "adagrad", "adafactor"])
def test_any_optimizer_steps_with_the_regularized_gradient(optim, recorder, tmp_path):
    # In float64, since Adam divides by the size of the gradient and would magnify float32 noise.
    data, steps = toys.text(12), 3
    settings = {"optim": optim, "lr_scheduler_type": "cosine", "max_steps": steps, "max_grad_norm": 0.0}
    trainer = run(
        toys.llama().double(), data, tmp_path, callbacks=[recorder], gr_warmup="none", gr_lambda=0.05, **settings
    )
    scheduled = []

    def make_optimizer(params):
        plain = Trainer(toys.llama().double(), TrainingArguments(**toys.arguments(tmp_path, **settings)))
        plain.model = nn.ParameterList(params)
        plain.create_optimizer_and_scheduler(steps)
        scheduled.append(plain.lr_scheduler)
        plain.optimizer.register_step_post_hook(lambda *_: plain.lr_scheduler.step())
        return plain.optimizer

    expected = reference_train(
        toys.llama().double(),
        llama_windows(data, 1, steps),
        make_optimizer,
        strategy="none",
        warmup_steps=1,
        r=0.1,
        lambda_=0.05,
        max_grad_norm=float("inf"),
    )
    assert len(trainer.state.log_history) > steps
    # RMSNorm casts to float32 inside Llama, so that is the precision here, too.
    assert relative_error_of_path(recorder.path, expected) <= 1e-4


@pytest.mark.parametrize("scheduler", SchedulerType)
def test_the_gr_warmup_follows_the_learning_rate_warmup_of_every_scheduler(scheduler, tmp_path):
    kwargs = {"cosine_with_min_lr": {"min_lr": 1e-4}, "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
              "warmup_stable_decay": {"num_decay_steps": 2}}.get(scheduler.value)  # fmt: skip
    trainer = run(toys.vit(), toys.images(), tmp_path, lr_scheduler_type=scheduler, lr_scheduler_kwargs=kwargs,
                  warmup_steps=0.4, eval_strategy="steps", eval_steps=3,
                  trainer_kwargs={"eval_dataset": toys.images(4)})  # fmt: skip
    degrees = [e["gr_lambda"] for e in trainer.state.log_history if "gr_lambda" in e]
    assert degrees == [0, 0, 0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("flags", [{"gr_lambda": 0}, {"gr_warmup_steps": 5}])
def test_off_and_before_the_warmup_is_bitwise_trainer(flags, accumulation, recorder, tmp_path):
    # With dropout, so that one random number too many or too few would show.
    common = {"gradient_accumulation_steps": accumulation, "warmup_steps": 2}
    plain = copy.deepcopy(recorder)
    run(toys.llama(0.3), toys.text(), tmp_path, cls=Trainer, config=TrainingArguments, callbacks=[plain], **common)
    run(toys.llama(0.3), toys.text(), tmp_path, callbacks=[recorder], **common, **flags)
    equal = [torch.equal(a, b) for a, b in zip(recorder.path, plain.path, strict=True)]
    assert equal == ([True] * 7 if flags == {"gr_lambda": 0} else [True] * 6 + [False])


def test_plain_training_arguments_get_the_defaults(tmp_path):
    with_config = run(toys.vit(), toys.images(), tmp_path, warmup_steps=2)
    plain_args = run(toys.vit(), toys.images(), tmp_path, config=TrainingArguments, warmup_steps=2)
    assert torch.equal(toys.weights(with_config.model), toys.weights(plain_args.model))
    assert [e["gr_lambda"] for e in plain_args.state.log_history if "gr_lambda" in e] == [0, 0, 0.1, 0.1, 0.1, 0.1]


def test_logged_values(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, max_steps=4, gr_warmup="r", gr_warmup_steps=4, gr_lambda=0.08)
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["gr_r"] for e in logs] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert [e["gr_lambda"] for e in logs] == pytest.approx([0.02, 0.04, 0.06, 0.08])

    # The first step by hand: loss and ||g1|| at theta, ||g2|| at the perturbed weights, grad_norm of the mix.
    loss_of = vit_windows(toys.images(2), 1, 1)[0]
    model = toys.vit()
    loss = loss_of(model)
    g1 = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    with torch.no_grad():
        nn.utils.vector_to_parameters(toys.weights(model) + 0.025 * g1 / g1.norm(), model.parameters())
    g2 = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(model), list(model.parameters()))])
    assert logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert logs[0]["gr_grad_norm"] == pytest.approx(g1.norm().item(), rel=1e-5)
    assert logs[0]["gr_perturbed_grad_norm"] == pytest.approx(g2.norm().item(), rel=1e-4)
    assert logs[0]["grad_norm"] == pytest.approx((0.2 * g1 + 0.8 * g2).norm().item(), rel=1e-5)


def test_nothing_is_logged_when_gr_is_off(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, gr_lambda=0)
    assert not any(key.startswith("gr_") for entry in trainer.state.log_history for key in entry)


def test_floating_point_operations_count_the_second_pass(tmp_path):
    plain = run(toys.vit(), toys.images(), tmp_path, gr_lambda=0).state.total_flos
    assert run(toys.vit(), toys.images(), tmp_path, gr_warmup_steps=2).state.total_flos == plain * (2 + 4 * 2) / 6


class Draws(nn.Module):
    """A model whose loss depends on every kind of random number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.drawn = []

    def forward(self, x, labels=None):
        import random

        noise = torch.rand(4)
        self.drawn.append((random.random(), np.random.rand(), noise.sum().item()))
        return {"loss": ((self.weight * noise).sum() * (1 + sum(self.drawn[-1])) - x.sum()) ** 2}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_passes_draw_the_same_random_numbers_and_leave_the_stream_as_one_would(accumulation, tmp_path):
    data = [{"x": torch.ones(1)} for _ in range(8)]
    drawn = {}
    for degree in (0.0, 0.05):
        set_seed(1)
        model = Draws()
        run(model, data, tmp_path, max_steps=2, gradient_accumulation_steps=accumulation, gr_lambda=degree,
            gr_warmup="none", learning_rate=0.0)  # fmt: skip
        drawn[degree] = model.drawn
    windows = [drawn[0.0][k : k + accumulation] for k in range(0, 2 * accumulation, accumulation)]
    assert len(set(drawn[0.0])) == 2 * accumulation
    assert drawn[0.05] == [pair for window in windows for pair in window + window]


def test_batch_norm_statistics_are_updated_once(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "labels": i % 2} for i in range(12)]
    buffers = {}
    for degree in (0.0, 0.1):
        set_seed(0)
        # With a learning rate of 0 the weights stay, and so the statistics of the two runs must be equal bit for bit.
        trainer = run(Normalized(), data, tmp_path, per_device_train_batch_size=4, max_steps=3, learning_rate=0.0,
                      gr_lambda=degree, gr_warmup="none")  # fmt: skip
        buffers[degree] = list(trainer.model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(buffers[0.0], buffers[0.1], strict=True))
    assert buffers[0.1][2] == 3


class FailsInSecondPass(GRTrainer):
    error: BaseException | None = None
    at_step = 2

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.gr_second_pass and self.error is not None and self.state.global_step == self.at_step:
            raise self.error
        return loss


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("scope", ["global", "micro"])
def test_an_error_in_the_second_pass_leaves_the_weights_as_before_the_step(error, scope, recorder, tmp_path):
    flags = {"gr_warmup": "none", "gr_scope": scope, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    run(toys.llama(0.1), toys.text(), tmp_path, callbacks=[recorder], **flags)
    trainer = FailsInSecondPass(
        model=toys.llama(0.1), args=GRConfig(**toys.arguments(tmp_path, **flags)), train_dataset=toys.text()
    )
    trainer.error = error
    with pytest.raises(type(error)):
        trainer.train()
    assert torch.equal(toys.weights(trainer.model), recorder.path[2])
    # Training goes on: a fresh call of train() takes every step again, from the weights as they are.
    trainer.error = None
    before = toys.weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 6 and not torch.equal(toys.weights(trainer.model), before)


def test_an_interrupted_restore_is_repeated(monkeypatch, recorder, tmp_path):
    from hf_gr.optim.gradient_regularization import Perturbation

    run(toys.vit(), toys.images(), tmp_path, callbacks=[recorder], gr_warmup="none")
    original, calls = Perturbation.restore, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Perturbation, "restore", interrupted)
    trainer = toys.trainer(tmp_path, gr_warmup="none")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(toys.weights(trainer.model), recorder.path[0])


def test_a_zero_gradient_has_nowhere_to_go(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            assert torch.equal(self.weight, torch.ones(3))
            return {"loss": (self.weight * 0).sum() + x.sum()}

    trainer = run(Flat(), [{"x": torch.ones(1)}] * 4, tmp_path, max_steps=2, gr_warmup="none")
    segment = trainer.recorder.segment
    assert (segment.steps, segment.passes, segment.regularized_steps) == (2, 4, 0)
    logs = trainer.state.log_history[0]
    assert logs["gr_grad_norm"] == logs["gr_perturbed_grad_norm"] == 0 and "gr_linearity" not in logs


@pytest.mark.parametrize("degree", [0.1, 0.08])
def test_a_gradient_that_is_not_finite_is_seen_and_changes_nothing(degree, tmp_path):
    class Overflows(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss if self.gr_second_pass else loss * float("inf")

    flags = {"max_steps": 1, "gr_warmup": "none", "gr_on_nonfinite": "skip", "gr_lambda": degree}
    trainer = run(toys.vit(), toys.images(), tmp_path, cls=Overflows, **flags)
    (entry,) = [e for e in trainer.state.log_history if "gr_grad_norm" in e]
    assert not np.isfinite(entry["gr_grad_norm"])
    assert torch.equal(toys.weights(trainer.model), toys.weights(toys.vit()))
    segment = trainer.recorder.segment
    assert (segment.regularized_steps, segment.skipped_steps) == (0, 1)


# ---- The Trainer's own options ----


def test_compute_loss_func_sees_the_same_items_in_both_passes(tmp_path):
    seen = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        seen.append(int(num_items_in_batch))
        logits = outputs["logits"][:, :-1]
        return F.cross_entropy(logits.reshape(-1, 50), labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch

    run(toys.llama(), toys.text(), tmp_path, max_steps=2, gradient_accumulation_steps=2, gr_warmup="none",
        trainer_kwargs={"compute_loss_func": loss_func})  # fmt: skip
    windows = [seen[0:2], seen[2:4], seen[4:6], seen[6:8]]
    assert len(seen) == 8 and windows[0] == windows[1] and windows[2] == windows[3] and windows[0] != windows[2]


def test_label_smoothing_equals_the_reference(recorder, tmp_path):
    data = toys.text(12)
    expected = reference_train(
        toys.llama(),
        llama_windows(data, 2, 3, label_smoothing=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1),
        strategy="none",
        warmup_steps=1,
        r=0.1,
        lambda_=0.05,
        max_grad_norm=1e9,
    )
    run(toys.llama(), data, tmp_path, callbacks=[recorder], label_smoothing_factor=0.1, gr_warmup="none",
        gr_lambda=0.05, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=3, max_grad_norm=0.0,
        gradient_accumulation_steps=2)  # fmt: skip
    assert relative_error_of_path(recorder.path, expected) <= 1e-5


def test_frozen_parameters_neither_move_nor_count(tmp_path):
    model = toys.llama()
    for p in model.model.embed_tokens.parameters():
        p.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.detach().clone()
    trainer = run(model, toys.text(), tmp_path, gr_warmup="none", max_steps=1)
    assert torch.equal(trainer.model.model.embed_tokens.weight, frozen)

    model = toys.llama()
    trainable = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    g1 = torch.autograd.grad(llama_windows(toys.text(2), 1, 1)[0](model), trainable)
    norm = torch.cat([g.reshape(-1) for g in g1]).norm().item()
    assert trainer.state.log_history[0]["gr_grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_tied_weights_are_perturbed_once(tmp_path):
    trainer = run(toys.llama(tie_word_embeddings=True), toys.text(), tmp_path, max_steps=1, gr_warmup="none")
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    (entry,) = [e for e in trainer.state.log_history if "gr_perturbed_grad_norm" in e]

    model, loss_of = toys.llama(tie_word_embeddings=True), llama_windows(toys.text(2), 1, 1)[0]
    g1 = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(model), list(model.parameters()))])
    assert entry["gr_grad_norm"] == pytest.approx(g1.norm().item(), rel=1e-5)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain = run(toys.llama(0.2), toys.text(), tmp_path, gr_warmup="none")
    # transformers before 5.20 or so calls it gradient_checkpointing.
    flag = "activation_checkpointing" if hasattr(GRConfig, "activation_checkpointing") else "gradient_checkpointing"
    checkpointed = run(toys.llama(0.2), toys.text(), tmp_path, gr_warmup="none", **{flag: True})
    assert checkpointed.model.model.layers[0].gradient_checkpointing
    assert torch.equal(toys.weights(plain.model), toys.weights(checkpointed.model))


NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_torch_compile(backend, tmp_path):
    plain = run(toys.llama(), toys.text(), tmp_path, gr_warmup="none", max_steps=3)
    compiled = run(toys.llama(), toys.text(), tmp_path, gr_warmup="none", max_steps=3, torch_compile=True,
                   torch_compile_backend=backend)  # fmt: skip
    # Adam divides by the size of the gradient, which magnifies the rounding of the smallest ones.
    torch.testing.assert_close(toys.weights(compiled.model), toys.weights(plain.model), rtol=1e-3, atol=1e-4)
    # Compiled dropout draws the same mask in both passes: at a tiny radius g2 is g1.
    dropped = run(toys.llama(0.3), toys.text(), tmp_path, gr_warmup="none", gr_r=1e-4, max_steps=1, torch_compile=True,
                  torch_compile_backend=backend)  # fmt: skip
    first = dropped.state.log_history[0]
    assert first["gr_perturbed_grad_norm"] == pytest.approx(first["gr_grad_norm"], rel=1e-3)


def test_lora_moves_the_adapter_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    model = get_peft_model(toys.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    before: dict[str, torch.Tensor] = {}
    distances = []

    class Watched(GRTrainer):
        def compute_loss(self, model, *args, **kwargs):
            now = {n: p.detach().clone() for n, p in model.named_parameters()}
            if not self.gr_second_pass:
                before.update(now)
            else:
                moved = {n: (now[n] - before[n]).norm() for n in now if not torch.equal(now[n], before[n])}
                assert set(moved) <= set(adapter)
                distances.append(torch.stack([*moved.values()]).norm().item())
            return super().compute_loss(model, *args, **kwargs)

    run(model, toys.text(), tmp_path, cls=Watched, gr_warmup_steps=2, ire_kappa=2.0, ire_interval=2)
    assert distances == pytest.approx([0.1] * 4, rel=1e-3)  # the radius, in each of the steps after the warmup
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in base.items())
    assert all(not torch.equal(now[n], p) for n, p in adapter.items())


def test_neftune_noise_is_the_same_in_both_passes(tmp_path):
    norms = {}
    for r in (1e-4, 0.1):
        trainer = run(toys.llama(), toys.text(), tmp_path, neftune_noise_alpha=5.0, gr_warmup="none", gr_r=r)
        (norms[r], *_) = [
            abs(e["gr_perturbed_grad_norm"] / e["gr_grad_norm"] - 1)
            for e in trainer.state.log_history
            if "gr_grad_norm" in e
        ]
    assert norms[1e-4] < 1e-4 < 1e-3 < norms[0.1]


def test_unsized_iterable_dataset_with_a_window_that_leaks_into_the_next_epoch(recorder, tmp_path):
    # Three batches an epoch do not divide by two: Trainer carries the odd one over, and GR replays what it carried.
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from toys.images(6)

    class Counts(FailsInSecondPass):
        passes = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.passes.append((self.gr_second_pass, float(inputs["pixel_values"].sum())))
            return super().compute_loss(model, inputs, *args, **kwargs)

    run(toys.vit(), Stream(), tmp_path, cls=Counts, gradient_accumulation_steps=2, max_steps=4, gr_warmup="none")
    first = [value for second, value in Counts.passes if not second]
    second = [value for second, value in Counts.passes if second]
    assert first == second and len(first) > 8


def test_auto_find_batch_size_starts_over_cleanly(recorder, tmp_path):
    class OutOfMemoryOnce(FailsInSecondPass):
        at_step = 1

        def compute_loss(self, *args, **kwargs):
            try:
                return super().compute_loss(*args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                self.error = None
                raise

    trainer = OutOfMemoryOnce(
        model=toys.vit(),
        args=GRConfig(**toys.arguments(tmp_path, auto_find_batch_size=True, gr_warmup="none", max_steps=3)),
        train_dataset=toys.images(),
    )
    trainer.error = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    trainer.train()
    assert trainer._train_batch_size == 1 and trainer.state.global_step == 3


def test_load_best_model_at_end_loads_every_weight(tmp_path):
    class Worsens(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step > 2:
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(torch.randn_like(p))

    trainer = run(
        toys.vit(),
        toys.images(),
        tmp_path,
        callbacks=[Worsens()],
        trainer_kwargs={"eval_dataset": toys.images()},
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        gr_warmup="none",
    )
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert torch.equal(toys.weights(trainer.model), toys.weights(best))


def test_seq2seq_trainer_through_the_mixin(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Config(GRArguments, Seq2SeqTrainingArguments):
        pass

    class GRSeq2SeqTrainer(GRMixin, Seq2SeqTrainer):
        pass

    set_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    trainer = run(model, toys.text(), tmp_path, cls=GRSeq2SeqTrainer, config=Config, predict_with_generate=True,
                  gr_warmup="none", trainer_kwargs={"eval_dataset": toys.text(4)})  # fmt: skip
    assert np.isfinite(trainer.evaluate(max_length=5)["eval_loss"])
    assert trainer.state.log_history[0]["gr_lambda"] == 0.1


def test_hyperparameter_search_with_optuna(tmp_path):
    pytest.importorskip("optuna")
    trainer = GRTrainer(
        model_init=lambda trial: toys.vit(),
        args=GRConfig(**toys.arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, gr_warmup="none")),
        train_dataset=toys.images(),
        eval_dataset=toys.images(),
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"gr_r": trial.suggest_categorical("gr_r", [1e-3, 5.0])},
        n_trials=4,
        backend="optuna",
    )
    assert best.hyperparameters.keys() == {"gr_r"}
    assert trainer.state.log_history[0]["gr_r"] in (1e-3, 5.0)


def test_search_spaces_set_the_flags_and_trials_are_pruned(tmp_path):
    optuna = pytest.importorskip("optuna")
    seen, storage = [], f"sqlite:///{tmp_path}/sweep.db"

    class Watched(GRTrainer):
        def create_scheduler(self, *args, **kwargs):
            flags = ("gr_r", "gr_lambda", "gr_warmup_steps", "ire_kappa", "ire_gamma")
            seen.append({flag: getattr(self.args, flag) for flag in flags})
            return super().create_scheduler(*args, **kwargs)

    class AllButTheFirst(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number > 0

    trainer = Watched(
        model_init=lambda trial: toys.vit(),
        args=GRConfig(**toys.arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1)),
        train_dataset=toys.images(),
        eval_dataset=toys.images(),
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {**search_spaces.gr(trial), **search_spaces.ire(trial)},
        backend="optuna",
        n_trials=3,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=AllButTheFirst(),
        storage=storage,
        study_name="gr",
    )
    study = optuna.load_study(study_name="gr", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    for trial, flags in zip(study.trials, seen, strict=True):
        assert flags["gr_lambda"] == pytest.approx(trial.params["gr_r"] * trial.params["lambda_over_r"])
        assert all(flags[name] == trial.params[name] for name in set(flags) - {"gr_lambda"})


def test_hyperparameter_search_refuses_a_radius_that_makes_no_sense(tmp_path):
    pytest.importorskip("optuna")
    trainer = GRTrainer(
        model_init=lambda trial: toys.vit(),
        args=GRConfig(**toys.arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)),
        train_dataset=toys.images(),
        eval_dataset=toys.images(),
    )
    with pytest.raises(ValueError, match=r"gr_r=-0\.1: the radius must be > 0"):
        trainer.hyperparameter_search(hp_space=lambda trial: {"gr_r": -0.1}, n_trials=1, backend="optuna")


def test_trl_sft_trainer(tmp_path):
    """Also what a subclass with its own `compute_loss` and metrics needs: its window is replayed, not a Trainer's."""
    trl = pytest.importorskip("trl")
    from dataclasses import dataclass

    from datasets import Dataset

    @dataclass
    class Config(GRArguments, trl.SFTConfig):
        pass

    class GRSFTTrainer(GRMixin, trl.SFTTrainer):
        pass

    data = Dataset.from_list([{k: v.tolist() for k, v in example.items()} for example in toys.text()])

    if hasattr(trl.SFTConfig, "activation_checkpointing"):
        settings = {"bf16": False, "activation_checkpointing": False}
    else:
        settings = {"bf16": False, "gradient_checkpointing": False}

    def train(name, cls, config, **flags):
        args = config(**toys.arguments(tmp_path / name, gradient_accumulation_steps=2, **settings, **flags))
        trainer = cls(
            model=toys.llama(), args=args, train_dataset=data, processing_class=word_tokenizer(), data_collator=pad
        )
        trainer.train()
        return trainer

    def pad(examples):
        batch = {key: torch.tensor([e[key] for e in examples]) for key in ("input_ids", "labels")}
        return {**batch, "attention_mask": torch.ones_like(batch["labels"])}

    plain = train("plain", trl.SFTTrainer, trl.SFTConfig)
    off = train("off", GRSFTTrainer, Config, gr_lambda=0)
    assert torch.equal(toys.weights(off.model), toys.weights(plain.model))
    regularized = train("gr", GRSFTTrainer, Config, gr_warmup="none", gr_r=0.05)
    assert not torch.equal(toys.weights(regularized.model), toys.weights(plain.model))
    assert [e["gr_r"] for e in regularized.state.log_history if "gr_r" in e] == [0.05] * 6
    amplified = train("ire", GRSFTTrainer, Config, gr_lambda=0, ire_kappa=2.0, ire_interval=2)
    assert [e["ire_kappa"] for e in amplified.state.log_history if "ire_kappa" in e] == [2.0] * 6
    assert amplified.ire_optimizer.updates == 3


def word_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"word{i}": i for i in range(1, toys.VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="word1")


# ---- Mixed precision ----


def test_bf16_autocast_follows_float32(tmp_path):
    paths = {}
    for name, flags in {"bf16": {"bf16": True}, "float32": {}, "plain": {"gr_lambda": 0}}.items():
        recorder = toys.PathRecorder()
        run(toys.llama(), toys.text(), tmp_path, callbacks=[recorder], gr_warmup="none", **flags)
        paths[name] = recorder.path
    assert paths["bf16"][-1].dtype == torch.float32
    # bf16 has 8 bits. Adam turns their rounding into 7 % of the way travelled; without GR it is another way.
    assert relative_error_of_path(paths["bf16"], paths["float32"]) < 0.1
    assert relative_error_of_path(paths["plain"], paths["float32"]) > 0.2


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("scope", ["global", "micro"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_perturbed_in_float32(dtype, scope, accumulation, tmp_path):
    """The gradient is that at theta + r g1/||g1|| in float32, and the perturbation has its full length."""
    r, kept, distances = 0.05, [], []

    class Watched(GRTrainer):
        def compute_loss(self, model, *args, **kwargs):
            if self.gr_second_pass:
                assert {p.dtype for p in model.parameters()} == {torch.float32}
                distances.append((toys.weights(model) - kept[0]).norm().item())
            else:
                assert {p.dtype for p in model.parameters()} == {dtype}
            return super().compute_loss(model, *args, **kwargs)

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            kept.append(toys.weights(model).float())

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert {p.grad.dtype for p in model.parameters()} == {dtype}
            kept.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).float())

    flags = {"max_steps": 1, "gr_warmup": "none", "gr_r": r, "gr_scope": scope, "gr_lambda": 0.04, "max_grad_norm": 0.0,
             "gradient_accumulation_steps": accumulation, "gr_half_precision_weights": True}  # fmt: skip
    model = toys.llama().to(dtype)
    storage = [p.data_ptr() for p in model.parameters()]
    run(model, toys.text(), tmp_path, cls=Watched, callbacks=[Keep()], **flags)
    assert [p.data_ptr() for p in model.parameters()] == storage and {p.dtype for p in model.parameters()} == {dtype}
    assert distances == pytest.approx([r] * accumulation, rel=1e-3)

    # g1 comes from a pass in half precision, g2 from one in float32 along g1.
    model = toys.llama().to(dtype)
    data = toys.text()[: 2 * accumulation]
    count = sum(int((e["labels"][1:] != -100).sum()) for e in data)
    parts = [data] if scope == "global" else [data[2 * k : 2 * k + 2] for k in range(accumulation)]
    expected = 0
    for part in parts:
        g1 = flat_gradient(
            model, sum(sum_of_token_losses(model, part[k : k + 2]) for k in range(0, len(part), 2)) / count
        )
        perturbed = copy.deepcopy(model).float()
        offset = r * g1.float() / g1.float().norm()
        torch.nn.utils.vector_to_parameters(toys.weights(perturbed) + offset, perturbed.parameters())
        g2 = flat_gradient(perturbed, sum_of_token_losses(perturbed, part) / count)
        expected = expected + 0.2 * g1.float() + 0.8 * g2
    # The first pass has the precision of its type, 2^-8 and 2^-11; so has the sum.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 3e-3
    assert (kept[1] - expected).norm() / expected.norm() < tolerance


def test_half_precision_flag_without_such_weights_is_named(tmp_path, caplog):
    create(tmp_path, gr_half_precision_weights=True)
    assert "gr_half_precision_weights: no effect" in caplog.text


@pytest.fixture
def accelerator_state():
    """What a trainer changes in the state that all accelerators share is undone."""
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("second", [False, True])
def test_gradient_scaler_skips_the_step_on_overflow_in_either_pass(second, recorder, accelerator_state, tmp_path):
    class Overflows(toys.ScaledTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            overflow = self.state.global_step == 1 and self.gr_second_pass == second
            return loss * float("inf") if overflow else loss

    run(toys.vit(), toys.images(), tmp_path, cls=GRTrainer, callbacks=[recorder], gr_warmup="none", optim="sgd")
    scaled = toys.PathRecorder()
    flags = {"gr_warmup": "none", "optim": "sgd", "max_steps": 3}
    trainer = run(toys.vit(), toys.images(), tmp_path, cls=Overflows, callbacks=[scaled], **flags)
    torch.testing.assert_close(scaled.path[1], recorder.path[1], rtol=1e-5, atol=1e-7)
    assert torch.equal(scaled.path[2], scaled.path[1]) and not torch.equal(scaled.path[3], scaled.path[2])
    assert trainer.accelerator.scaler.get_scale() == toys.ScaledTrainer.SCALE / 2


# ---- Refusals and warnings ----


def create(tmp_path, model=None, **kwargs):
    return toys.trainer(tmp_path, model or toys.vit(), **kwargs)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (lambda: toys.vit().bfloat16(), {}, "trainable weights in bfloat16"),
        (lambda: toys.vit().half(), {}, "trainable weights in float16.*or set gr_half_precision_weights"),
        (
            lambda: toys.vit().bfloat16(),
            {"bf16": True, "gr_half_precision_weights": True},
            "under gr_half_precision_weights with --bf16, --fp16 or several processes: the second pass could not",
        ),
        (toys.vit, {"optim": "lomo"}, "optim=lomo: it updates the weights during the backward pass"),
        (toys.vit, {"optim": "galore_adamw_layerwise"}, "optim=galore_adamw_layerwise"),
    ],
)
def test_refused_at_construction(model, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        create(tmp_path, model(), **flags)
    if "optim" not in flags:
        create(tmp_path, model(), gr_lambda=0, **flags)


def test_refuses_sparse_gradients(tmp_path):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 2, sparse=True)

    with pytest.raises(ValueError, match=r"sparse gradients \(embedding\). Build the embedding with sparse=False"):
        create(tmp_path, Sparse())


def deepspeed(trainer):
    trainer.is_deepspeed_enabled = True


def distributed(kind):
    def pretend(trainer):
        trainer.accelerator.state.distributed_type = kind

    return pretend


def fsdp(version=2, cpu_offload=None):
    def pretend(trainer):
        trainer.accelerator.state.distributed_type = DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=version, cpu_offload=cpu_offload)
        trainer.is_fsdp_enabled = True

    return pretend


def parallel(kind):
    def pretend(trainer):
        trainer.accelerator.state.parallelism_config = SimpleNamespace(
            **{"sp_enabled": False, "sp_backend": "", f"{kind}_enabled": True}
        )

    return pretend


def data_parallel(trainer):
    trainer.args._n_gpu = 2


def processes_apart(trainer):
    """As two processes with --ddp_backend gloo on CPUs, without --use_cpu."""
    state = {"num_processes": 2, "process_index": 0, "local_process_index": 0, "distributed_type": DistributedType.NO}
    trainer.args.distributed_state = SimpleNamespace(**state)


def fsdp_on_a_cpu(trainer):
    trainer.is_fsdp_enabled = True


@pytest.mark.parametrize(
    ("pretend", "flags", "message"),
    [
        (processes_apart, {"gr_lambda": 0}, "the 2 processes would each train alone.* Set use_cpu=True"),
        (deepspeed, {}, "DeepSpeed, at any ZeRO stage: .* Use DDP, or FSDP2 .*or set gr_lambda=0"),
        (deepspeed, {"optim": "lars"}, "optim=lars cannot be used with DeepSpeed: .* Use DDP or FSDP2"),
        (distributed(DistributedType.MEGATRON_LM), {}, "MEGATRON_LM: not tested. Use DDP"),
        (distributed(DistributedType.XLA), {}, "XLA: not tested. Use DDP"),
        (fsdp(), {"gr_scope": "local"}, "gr_scope='local' and FSDP: a process has no gradient .* Set gr_scope=global"),
        (fsdp(), {"gr_scope": "micro"}, "gr_scope='micro' and FSDP"),
        (fsdp(version=1), {}, "FSDP version 1: not tested. Set fsdp_version: 2"),
        (fsdp(cpu_offload=CPUOffloadPolicy()), {}, "FSDP's CPU offload: not tested"),
        (fsdp(version=1), {"gr_lambda": 0, "ire_kappa": 1.0}, "IRE cannot be used with FSDP version 1: not tested"),
        (fsdp(version=1), {"optim": "lars"}, "optim=lars cannot be used with FSDP version 1: not tested"),
        (fsdp(cpu_offload=CPUOffloadPolicy()), {"optim": "lamb"}, "optim=lamb cannot be used with FSDP's CPU offload"),
        (fsdp(), {"optim": "muon"}, "optim=muon cannot be used with FSDP: each process holds only a part"),
        (fsdp(), {"layer_statistics_steps": 1}, "layer_statistics_steps=1 cannot be used with FSDP or DeepSpeed"),
        (fsdp_on_a_cpu, {}, "FSDP here: accelerate shards on accelerators alone"),
        (parallel("tp"), {}, "tensor, context or sequence parallelism: the inputs of a step cannot be replayed"),
        (parallel("cp"), {}, "tensor, context or sequence parallelism"),
        (parallel("sp"), {}, "tensor, context or sequence parallelism"),
        (data_parallel, {}, r"nn\.DataParallel over 2 GPUs.*accelerate launch.*or set gr_lambda=0"),
    ],
)
def test_refuses_what_would_train_something_else(pretend, flags, message, accelerator_state, monkeypatch, tmp_path):
    original = GRTrainer.create_accelerator_and_postprocess

    def create_accelerator(self):
        original(self)
        pretend(self)

    monkeypatch.setattr(GRTrainer, "create_accelerator_and_postprocess", create_accelerator)
    with pytest.raises(ValueError, match=message):
        create(tmp_path, **flags)


def test_refuses_sagemaker(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gr.trainer.compatibility.is_sagemaker_mp_enabled", lambda: True)
    with pytest.raises(ValueError, match="SageMaker model parallelism: it runs forward and backward itself"):
        create(tmp_path)


@pytest.mark.parametrize("steps", [6, 10])
def test_refuses_a_warmup_as_long_as_the_run(steps, tmp_path):
    with pytest.raises(ValueError, match=f"gr_warmup_steps={steps} is {steps} steps, as long as the whole run of 6"):
        create(tmp_path, gr_warmup_steps=steps).train()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "gr_warmup='zero' has no effect, because the learning-rate warmup that it follows has no steps"),
        ({"gr_warmup_steps": 0}, "gr_warmup='zero' has no effect with gr_warmup_steps=0"),
        ({"gr_warmup_steps": 2, "gr_warmup": "none"}, "gr_warmup_steps=2 has no effect with gr_warmup='none'"),
        ({"gr_scope": "local"}, "gr_scope='local' is the same as 'global' here"),
        ({"gr_scope": "micro"}, "gr_scope='micro' is the same as 'global' here"),
        ({"warmup_steps": 9}, "as long as the whole run of 6 or longer: GR would never act. Set gr_warmup_steps"),
    ],
)
def test_warns_of_a_flag_without_effect(flags, message, tmp_path, caplog):
    create(tmp_path, **flags).train()
    assert message in caplog.text


def test_says_what_it_is_going_to_do(tmp_path, caplog):
    caplog.set_level("INFO", "hf_gr")
    create(tmp_path, warmup_steps=2, gr_lambda=0.08).train()
    assert "r = 0.1, lambda = 0.08, warmup 'zero' over 2 of 6 steps" in caplog.text
