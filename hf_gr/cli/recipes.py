"""Recipes, which are files of flags, and how flags on the command line override them."""

import inspect
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import SchedulerType, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ..config import GR_PRESETS

#: Prefixes of the flags that determine the training method.
METHOD = ("gr_", "ire_", "optim")
LENGTHS = ("max_steps", "num_train_epochs", "max_train_tokens")
_SET_BY_CHECKPOINT = ("model", "dropout", "stem", "weight_init", "image_size", "image_mean", "image_std")
#: For a flag on the command line, the flags of a recipe that contradict it and are dropped.
SUPERSEDES: dict[str, tuple[str, ...]] = {
    **{flag: tuple(other for other in LENGTHS if other != flag) for flag in LENGTHS},
    "gr_preset": ("gr_lambda", *dict.fromkeys(name for preset in GR_PRESETS.values() for name in preset.flags)),
    "ire_preset": ("ire_kappa", "ire_gamma", "ire_start_step"),
    "optim": ("optim_args", "optim_target_modules"),
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
    "bf16": ("fp16",),
    "fp16": ("bf16",),
    "dataset_name": ("dataset_config_name",),
    "model": ("model_name_or_path",),
    "model_name_or_path": _SET_BY_CHECKPOINT,
    "tokenizer_name": ("vocab_size",),
    "vocab_size": ("tokenizer_name",),
    "adapter_name_or_path": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "streaming": ("preprocessing_num_workers",),
}


class _Loader(yaml.SafeLoader):
    """Refuses duplicate names, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{duplicates[0]} is listed twice")
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path, flags: set[str]) -> dict[str, Any]:
    """The flags and values in a YAML or JSON file.

    Raises:
        ValueError: the file is missing or malformed, or contains a name that is not in `flags`.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: this recipe cannot be read ({reason}). Give a YAML or JSON file.") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe has one line FLAG: VALUE per flag; this is a {type(content).__name__}.")
    if unknown := sorted(str(name) for name in content if name not in flags):
        raise ValueError(f"{path}: unknown flag {', '.join(unknown)}; see --help for all flags.")
    return content


def method_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of `recipe` that determine the training method."""
    return {name: value for name, value in recipe.items() if name.startswith(METHOD)}


def under(flags: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` without what `flags`, those on the command line, contradict."""
    changed = {
        flag for flag, value in flags.items() if value is not None and value is not False and recipe.get(flag) != value
    }
    superseded = {other for flag in changed for other in SUPERSEDES.get(flag, ())}
    return {name: value for name, value in recipe.items() if name not in superseded}


def check_length(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` if several flags set the length of training: only one would have an effect."""
    if (steps := given.get("max_steps")) is not None and steps < 1 and steps != -1:
        raise ValueError(f"max_steps={steps}: give at least 1, or leave it out to train for num_train_epochs.")
    lengths = [f"{name}={given[name]}" for name in LENGTHS if given.get(name) not in (None, -1)]
    if len(lengths) > 1:
        raise ValueError(f"{' and '.join(lengths)} both set the length of training. Leave one of them out.")


def check_dicts(values: Any) -> None:
    """Raise `ValueError` for a dict flag of transformers whose value is neither a dict nor JSON for one."""
    for flag in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        value = getattr(values, flag, None)
        try:
            is_dict = isinstance(json.loads(value) if isinstance(value, str) else value, dict)
        except ValueError:
            is_dict = False
        if value is not None and not is_dict:
            raise ValueError(f"{flag}={value!r}: give a JSON object, such as '{{\"min_lr_rate\": 0.1}}'.")


def check_scheduler(args: TrainingArguments) -> None:
    """Raise `ValueError` for a name in `lr_scheduler_kwargs` that the schedule does not support."""
    kind = SchedulerType(args.lr_scheduler_type)
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION.get(kind)
    if schedule is None or not args.lr_scheduler_kwargs:
        return
    parameters = inspect.signature(schedule).parameters
    supported = [name for name in parameters if name not in ("optimizer", "num_warmup_steps", "num_training_steps")]
    unknown = [name for name in args.lr_scheduler_kwargs if name not in supported]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs}: {', '.join(unknown)} is unknown to "
            f"lr_scheduler_type={kind.value}, which supports {', '.join(supported)}. "
            "Change it, or leave it out."
        )


#: Flags of that prefix that have an effect with gr_lambda=0, too.
WITHOUT_GR = ("gr_on_nonfinite", "gr_diagnostics_steps")


def check_gr_is_on(given: Mapping[str, Any], values: Any) -> None:
    """Raise `ValueError` for a GR flag on the command line if the recipe turns GR off."""
    flag = next((f for f in given if f.startswith("gr_") and f not in WITHOUT_GR), None)
    if flag and "gr_lambda" not in given and getattr(values, "gr_lambda", None) == 0:
        raise ValueError(
            f"{flag}={given[flag]} has no effect with gr_lambda=0 in the recipe. Give gr_lambda, too; for SAM, gr_r."
        )
