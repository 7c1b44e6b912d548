"""The table of norms per layer: its values, its bound, and what a resumed run does with it."""

import pyarrow.parquet as pq
import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import toys
from hf_gr import GRTrainer
from hf_gr.trainer.layer_statistics import KINDS, LayerStatisticsCallback


def train(folder, resume=None, callback=None, **flags):
    flags = {"gr_lambda": 0, "optim": "lars", "lr_scheduler_type": "constant", "layer_statistics_steps": 1, **flags}
    trainer = toys.trainer(folder, callbacks=[callback] if callback else None, **flags)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def read(folder) -> dict[tuple[int, str, str], float]:
    table = pq.read_table(folder / "layer_statistics.parquet")
    assert table.column_names == ["step", "layer", "kind", "value"]
    rows = table.to_pylist()
    values = {(r["step"], r["layer"], r["kind"]): r["value"] for r in rows}
    assert len(values) == len(rows)
    return values


def test_values_are_the_norms_at_each_step(tmp_path):
    """Every layer by its name and nothing else; the gradient as the optimizer is given it, here after clipping."""
    seen = {}

    class Spy(GRTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: self.look())
            return optimizer

        def look(self):
            for name, p in self.model.named_parameters():
                if p.ndim > 1:
                    seen[self.state.global_step + 1, name] = (p.norm().item(), p.grad.norm().item())

    flags = {"gr_lambda": 0, "optim": "lars", "layer_statistics_steps": 2, "max_grad_norm": 0.1, "max_steps": 5}
    trainer = toys.trainer(tmp_path, cls=Spy, **flags)
    trainer.train()
    values = read(tmp_path)
    assert {step for step, *_ in values} == {1, 3, 5}
    layers = {name for name, p in trainer.model.named_parameters() if p.ndim > 1}
    assert {layer for _, layer, _ in values} == layers
    for (step, layer), (weight, gradient) in seen.items():
        if step in (1, 3, 5):
            assert values[step, layer, "weight_norm"] == pytest.approx(weight, rel=1e-6)
            assert values[step, layer, "gradient_norm"] == pytest.approx(gradient, rel=1e-6)
            assert values[step, layer, "trust_ratio"] == pytest.approx(weight / gradient, rel=1e-5)
    assert (tmp_path / "layer_statistics.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_is_what_the_step_used(tmp_path):
    """Without momentum and decay a layer moves by rate times g, in a learning rate and a phi that change."""
    moved, before = {}, {}

    class Spy(GRTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: before.update(self.layers()))
            optimizer.register_step_post_hook(lambda *_: self.compare())
            return optimizer

        def layers(self):
            return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.ndim > 1}

        def compare(self):
            for name, p in self.layers().items():
                gradient = self.model.get_parameter(name).grad
                moved[self.state.global_step + 1, name] = ((p - before[name]).norm() / gradient.norm()).item()

    flags = {"gr_lambda": 0, "optim": "tvlars", "optim_args": "momentum=0,tv_lambda=5,delay_steps=0.5"}
    flags |= {"lr_scheduler_type": "linear", "weight_decay": 0.0, "learning_rate": 2.0, "ire_kappa": 0.0}
    toys.trainer(tmp_path, cls=Spy, layer_statistics_steps=1, max_steps=4, **flags).train()
    values = read(tmp_path)
    assert {step for step, _ in moved} == {1, 2, 3, 4}
    for (step, layer), distance in moved.items():
        assert values[step, layer, "rate"] == pytest.approx(distance, rel=1e-3)
    first, last = (values[step, next(iter(before)), "rate"] for step in (1, 4))
    assert last < first / 2


@pytest.mark.parametrize(("optim", "has_rates"), [("lamb", True), ("sgd", False)])
def test_only_optimizers_with_trust_ratios_have_rates(optim, has_rates, tmp_path):
    toys.trainer(tmp_path, gr_lambda=0, optim=optim, layer_statistics_steps=1, max_steps=1).train()
    rates = [value for (_, _, kind), value in read(tmp_path).items() if kind == "rate"]
    assert all((rate is not None) == has_rates for rate in rates)


def test_the_run_is_the_same_without_it(tmp_path):
    with_it = toys.weights(train(tmp_path / "a").model)
    assert torch.equal(toys.weights(train(tmp_path / "b", layer_statistics_steps=0).model), with_it)
    assert not (tmp_path / "b" / "layer_statistics.parquet").exists()


def test_frozen_and_unused_layers(tmp_path):
    model = toys.vit()
    model.vit.embeddings.patch_embeddings.requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)
    toys.trainer(tmp_path, model, gr_lambda=0, layer_statistics_steps=1, max_steps=1).train()
    values = read(tmp_path)
    assert not any("patch_embeddings" in layer for _, layer, _ in values)
    assert values[1, "unused.weight", "gradient_norm"] == 0
    assert values[1, "unused.weight", "trust_ratio"] is None


def test_the_table_is_bounded(tmp_path):
    """Every other entry goes when it is full; what is left is evenly spaced and begins with the first step."""
    layers = sum(p.ndim > 1 for p in toys.vit().parameters())
    callback = LayerStatisticsCallback(1, max_rows=5 * len(KINDS) * layers)
    train(tmp_path, callback=callback, layer_statistics_steps=0, max_steps=14)
    steps = sorted({step for step, *_ in read(tmp_path)})
    assert steps == [1, 5, 9, 13]
    assert callback.every == 4


def test_a_resumed_run_goes_on_with_it(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, **save)
    whole = read(tmp_path)
    train(tmp_path, resume=str(tmp_path / "checkpoint-3"), **save)
    assert read(tmp_path) == whole


def test_a_table_of_another_model_is_left_behind(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=3)
    toys.trainer(tmp_path, toys.swin(), toys.images(size=16), gr_lambda=0, layer_statistics_steps=1).train()
    assert {step for step, *_ in read(tmp_path)} == set(range(1, 7))


def test_any_trainer_can_have_it(tmp_path):
    args = TrainingArguments(**toys.arguments(tmp_path, max_steps=2))
    Trainer(toys.vit(), args, train_dataset=toys.images(), callbacks=[LayerStatisticsCallback(1)]).train()
    assert {step for step, *_ in read(tmp_path)} == {1, 2}


def test_fp16_gradients_are_unscaled(tmp_path):
    """Without clipping nobody has undone the scale yet when the callback looks."""

    class Scaler:
        def get_scale(self):
            return 1024.0

    class Optimizer:
        scaler = Scaler()

    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), 1024.0)
    for max_grad_norm, expected in ((0.0, 2.0), (1.0, 2048.0)):
        args = TrainingArguments(**toys.arguments(tmp_path, max_grad_norm=max_grad_norm))
        trainer = Trainer(toys.vit(), args)
        callback = LayerStatisticsCallback(1)
        callback.on_train_begin(args, trainer.state, trainer.control, model=model)
        callback.on_pre_optimizer_step(args, trainer.state, trainer.control, model=model, optimizer=Optimizer())
        table = callback.table()
        assert table["value"][table["kind"].index("gradient_norm")] == expected
