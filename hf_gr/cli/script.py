"""What the training scripts share: arguments from a recipe and flags, and where the results go."""

import logging
import os
import shlex
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments, set_seed

from ..checks import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Limit, check_fields, check_ranges
from ..config import GRConfig
from ..errors import ArgumentParser, Failure, extra, run
from ..reporting.record import last_evaluation
from ..reporting.redaction import redact, without_folders
from ..trainer.checkpoints import LAST, checkpoints, last_complete_checkpoint
from ..trainer.trainer import GRTrainer
from ..trainer.uploads import LEFT_OUT
from . import recipes
from .output_folder import claim_output_folder, clear, refuse_removing

with extra("scripts"):
    from ..reporting.card import PICTURE, has_curves

__all__ = [
    "ArgumentParser",
    "DataArguments",
    "ModelArguments",
    "ScriptConfig",
    "begin",
    "checkpoint_to_resume",
    "claim",
    "command_line",
    "evaluated_examples",
    "keep_token_out_of_files",
    "parse_args",
    "publish",
    "refuse",
    "run",
    "save_metrics",
    "save_model",
    "train",
]

logger = logging.getLogger(__name__)

UPLOAD_ATTEMPTS = 4
#: Of flags of transformers, which takes any number.
LIMITS = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("eval_delay", "neftune_noise_alpha", "dataloader_num_workers"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), Limit(0, 2**32 - 1)),
}


@dataclass
class ScriptConfig(GRConfig):
    """`GRConfig` with what the scripts alone have."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Remove what an earlier run has left in output_dir (checkpoints, weights, metrics, card) before "
            "training starts. Without it such a folder is refused, unless resume_from_checkpoint continues the run."
        },
    )


@dataclass
class ModelArguments:
    """What is trained. A script adds its own."""

    license: str | None = field(
        default=None, metadata={"help": "License of the trained model, for its card, as the Hub writes it: apache-2.0."}
    )


@dataclass
class DataArguments:
    """What a model is trained and evaluated on. A script adds its own, and gives `dataset_name` a default."""

    dataset_name: str
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    skip_bad_examples: bool = field(
        default=False, metadata={"help": "Leave out, and count, examples whose text is missing (null)."}
    )


def refuse(args: Any, flags: Iterable[str], reason: str) -> None:
    """Raise `ValueError` if one of `flags`, None by default, is given in `args`."""
    for flag in flags:
        if (value := getattr(args, flag)) is not None:
            raise ValueError(f"{flag}={value} has no effect with {reason}. Leave one of them out.")


def parse_args(
    kinds: tuple[type, ...], argv: list[str], default_recipe: Path | None, without_it: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """One instance of each dataclass in `kinds`, from a recipe in YAML or JSON and flags that overrule it.

    A flag also takes out of the recipe what contradicts it (`recipes.SUPERSEDES`).

    Args:
        argv: the command line. A recipe may come first.
        default_recipe: used if none comes. With one of the flags `without_it`, only its method is; so it is for a
            recipe that says nothing about the method.

    Raises:
        ValueError: a recipe or a flag that makes no sense.
    """
    about = sys.modules[kinds[0].__module__].__doc__
    parser = ArgumentParser(kinds, description=about, formatter_class=_HelpFormatter)
    known = {argument.name for kind in kinds for argument in fields(kind)}
    default = recipes.read_recipe(default_recipe, known) if default_recipe is not None else {}
    recipe = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe, argv = recipes.read_recipe(argv[0], known), argv[1:]
    given = _given(parser, argv)
    if recipe is None:
        recipe = default if given.keys().isdisjoint(without_it) else recipes.method_of(default)
    elif not recipes.method_of(recipe):
        recipe = recipes.method_of(default) | recipe
    recipe = recipes.under(given, recipe)
    parser.set_defaults(**recipe)
    values, _ = parser.parse_known_args(argv)
    for kind in kinds:
        check_fields(values, kind, recipe)
    check_ranges(values, LIMITS)
    recipes.check_length(recipe | given)
    recipes.check_dicts(values)
    parsed = parser.parse_args_into_dataclasses(argv)
    recipes.check_gr_is_on(given, values)
    for args in parsed:
        if isinstance(args, TrainingArguments):
            recipes.check_scheduler(args)
            keep_token_out_of_files(args)
    return parsed


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults with the flags, and the script's own words as they are."""


def _given(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """The flags on the command line, whether their values are the defaults or not."""
    missing = object()
    blank = Namespace(**dict.fromkeys((action.dest for action in parser._actions), missing))
    values, rest = parser.parse_known_args(argv, blank)
    parser.refuse(rest)  # first: a misspelled flag may be why another one is wrong
    return {name: value for name, value in vars(values).items() if value is not missing}


@contextmanager
def claim(args: ScriptConfig) -> Iterator[None]:
    """Within, no other run can write into the output folder (see `claim_output_folder`, also for what is refused).
    Seeds the random numbers, and prints by which method the run trains."""
    with claim_output_folder(args, args.overwrite_output_dir):
        set_seed(args.seed)
        if args.process_index == 0:
            print(f"Method: {args.describe_method()}.", flush=True)  # noqa: T201
        yield


def begin(trainer: GRTrainer, *script_args: Any) -> None:
    """When everything is loaded and nothing has been written: tell the trainer the script's own arguments, and with
    `overwrite_output_dir` remove what an earlier run has left."""
    trainer.script_args = script_args
    folder = trainer.args.output_dir
    if trainer.args.overwrite_output_dir:
        refuse_removing(folder, [v for own in script_args for v in asdict(own).values() if isinstance(v, str)])
        trainer.accelerator.wait_for_everyone()  # they look at what is there
        if trainer.is_world_process_zero():
            clear(folder)
        trainer.accelerator.wait_for_everyone()


def keep_token_out_of_files(args: TrainingArguments) -> None:
    """Move `hub_token` to the environment, where the Hub's client finds it. Trainer writes its arguments into
    `training_args.bin`, as they are, and uploads that."""
    if args.hub_token:
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None


def command_line(script: str, argv: list[str], args: GRConfig) -> str:
    """What the run was started with, to be read by others: without its token and without folders of this machine.

    Args:
        script: its file.
        argv: its arguments.
        args: what came of them. How several processes were started is not known in them; a single one needs no
            launcher.
    """
    launcher = f"accelerate launch --num_processes {args.world_size}" if args.world_size > 1 else "python"
    words = redact([_shown_script(script), *argv], known=(args.hub_token,))
    return f"{launcher} {shlex.join(map(_without_folders, words))}"


def _shown_script(script: str) -> str:
    path = os.path.relpath(script)
    return os.path.basename(path) if path.startswith("..") else path


def _without_folders(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return flag + equals + without_folders(value)


def checkpoint_to_resume(args: GRConfig) -> str | bool | None:
    """What `resume_from_checkpoint` says; for "last" the last complete checkpoint in the output folder, or None if the
    folder has no checkpoint at all.

    So the same command can be given again and again, until a run that is killed on the way has ended.

    Raises:
        ValueError: there are checkpoints, and none is complete. A start from the beginning would overwrite them.
    """
    asked = args.resume_from_checkpoint
    if asked != "last":
        return True if asked in LAST else asked
    folder = str(args.output_dir)
    found, last = checkpoints(folder), last_complete_checkpoint(folder)
    if found and last is None:
        raise ValueError(
            f"resume_from_checkpoint=last: no checkpoint in {folder} ({', '.join(p.name for p in found)}) is "
            "complete. Start from the beginning with --overwrite_output_dir in place of it, or in another folder."
        )
    return last


def save_model(trainer: GRTrainer) -> None:
    """Into the output folder. `publish` uploads it, once, with everything else."""
    trainer.save_model(_internal_call=True)


def save_metrics(trainer: GRTrainer, split: str, metrics: dict[str, float], combined: bool = True) -> None:
    """Print them, and write them into the output folder."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics, combined=combined)


def train(
    trainer: GRTrainer, counts: dict[str, int], evaluate: Callable[[], dict[str, float]] | None = None
) -> dict[str, float]:
    """Train, save the model and evaluate it. Returns the metrics of the evaluation, which the output folder gets, too.

    Args:
        counts: further metrics of the training, such as examples left out.
        evaluate: `trainer.evaluate` by default.
    """
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    save_model(trainer)
    save_metrics(trainer, "train", {**result.metrics, **trainer.costs(), **counts})
    metrics = trainer.evaluate() if evaluate is None else evaluate()
    save_metrics(trainer, "eval", metrics)
    trainer.save_state()
    return metrics


def publish(
    trainer: GRTrainer,
    dataset_name: str,
    embedded: dict[str, str] | None = None,
    kind: str = "Model",
    **card: Any,
) -> Path:
    """Write the card, with `push_to_hub` upload all, and print what there is. Returns the output folder.

    Args:
        dataset_name: as the flag has it; `embedded`, names of data that come with a dependency, and what they are.
        kind: what was trained, in a word.
        card: further arguments of `create_model_card`, besides those that the script's own arguments say.
    """
    folder = Path(trainer.args.output_dir).resolve()
    own = {flag: value for args in trainer.script_args for flag, value in vars(args).items()}
    card = {
        "dataset_config": own.get("dataset_config_name"),
        "finetuned_from": own.get("model_name_or_path"),
        "license": own.get("license"),
        "script_args": trainer.script_args,
        **_dataset(dataset_name, embedded or {}),
        **card,
    }
    trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        if trainer.args.push_to_hub:
            _upload(trainer)
        picture = folder / PICTURE if has_curves(trainer.state.log_history) else None
        written = {kind: folder, "Card": folder / "README.md", "Picture": picture}
        for what, path in written.items():
            if path is not None:
                print(f"{what:8} {path}")  # noqa: T201
    return folder


def _dataset(name: str, embedded: dict[str, str]) -> dict[str, str | None]:
    """What the card says of the data: only a name on the Hub is an id there."""
    path = Path(name)
    if name in embedded:
        return {"dataset": embedded[name]}
    if path.exists():
        return {"dataset": f"the local {'folder' if path.is_dir() else 'file'} {path.resolve().name}"}
    return {"dataset": name, "dataset_tags": name}


def evaluated_examples(trainer: GRTrainer) -> float | None:
    """How many the last evaluation has counted."""
    return last_evaluation(trainer.state.log_history)[0].get("evaluated_examples")


def _upload(trainer: GRTrainer) -> None:
    """Push the output folder: what `trainer.push_to_hub` does, without saving the model and writing the card again.

    The client does not retry a commit whose connection breaks, for fear of a second one. Here a second one would have
    what the first has, and the same call goes on with an upload that broke off.
    """
    folder, repo_id = Path(trainer.args.output_dir).resolve(), str(trainer.hub_model_id)
    for attempt in range(1, UPLOAD_ATTEMPTS + 1):
        try:
            HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="End of training",
                token=trainer.args.hub_token,
                revision=trainer.args.hub_revision,
                ignore_patterns=list(LEFT_OUT),
            )
            return
        except Exception as error:  # noqa: PERF203  whatever it is, the files are there
            is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if is_refused or attempt == UPLOAD_ATTEMPTS:
                raise Failure(
                    f"The upload to {repo_id} failed ({error}). Nothing is lost: model, card and pictures "
                    f"are in {folder}; upload them with: hf upload {repo_id} {folder}"
                ) from error
            logger.warning(f"The upload broke off ({error}). Trying again, {attempt} of {UPLOAD_ATTEMPTS - 1}.")
            time.sleep(2**attempt)
