"""`--help` of the training scripts: our flags in groups, and those of transformers that everyone uses. `--help-all` has
the others, and more about each."""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import OptimizerArguments

FLAGS = ("-h", "--help", "--help-all")
#: Flags of transformers in `--help` -> what we say of them, where it is not what transformers says.
COMMON = {
    "optim_args": "Arguments of the optimizer: key=value,key=value.",
    "output_dir": "Where checkpoints, model, card and record are written.",
    "num_train_epochs": "",
    "max_steps": "Train for this many steps, instead of epochs.",
    "per_device_train_batch_size": "",
    "per_device_eval_batch_size": "",
    "gradient_accumulation_steps": "Micro-batches per step.",
    "learning_rate": "",
    "weight_decay": "",
    "warmup_steps": "Steps of the learning-rate warmup; below 1, a fraction of all steps.",
    "max_grad_norm": "",
    "bf16": "Mixed precision with bfloat16.",
    "seed": "Seed of weights, order, dropout and noise.",
    "eval_strategy": "When to evaluate.",
    "logging_strategy": "When to log.",
    "save_strategy": "When to save a checkpoint.",
    "resume_from_checkpoint": "A checkpoint's folder, or last: the last complete one in output_dir.",
    "push_to_hub": "Upload checkpoints, model and card.",
    "report_to": "Where to report: tensorboard, trackio, wandb, all or none.",
}
OTHERS = "others of transformers"
#: The longest list of choices in `--help`.
MAX_CHOICES = 70


def help_of(
    parser: argparse.ArgumentParser,
    kinds: tuple[type, ...],
    recipe: Mapping[str, Any],
    is_long: bool = False,
) -> str:
    """The text of `--help`, or of `--help-all`.

    Args:
        kinds: the dataclasses of the arguments: model, data, training. The module of the first describes the script.
        recipe: the flags that a run without further ones uses.
    """
    formatter = _Formatter(parser.prog, recipe, is_long)
    formatter.add_text(f"usage: {parser.prog} [RECIPE] [--FLAG VALUE ...]")
    formatter.add_text(sys.modules[kinds[0].__module__].__doc__)
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first of --x and --no_x
    for title, names in _groups(kinds, actions).items():
        if is_long or title != OTHERS:
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
    more = "" if is_long else " --help-all has every flag of transformers, and more about each."
    formatter.add_text(f"In parentheses: the default, or the value in the recipe.{more}")
    return formatter.format_help()


def _groups(kinds: tuple[type, ...], names: Iterable[str]) -> dict[str, list[str]]:
    """Title -> names of flags; each is in one group."""
    model, data, training = (list(kind.__dataclass_fields__) for kind in kinds)  # type: ignore[attr-defined]
    chosen = {
        "gradient regularization": [name for name in training if name.startswith("gr_")],
        "IRE": [name for name in training if name.startswith("ire_")],
        "optimizer": [*OptimizerArguments.__annotations__, "optim_args"],
        "model": model,
        "data": data,
        "this script": [*kinds[-1].__annotations__, "traceback"],
        "training": [name for name in COMMON if name != "optim_args"],
    }
    chosen[OTHERS] = sorted(set(names).difference(*chosen.values()))
    return chosen


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Each flag once, in the spelling with underscores, with its default or its value in the recipe."""

    def __init__(self, prog: str, recipe: Mapping[str, Any], is_long: bool):
        width = shutil.get_terminal_size((120, 24)).columns
        super().__init__(prog, max_help_position=33, width=width)
        self._recipe, self._is_long = recipe, is_long

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0]

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((COMMON.get(action.dest) or action.help or "").split())
        choices = ", ".join(map(str, action.choices or ()))
        if not self._is_long:
            text = re.split(r"(?<=\.)(?<!e\.g\.) ", text)[0]
            choices = choices if len(choices) <= MAX_CHOICES else ""
        value = self._value(action)
        parts = (text, choices and f"[{choices}]", value and f"({value})")
        return " ".join(filter(None, parts)).replace("%", "%%")

    def _value(self, action: argparse.Action) -> str:
        if action.dest in self._recipe:
            return f"recipe: {self._recipe[action.dest]}"
        default = getattr(action.default, "value", action.default)
        return "" if default in (None, "", -1, argparse.SUPPRESS, False) else str(default)
