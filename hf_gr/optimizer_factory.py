"""Optimizers by name: ours, and those of transformers."""

import ast
import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from .optim import LAMB, OPTIMIZERS, TVLARS, Muon
from .optim.muon import hidden_matrices

#: Where `get_optimizer_cls_and_kwargs` may return parameters; `Trainer` puts them in place of its own groups.
PARAMETER_KEYS = frozenset({"params", "model", "optimizer_dict"})

#: Of TVLARS by name, where nothing is said: a share of the run, see `optimizer_training.in_steps`.
TIME_VARYING_DEFAULTS = {"tv_lambda": 10.0, "delay_steps": 0.5}


def list_optimizers() -> dict[str, str]:
    """The names that `create_optimizer` and the flag `optim` know, each with a line about it."""
    ours = {name: cls.help for name, cls in OPTIMIZERS.items()}
    return ours | {name.value: f"transformers' optim={name.value}" for name in OptimizerNames}


def create_optimizer(
    name: str,
    params_or_model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer by its name, as a plain loop needs it.

    Args:
        name: a key of `list_optimizers()`.
        params_or_model: of a model the trainable parameters are taken, in two groups as in `Trainer`: norms and biases
            are not decayed. Parameters, or groups of them, are taken as they are.
        lr: learning rate.
        weight_decay: of every group that has none of its own.
        kwargs: further arguments of the optimizer's class. What is not given is as the flags of
            `TrainingArguments` have it.

    Raises:
        ValueError: unknown name or argument, or one that is missing or out of its range.
    """
    if name not in list_optimizers():
        raise ValueError(f"name={name!r}: choose one of {', '.join(list_optimizers())}.")
    for key, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:  # some of torch's own take NaN
            raise ValueError(f"{key}={value}: must be >= 0, and finite.")
    model = params_or_model if isinstance(params_or_model, nn.Module) else None
    params = params_or_model if model is None else _groups(model, weight_decay)
    cls, defaults = _class_and_defaults(name, model, lr)
    settings = {**defaults, **kwargs, "weight_decay": weight_decay}
    parameters = inspect.signature(cls).parameters
    if unknown := [key for key in kwargs if key not in parameters]:
        raise ValueError(f"{', '.join(unknown)}: unknown to {name}, which takes {', '.join(_settings_of(cls))}.")
    required = [key for key, p in parameters.items() if p.default is p.empty and key != "params"]
    if missing := [key for key in required if key not in settings]:
        raise ValueError(f"{name} needs {', '.join(missing)}.")
    if "weight_decay" not in parameters:
        if weight_decay:
            raise ValueError(f"weight_decay={weight_decay} has no effect: {name} has no weight decay. Leave it out.")
        del settings["weight_decay"]
    return cls(params, **settings)


def _class_and_defaults(name: str, model: nn.Module | None, lr: float) -> tuple[Any, dict[str, Any]]:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name], {"lr": lr, **parameters_by_kind(OPTIMIZERS[name], model)}
    args: Any = SimpleNamespace(**{flag: f.default for flag, f in TrainingArguments.__dataclass_fields__.items()})
    args.optim, args.learning_rate = OptimizerNames(name), lr
    cls, defaults = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    if is_optimizer_factory(cls) or not PARAMETER_KEYS.isdisjoint(defaults):
        raise ValueError(f"name={name!r}: only a Trainer can make this optimizer. Use its flag optim.")
    return cls, defaults


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    no_trainer: Any = None  # the method does not use it
    decayed = set(Trainer.get_decay_parameter_names(no_trainer, model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]


def _settings_of(cls: type[Optimizer]) -> list[str]:
    own = ("params", "lr", "weight_decay", "hidden")
    return [key for key in inspect.signature(cls).parameters if key not in own]


def parameters_by_kind(cls: type[Optimizer], model: nn.Module | None) -> dict[str, Any]:
    """What an optimizer that treats kinds of layers differently is told about `model`."""
    return {"hidden": hidden_matrices(model)} if cls is Muon and model is not None else {}


# ---- The flag optim_args ----


def settings_by_flags(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of one of our optimizers: those of `optim_args`, and what has a flag of its own."""
    cls, given = OPTIMIZERS[args.optim], parse_optim_args(args.optim_args)
    for key, flag in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if key in given:
            raise ValueError(f"optim_args: {key} has a flag of its own. Use {flag}={given[key]}.")
    if unknown := [key for key in given if key not in _settings_of(cls)]:
        raise ValueError(
            f"optim_args: {', '.join(unknown)} is unknown to optim={args.optim}, which takes "
            f"{', '.join(_settings_of(cls))}."
        )
    settings: dict[str, Any] = {"lr": args.learning_rate}
    if cls is LAMB:
        settings["betas"] = (args.adam_beta1, args.adam_beta2)
        # That of Adam is another; where it is at its default, LAMB keeps its own.
        if args.adam_epsilon != TrainingArguments.__dataclass_fields__["adam_epsilon"].default:
            settings["eps"] = args.adam_epsilon
    elif cls is Muon:
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    elif cls is TVLARS:
        settings.update(time_varying_settings("optim_args", given))
    return {**settings, **given}


def parameters_by_trainer(
    resolve: Callable[[TrainingArguments, nn.Module | None], tuple[Any, dict]],
    args: TrainingArguments,
    model: nn.Module | None,
) -> dict[str, Any]:
    """The parameters, or groups of them, that a trainer hands to whatever optimizer it makes; {} from `Trainer`, whose
    groups are those of its model. `resolve` is its `get_optimizer_cls_and_kwargs`, which does not know our names."""
    stock: Any = copy.copy(args)
    stock.optim, stock.optim_args = TrainingArguments.__dataclass_fields__["optim"].default, None
    return {key: value for key, value in resolve(stock, model)[1].items() if key in PARAMETER_KEYS}


def time_varying_settings(flag: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with the defaults of tv_lambda and delay_steps if both are missing. One alone is an error."""
    missing = [key for key in TIME_VARYING_DEFAULTS if key not in given]
    if len(missing) == 1:
        raise ValueError(
            f"{flag}: {missing[0]} is missing. Give tv_lambda and delay_steps, or neither for "
            f"{' and '.join(f'{key}={value}' for key, value in TIME_VARYING_DEFAULTS.items())}, relative to the run."
        )
    return {**(TIME_VARYING_DEFAULTS if missing else {}), **given}


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """{"key": value, ...} of "key=value,key=(low,high)"; values are numbers, pairs of them, True, False or None."""
    parsed = {}
    for item in re.split(r",(?![^(\[]*[)\]])", text) if text else ():  # commas that are not inside brackets
        key, equals, value = item.partition("=")
        if not (equals and key.strip().isidentifier()):
            raise ValueError(f"optim_args={text!r}: {item.strip()!r} is not key=value. Give key=value,key=value.")
        word = value.strip().capitalize()
        try:
            parsed[key.strip()] = ast.literal_eval(word if word in ("True", "False", "None") else value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(
                f"optim_args={text!r}: {key.strip()}={value.strip()!r} is neither a number, nor True, False, None or a "
                "(low,high)."
            ) from None
    return parsed
