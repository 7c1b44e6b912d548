"""TVLARS, LARS and LAMB in the trainer: by name and as classes, with GR, IRE, schedules, batches and checkpoints."""

import logging
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import toys
from helpers.reference import phi
from hf_gr import IRE, LAMB, LARS, TVLARS, GRConfig, GRTrainer
from hf_gr.cli.shipped import GRIDS
from hf_gr.reporting.grid_file import load_grid
from hf_gr.reporting.plots import plot_curves

PLAIN = {"gr_lambda": 0, "lr_scheduler_type": "constant", "learning_rate": 1.0}


def train(tmp_path, trainer_class=GRTrainer, model=None, data=None, optimizers=None, **flags):
    config = GRConfig if issubclass(trainer_class, GRTrainer) else TrainingArguments
    recorder = toys.PathRecorder()
    keywords = {"callbacks": [recorder], "train_dataset": data or toys.images()}
    if optimizers is not None:
        keywords.update(optimizers)
    trainer = trainer_class(model or toys.vit(), config(**toys.arguments(tmp_path, **flags)), **keywords)
    trainer.train()
    return trainer, torch.stack(recorder.path)


def groups(trainer) -> list[dict]:
    return trainer.optimizer.optimizer.param_groups


# ---- By name and by class ----

SETTINGS = {
    "lars": (LARS, {"momentum": 0.8}),
    "tvlars": (TVLARS, {"tv_lambda": 1.0, "delay_steps": 3, "gamma_min": 0.01}),
    "lamb": (LAMB, {"eps": 1e-3}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_by_name_and_by_class_are_the_same(name, tmp_path):
    """And both are what a plain Trainer does with the class."""
    cls, kwargs = SETTINGS[name]
    optim_args = ",".join(f"{key}={value}" for key, value in kwargs.items())
    by_name, path = train(tmp_path, optim=name, optim_args=optim_args, weight_decay=0.1, **PLAIN)
    assert type(by_name.optimizer.optimizer) is cls
    assert by_name.args.to_dict()["optim"] == name
    given = {"optimizer_cls_and_kwargs": (cls, {"lr": 1.0, **kwargs})}
    _, by_class = train(tmp_path, optimizers=given, weight_decay=0.1, **PLAIN)
    assert torch.equal(path, by_class)
    plain = {key: value for key, value in PLAIN.items() if not key.startswith("gr_")}
    _, in_plain_trainer = train(tmp_path, Trainer, optimizers=given, weight_decay=0.1, **plain)
    assert torch.equal(path, in_plain_trainer)


@pytest.mark.parametrize("name", SETTINGS)
def test_under_gr_and_ire(name, tmp_path):
    """GR changes the gradient and IRE the step of the same optimizer; with both off nothing is left of them."""
    cls, kwargs = SETTINGS[name]
    optim_args = ",".join(f"{key}={value}" for key, value in kwargs.items())
    common = {"optim": name, "optim_args": optim_args, **PLAIN, "gr_lambda": None, "gr_warmup": "none"}
    common["learning_rate"] = 0.05 if name == "lamb" else 1.0
    _, plain = train(tmp_path, **{**common, "gr_lambda": 0})
    trainer, with_gr = train(tmp_path, **common)
    assert not torch.equal(with_gr[1], plain[1])
    assert all(entry["gr_perturbed_grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    ire = {"ire_kappa": 1.0, "ire_mask": "uniform", "ire_start_step": 0}
    trainer, with_ire = train(tmp_path, **{**common, "gr_lambda": 0}, **ire)
    assert isinstance(trainer.optimizer.optimizer, IRE)
    assert type(trainer.ire_optimizer.base_optimizer) is cls
    # kappa = 1 on all coordinates: the first displacement is twice as long (float32)
    torch.testing.assert_close(with_ire[1] - plain[0], 2 * (plain[1] - plain[0]), rtol=1e-3, atol=1e-6)
    _, with_both = train(tmp_path, **common, ire_kappa=1.0, ire_start_step=0)
    assert with_both.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_schedules_of_transformers_reach_them(schedule, tmp_path):
    trainer, _ = train(tmp_path, optim="lars", **{**PLAIN, "lr_scheduler_type": schedule}, warmup_steps=3)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[:3] == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert rates[3] == pytest.approx(1.0)


# ---- The batch ----


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 6 / 256), ("sqrt", math.sqrt(6 / 256))])
@pytest.mark.parametrize("optim", ["tvlars", "adamw_torch"])
def test_lr_scaling(scaling, factor, optim, tmp_path):
    """A batch of 2, accumulated 3 times, for a rate that is meant for 256."""
    flags = {**PLAIN, "learning_rate": 0.5, "gradient_accumulation_steps": 3, "max_steps": 2}
    trainer, _ = train(tmp_path, optim=optim, lr_scaling=scaling, **flags)
    rates = [group["lr"] for group in groups(trainer)] + [trainer.optimizer.optimizer.defaults["lr"]]
    assert rates == pytest.approx([0.5 * factor] * 3)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.5 * factor] * 2)
    trainer.train()  # the factor is not applied a second time
    assert [group["lr"] for group in groups(trainer)] == pytest.approx([0.5 * factor] * 2)


def test_lr_scaling_is_said_and_on_the_card(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_gr"):
        trainer, _ = train(tmp_path, optim="lars", lr_scaling="linear", **PLAIN)
    assert any("scaled by 0.0078125 (the total batch of 2 / 256)" in r.getMessage() for r in caplog.records)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Optimizer: `LARS` (see above)" in card and "| `trust_coefficient` | eta | 0.001 |" in card
    assert "with `learning_rate` times 0.0078125 (the total batch of 2 / 256)" in card
    assert "| `optim` | lars |" in card


def test_lr_scaling_follows_a_batch_that_is_found(tmp_path):
    """`auto_find_batch_size` halves the batch; the rate then is that of the smaller one."""

    class Short(GRTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    flags = {**PLAIN, "per_device_train_batch_size": 8, "auto_find_batch_size": True, "max_steps": 2}
    trainer, _ = train(tmp_path, Short, optim="tvlars", lr_scaling="linear", **flags)
    batch = trainer._train_batch_size
    assert batch < 8
    assert [group["lr"] for group in groups(trainer)] == pytest.approx([batch / 256] * 2)
    assert [group["gamma_min"] for group in groups(trainer)] == pytest.approx([1e-3] * 2)


@pytest.mark.parametrize(("optim", "optim_args"), [("adamw_torch", None), ("lars", "exclude_1d=False")])
def test_norms_and_biases_are_decayed_if_that_is_wanted(optim, optim_args, tmp_path, caplog):
    flags = {**PLAIN, "weight_decay": 0.1, "max_steps": 1, "optim_args": optim_args}
    for wanted in (False, True):
        trainer, _ = train(tmp_path, optim=optim, decay_norms_and_biases=wanted, **flags)
        decayed = {id(p) for group in groups(trainer) if group["weight_decay"] for p in group["params"]}
        expected = {id(p) for n, p in trainer.model.named_parameters() if wanted or not ("norm" in n or "bias" in n)}
        assert decayed == expected and len(expected) < len(list(trainer.model.parameters())) + wanted
    assert "no effect" not in caplog.text
    train(tmp_path, optim=optim, decay_norms_and_biases=True, **{**flags, "weight_decay": 0.0})
    assert "decay_norms_and_biases=True has no effect with weight_decay=0" in caplog.text


def test_decay_of_what_the_optimizer_excludes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"decay_norms_and_biases=True has no effect on LAMB, .*exclude_1d=False"):
        train(tmp_path, optim="lamb", decay_norms_and_biases=True, weight_decay=0.1, **PLAIN)


def test_decay_of_a_ready_made_optimizer_is_refused(tmp_path):
    model = toys.vit()
    given = {"optimizers": (torch.optim.SGD(model.parameters(), 1.0), None)}
    with pytest.raises(ValueError, match="decay_norms_and_biases=True has no effect on an optimizer that was given"):
        train(tmp_path, model=model, optimizers=given, decay_norms_and_biases=True, **PLAIN)


def test_lr_scaling_of_a_ready_made_optimizer_is_refused(tmp_path):
    model = toys.vit()
    with pytest.raises(ValueError, match="lr_scaling='linear' has no effect on an optimizer that was given"):
        train(
            tmp_path,
            model=model,
            optimizers={"optimizers": (LARS(model.parameters(), 1.0), None)},
            lr_scaling="linear",
            **PLAIN,
        )


# ---- TVLARS and the run ----


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("scaling", ["none", "linear", "sqrt"])
def test_the_batch_is_in_the_floor_once(scaling, outside, tmp_path):
    """Whatever scales the rate, it ends at 0.001 batch / 256 times that for 256 examples; with linear scaling, at a
    thousandth of its peak, as LARS and LAMB do under a cosine with min_lr_rate=0.001."""
    settings = {"lr_scheduler_type": "time_varying"} if outside else {"optim": "tvlars"}
    flags = {**PLAIN, "optim": "lars", **settings, "learning_rate": 0.5, "per_device_train_batch_size": 4}
    trainer, _ = train(tmp_path, lr_scaling=scaling, **flags)
    if outside:
        last = trainer.lr_scheduler.base_lrs[0] * trainer.lr_scheduler.lr_lambdas[0](10**9)
    else:
        (group, *_) = groups(trainer)
        last = group["lr"] * trainer.optimizer.optimizer.phi(group, 10**9)
    assert last == pytest.approx(0.5 * 1e-3 * 4 / 256)


@pytest.mark.parametrize("arm", ["LARS", "LARS with warmup", "LAMB", "TVLARS"])
def test_all_arms_of_the_shipped_grid_end_at_a_thousandth_of_their_peak(arm, tmp_path):
    grid = load_grid(GRIDS / "tvlars-batch.yaml", "paper")
    flags = {key: value for key, value in {**grid.flags, **grid.arms[arm]}.items() if key not in ("model", "stem")}
    trainer, _ = train(tmp_path, **{**flags, "max_steps": 2, "per_device_train_batch_size": 4})
    (group, *_) = groups(trainer)
    peak = grid.arms[arm]["learning_rate"] * 4 / 256
    last = group["lr"] * (trainer.optimizer.optimizer.phi(group, 10**9) if arm == "TVLARS" else 1)
    assert last == pytest.approx(1e-3 * peak)


def test_tvlars_learns_of_the_run(tmp_path):
    """A delay below 1 is a share of the run, tv_lambda then per run; the floor is 0.001 batch / 256."""
    trainer, _ = train(tmp_path, optim="tvlars", optim_args="tv_lambda=12,delay_steps=0.5", **PLAIN)
    for group in groups(trainer):
        assert (group["tv_lambda"], group["delay_steps"], group["step"]) == (2.0, 3.0, 6)
        assert group["gamma_min"] == pytest.approx(1e-3 * 2 / 256)
    trainer.train()  # a second run starts the schedule anew
    assert {(group["tv_lambda"], group["delay_steps"], group["step"]) for group in groups(trainer)} == {(2.0, 3.0, 6)}


def test_phi_is_logged_as_it_was_at_the_step(tmp_path):
    curve = {"tv_lambda": 1.0, "delay_steps": 3, "gamma_min": 0.01}
    optim_args = ",".join(f"{key}={value}" for key, value in curve.items())
    trainer, _ = train(tmp_path, optim="tvlars", optim_args=optim_args, **PLAIN)
    logged = [entry["tvlars_phi"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([phi(t, 1.0, 3, 1.0, 0.01) for t in range(1, 7)])
    plot_curves(trainer.state.log_history, tmp_path / "curves.png")
    trainer, _ = train(tmp_path, optim="lars", **PLAIN)
    assert not any("tvlars_phi" in entry for entry in trainer.state.log_history)


def test_tvlars_ready_made_learns_only_the_floor(tmp_path):
    model = toys.vit()
    optimizer = TVLARS(model.parameters(), 1.0, tv_lambda=0.5, delay_steps=4)
    train(tmp_path, model=model, optimizers={"optimizers": (optimizer, None)}, **PLAIN)
    (group,) = optimizer.param_groups
    assert (group["tv_lambda"], group["delay_steps"]) == (0.5, 4)
    assert group["gamma_min"] == pytest.approx(1e-3 * 2 / 256)


def test_tvlars_without_arguments_has_a_schedule_over_the_run(tmp_path):
    trainer, _ = train(tmp_path, optim="tvlars", **PLAIN)
    optimizer = trainer.optimizer.optimizer
    assert optimizer.phi(groups(trainer)[0], 3) == pytest.approx(0.5, abs=1e-4)
    assert optimizer.phi(groups(trainer)[0], 0) > 0.99


def test_another_schedule_on_top_of_tvlars_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_gr"):
        train(tmp_path, optim="tvlars", gr_lambda=0, max_steps=2)
    assert any(
        "lr_scheduler_type='linear' multiplies the learning rate of TVLARS" in r.getMessage() for r in caplog.records
    )


# ---- phi as a schedule ----


@pytest.mark.parametrize("optim", ["lars", "adamw_torch"])
def test_phi_as_a_schedule_of_any_optimizer(optim, tmp_path):
    kwargs = {"tv_lambda": 0.7, "delay_steps": 3, "alpha": 2.0, "gamma_min": 0.1}
    flags = {**PLAIN, "lr_scheduler_type": "time_varying", "lr_scheduler_kwargs": kwargs}
    trainer, _ = train(tmp_path, optim=optim, **flags)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([phi(t, *kwargs.values()) for t in range(1, 7)])
    assert trainer.args.to_dict()["lr_scheduler_type"] == "time_varying"


def test_phi_outside_and_inside_are_the_same_without_momentum(tmp_path):
    """With no buffer between them, lr phi_t in the schedule is phi_t q in TVLARS."""
    kwargs = {"tv_lambda": 1.0, "delay_steps": 3, "gamma_min": 0.01}
    inside = "momentum=0.0," + ",".join(f"{key}={value}" for key, value in kwargs.items())
    _, tvlars = train(tmp_path, optim="tvlars", optim_args=inside, **PLAIN)
    flags = {**PLAIN, "lr_scheduler_type": "time_varying", "lr_scheduler_kwargs": kwargs}
    _, lars = train(tmp_path, optim="lars", optim_args="momentum=0.0", **flags)
    torch.testing.assert_close(tvlars, lars, rtol=1e-5, atol=1e-7)  # float32, the factors in another order


def test_phi_without_arguments_is_that_of_the_run(tmp_path):
    trainer, _ = train(tmp_path, optim="lars", **{**PLAIN, "lr_scheduler_type": "time_varying"})
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([phi(t, 10 / 6, 3, 1.0, 1e-3 * 2 / 256) for t in range(1, 7)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_scheduler_kwargs": {"tv_lambda": 1.0}}, "lr_scheduler_kwargs: delay_steps is missing"),
        ({"lr_scheduler_kwargs": {"lambda": 1.0}}, "lr_scheduler_kwargs: lambda is unknown to 'time_varying'"),
        ({"lr_scheduler_kwargs": {"tv_lambda": -1.0, "delay_steps": 2}}, "tv_lambda=-1.0: must be > 0"),
    ],
)
def test_mistakes_in_the_schedule_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError) as error:
        train(tmp_path, **{**PLAIN, "lr_scheduler_type": "time_varying"}, **flags)
    assert message in str(error.value)


def test_phi_is_never_applied_twice(tmp_path):
    flags = {**PLAIN, "lr_scheduler_type": "time_varying"}
    with pytest.raises(ValueError, match="TVLARS has this schedule in itself and would apply it twice"):
        train(tmp_path, optim="tvlars", **flags)
    given = {"optimizer_cls_and_kwargs": (TVLARS, {"lr": 1.0, "tv_lambda": 1.0, "delay_steps": 2})}
    with pytest.raises(ValueError, match="TVLARS has this schedule in itself and would apply it twice"):
        train(tmp_path, optimizers=given, **flags)


def test_a_warmup_that_phi_does_not_have_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_gr"):
        train(tmp_path, optim="lars", **{**PLAIN, "lr_scheduler_type": "time_varying"}, warmup_steps=2)
    assert any("warmup_steps=2: the learning rate has no warmup" in r.getMessage() for r in caplog.records)


# ---- Checkpoints ----


@pytest.mark.parametrize(
    "flags",
    [
        {"optim": "tvlars"},
        {"optim": "tvlars", "gr_lambda": None, "warmup_steps": 2, "ire_kappa": 1.0, "ire_interval": 2},
        {"optim": "lars", "lr_scheduler_type": "time_varying", "lr_scaling": "sqrt"},
        {"optim": "lamb", "lr_scheduler_type": "cosine", "learning_rate": 0.01},
    ],
    ids=str,
)
def test_resume_is_bit_identical(flags, tmp_path):
    flags = {**PLAIN, "save_strategy": "steps", "save_steps": 3, **flags}
    _, whole = train(tmp_path / "whole", **flags)
    args = GRConfig(**toys.arguments(tmp_path / "whole", **flags))
    recorder = toys.PathRecorder()
    trainer = GRTrainer(toys.vit(), args, train_dataset=toys.images(), callbacks=[recorder])
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(torch.stack(recorder.path), whole[3:])


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optim": "larz"}, "optim='larz': choose one of adamw_torch"),
        ({"lr_scheduler_type": "phi"}, "lr_scheduler_type='phi': choose one of linear"),
        ({"lr_scaling": "quadratic"}, "lr_scaling='quadratic': choose one of none, linear, sqrt"),
        ({"layer_statistics_steps": -1}, "layer_statistics_steps=-1: must be a whole number of steps, or 0"),
    ],
)
def test_mistakes_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError) as error:
        GRConfig(**toys.arguments(tmp_path, **flags))
    assert message in str(error.value)


def test_an_attribute_that_is_set_later_is_checked(tmp_path):
    args = GRConfig(**toys.arguments(tmp_path))
    args.lr_scaling = "quadratic"
    with pytest.raises(ValueError, match="lr_scaling='quadratic': choose one of none, linear, sqrt"):
        GRTrainer(toys.vit(), args, train_dataset=toys.images()).train()
