"""Optimizers by name: in a plain loop, and from the flag optim_args."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from helpers import toys
from hf_gr import LAMB, LARS, TVLARS, GRConfig, GRTrainer, create_optimizer, list_optimizers
from hf_gr.optimizer_factory import OPTIMIZERS, parse_optim_args


def test_every_name_is_listed_with_a_line():
    listed = list_optimizers()
    assert set(listed) == {*OPTIMIZERS, *(name.value for name in OptimizerNames)}
    assert all(line and "\n" not in line for line in listed.values())
    assert listed["lars"].startswith("layer-wise adaptive rate scaling")


@pytest.mark.parametrize(
    ("name", "cls", "kwargs"),
    [
        ("lars", LARS, {"momentum": 0.8}),
        ("tvlars", TVLARS, {"tv_lambda": 0.1, "delay_steps": 100}),
        ("lamb", LAMB, {"betas": (0.9, 0.95)}),
        ("adamw_torch", torch.optim.AdamW, {"betas": (0.9, 0.95)}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_a_model_is_grouped_as_trainer_does(name, cls, kwargs, tmp_path):
    model = toys.vit()
    model.vit.embeddings.cls_token.requires_grad_(False)
    optimizer = create_optimizer(name, model, lr=0.3, weight_decay=0.1, **kwargs)
    assert type(optimizer) is cls
    assert all(group["lr"] == 0.3 and group.items() >= kwargs.items() for group in optimizer.param_groups)
    args = TrainingArguments(**toys.arguments(tmp_path, weight_decay=0.1))
    expected = Trainer(model, args).create_optimizer()
    for group, reference in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert group["weight_decay"] == reference["weight_decay"]
        assert all(p is q for p, q in zip(group["params"], reference["params"], strict=True))


def test_parameters_are_taken_as_they_are():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = create_optimizer("lamb", [{"params": [p], "lr": 0.5}], lr=0.1, weight_decay=0.2)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.2)
    assert create_optimizer("adafactor", [p], lr=0.1).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("nosuch", {}, "name='nosuch': choose one of lamb, lars, muon, tvlars, adamw_torch"),
        ("lars", {"momentun": 0.9}, "momentun: unknown to lars, which takes momentum, trust_coefficient, nesterov"),
        ("tvlars", {"tv_lambda": 0.1}, "tvlars needs delay_steps"),
        ("sgd", {"lr": math.nan}, "lr=nan: must be >= 0, and finite"),
        ("sgd", {"weight_decay": math.nan}, "weight_decay=nan: must be >= 0, and finite"),
        ("sgd", {"betas": (0.9, 0.99)}, "betas: unknown to sgd, which takes momentum"),
    ],
)
def test_mistakes_are_named(name, kwargs, message):
    with pytest.raises(ValueError) as error:
        create_optimizer(name, toys.vit(), **{"lr": 0.1, **kwargs})
    assert message in str(error.value)


# ---- optim_args ----


def test_optim_args_are_read():
    assert parse_optim_args(None) == {}
    assert parse_optim_args("momentum=0.9, nesterov=true,norm_clamp=(0, 10),gamma_min=None,betas=[0.9,0.99]") == {
        "momentum": 0.9,
        "nesterov": True,
        "norm_clamp": (0, 10),
        "gamma_min": None,
        "betas": [0.9, 0.99],
    }


def arguments(tmp_path, **kwargs) -> GRConfig:
    return GRConfig(**toys.arguments(tmp_path, **kwargs))


def test_flags_of_adam_reach_lamb(tmp_path):
    args = arguments(tmp_path, optim="lamb", adam_beta2=0.95)
    cls, kwargs = GRTrainer.get_optimizer_cls_and_kwargs(args)
    assert cls is LAMB
    assert kwargs == {"lr": args.learning_rate, "betas": (0.9, 0.95)}  # and the eps of LAMB
    args = arguments(tmp_path, optim="lamb", adam_epsilon=1e-4, optim_args="bias_correction=False")
    assert GRTrainer.get_optimizer_cls_and_kwargs(args)[1].items() >= {"eps": 1e-4, "bias_correction": False}.items()


def test_optim_args_of_transformers_optimizers_still_work(tmp_path):
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9,nesterov=True")
    cls, kwargs = GRTrainer.get_optimizer_cls_and_kwargs(args)
    assert cls is torch.optim.SGD
    assert kwargs.items() >= {"momentum": 0.9, "nesterov": True}.items()


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("lars", "momentun=0.9", "optim_args: momentun is unknown to optim=lars, which takes momentum, trust_coeff"),
        ("lars", "momentum", "'momentum' is not key=value. Give key=value,key=value"),
        ("lars", "momentum=fast", "momentum='fast' is neither a number, nor True, False, None"),
        ("lars", "lr=0.1", "lr has a flag of its own. Use learning_rate=0.1"),
        ("lamb", "weight_decay=0.1", "weight_decay has a flag of its own. Use weight_decay=0.1"),
        ("tvlars", "tv_lambda=0.1", "delay_steps is missing. Give tv_lambda and delay_steps, or neither"),
    ],
)
def test_mistakes_in_optim_args_are_named(optim, optim_args, message, tmp_path):
    with pytest.raises(ValueError) as error:
        GRTrainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=optim, optim_args=optim_args))
    assert message in str(error.value)
