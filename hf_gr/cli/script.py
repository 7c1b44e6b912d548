"""What the training scripts share: arguments from a recipe and flags, training, and publishing the results."""

import logging
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as logging_of_transformers

from ..analysis.curvature import QUANTITIES
from ..checks import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Limit, check_fields, check_ranges
from ..config import GRConfig
from ..errors import ArgumentParser, Failure, extra, run
from ..reporting.record import last_evaluation
from ..reporting.redaction import redact, without_folders
from ..trainer.checkpoints import LAST, checkpoints, last_complete_checkpoint
from ..trainer.sharpness import as_logs
from ..trainer.trainer import GRTrainer
from ..trainer.uploads import LEFT_OUT
from . import help, recipes
from .console import has_bars, metrics_line, talk
from .output_folder import claim_output_folder, clear, refuse_removing
from .shipped import COMMAND, RECIPES, SCRIPTS, SCRIPTS_PACKAGE, SUFFIXES, find
from .twins import comparisons, twin_command

with extra("scripts"):
    import datasets

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
    "program",
    "publish",
    "refuse",
    "run",
    "save_metrics",
    "save_model",
    "train",
]

logger = logging.getLogger(__name__)

UPLOAD_ATTEMPTS = 4
#: Ranges of flags for which transformers accepts any number.
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
    """`GRConfig` plus what only the scripts have."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Before training, remove an earlier run from output_dir: its checkpoints, weights, metrics and "
            "card. Otherwise such a folder is refused, unless resume_from_checkpoint continues the run."
        },
    )
    final_sharpness: list[str] | None = field(
        default=None,
        metadata={
            "help": "After training, measure how sharp the training loss is, as trainer.sharpness does: any of "
            f"{', '.join(QUANTITIES)}. They are in the results as sharpness_trace and so on, and on the card."
        },
    )

    def __post_init__(self):
        if unknown := [name for name in self.final_sharpness or () if name not in QUANTITIES]:
            raise ValueError(f"final_sharpness={unknown[0]!r}: choose from {', '.join(QUANTITIES)}.")
        super().__post_init__()


@dataclass
class ModelArguments:
    """The model to train. Each script adds its own flags."""

    license: str | None = field(
        default=None, metadata={"help": "License of the trained model, for its card, as named on the Hub: apache-2.0."}
    )


@dataclass
class DataArguments:
    """The data to train and evaluate on. Each script adds its own flags and a default for `dataset_name`."""

    dataset_name: str
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    skip_bad_examples: bool = field(
        default=False, metadata={"help": "Skip and count examples whose text is missing (null)."}
    )


def refuse(args: Any, flags: Iterable[str], reason: str) -> None:
    """Raise `ValueError` if one of `flags`, all None by default, is set in `args`."""
    for flag in flags:
        if (value := getattr(args, flag)) is not None:
            raise ValueError(f"{flag}={value} has no effect with {reason}. Leave one of them out.")


def parse_args(
    kinds: tuple[type, ...], argv: list[str], default_recipe: Path | None, without_it: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """One instance of each dataclass in `kinds`, from a recipe in YAML or JSON and flags that override it.

    A flag also removes from the recipe what contradicts it (`recipes.SUPERSEDES`).

    Args:
        argv: the command line, which may begin with a recipe.
        default_recipe: used if it does not. Only its method is used with one of the flags `without_it`, or for a recipe
            that does not set the method.

    Raises:
        ValueError: a recipe or a flag is invalid.
    """
    parser = ArgumentParser(kinds, add_help=False)
    flags = {argument.name for kind in kinds for argument in fields(kind)}
    default = recipes.read_recipe(default_recipe, flags) if default_recipe is not None else {}
    recipe = None
    if argv and argv[0].endswith(SUFFIXES):
        recipe, argv = recipes.read_recipe(find("recipe", argv[0], RECIPES), flags), argv[1:]
    if asked := set(argv).intersection(help.FLAGS):
        print(help.help_of(parser, kinds, _completed(recipe, default), is_long="--help-all" in asked))
        sys.exit(0)
    given = _given(parser, argv)
    recipe = recipes.under(given, _completed(recipe, default, given.keys().isdisjoint(without_it)))
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


def _completed(recipe: dict[str, Any] | None, default: dict[str, Any], is_whole: bool = True) -> dict[str, Any]:
    """`recipe`, which has the default's method where it sets none; without one, the default, or only its method."""
    if recipe is None:
        return default if is_whole else recipes.method_of(default)
    return recipe if recipes.method_of(recipe) else recipes.method_of(default) | recipe


def _given(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """The flags on the command line, including those set to their defaults."""
    missing = object()
    blank = Namespace(**dict.fromkeys((action.dest for action in parser._actions), missing))
    values, rest = parser.parse_known_args(argv, blank)
    parser.refuse(rest)  # first: a misspelled flag may be why another is wrong
    return {name: value for name, value in vars(values).items() if value is not missing}


@contextmanager
def claim(args: ScriptConfig) -> Iterator[None]:
    """Inside this context no other run can write to the output folder (see `claim_output_folder`, also for errors).
    Seeds the random number generators, and silences what would not be read."""
    if not has_bars(args):
        datasets.disable_progress_bars()
        logging_of_transformers.disable_progress_bar()
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # torch warns that it has no effect
    with claim_output_folder(args, args.overwrite_output_dir):
        set_seed(args.seed)
        yield


def begin(trainer: GRTrainer, *script_args: Any, data: str) -> None:
    """Once everything is loaded, before anything is written: pass the script's own arguments to the trainer, and with
    `overwrite_output_dir` remove the results of an earlier run.

    Args:
        data: a few words on the data, to print.
    """
    trainer.script_args = script_args
    flags = {name: value for args in script_args for name, value in vars(args).items()}
    talk(trainer, flags.get("model_name_or_path") or flags.get("model"), data)
    folder = trainer.args.output_dir
    if trainer.args.overwrite_output_dir:
        refuse_removing(folder, [v for group in script_args for v in asdict(group).values() if isinstance(v, str)])
        trainer.accelerator.wait_for_everyone()  # all check the folder before it is cleared
        if trainer.is_world_process_zero():
            clear(folder)
        trainer.accelerator.wait_for_everyone()


def keep_token_out_of_files(args: TrainingArguments) -> None:
    """Move `hub_token` to the environment, where the Hub's client finds it. Trainer writes all its arguments to
    `training_args.bin`, and uploads that."""
    if args.hub_token:
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None


def command_line(script: str, argv: list[str], args: GRConfig) -> str:
    """The command that started the run, for publication: without its token and without folders of this machine.

    Args:
        script: the script's file.
        argv: its arguments.
        args: the parsed arguments. How several processes were started is not recorded; one needs no launcher.
    """
    words = redact(argv, known=(args.hub_token,))
    return shlex.join([*program(script, args.world_size), *map(_without_folders, words)])


def program(script: str, processes: int = 1) -> list[str]:
    """The words that start `script`, a file, as this process was started: `hf-gr vit`, `python scripts/train_vit.py`,
    or `python -m hf_gr.scripts.train_vit`."""
    started = Path(sys.argv[0])
    if started.name.startswith(f"{COMMAND} ") and processes == 1:
        return started.name.split()
    launcher = ["accelerate", "launch", "--num_processes", str(processes)] if processes > 1 else ["python"]
    is_thin = started.name == Path(script).name and started.resolve() != Path(script).resolve()
    if Path(script).parent == SCRIPTS and not is_thin:
        return [*launcher, "-m", f"{SCRIPTS_PACKAGE}.{Path(script).stem}"]
    path = os.path.relpath(started if is_thin else script)
    return [*launcher, os.path.basename(path) if path.startswith("..") else path]


def _without_folders(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return flag + equals + without_folders(value)


def checkpoint_to_resume(args: GRConfig) -> str | bool | None:
    """The value of `resume_from_checkpoint`; for "last", the last complete checkpoint in the output folder, or None if
    it contains no checkpoint.

    So a run that was killed resumes when the same command is run again.

    Raises:
        ValueError: there are checkpoints, but none is complete. Starting over would overwrite them.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint != "last":
        return True if checkpoint in LAST else checkpoint
    folder = str(args.output_dir)
    found, last = checkpoints(folder), last_complete_checkpoint(folder)
    if found and last is None:
        raise ValueError(
            f"resume_from_checkpoint=last: no checkpoint in {folder} ({', '.join(p.name for p in found)}) is "
            "complete. Start over with --overwrite_output_dir instead, or in another folder."
        )
    return last


def save_model(trainer: GRTrainer) -> None:
    """Save the model to the output folder. `publish` uploads it once, with everything else."""
    trainer.save_model(_internal_call=True)


def save_metrics(trainer: GRTrainer, split: str, metrics: dict[str, float], combined: bool = True) -> None:
    """Print `metrics`, and write them to the output folder."""
    if trainer.is_world_process_zero():
        print(f"{split:8} {metrics_line(metrics)}", flush=True)
    trainer.save_metrics(split, metrics, combined=combined)


def train(
    trainer: GRTrainer,
    counts: dict[str, int],
    evaluate: Callable[[], dict[str, float]] | None = None,
    test: Any = None,
    further: Mapping[str, Callable[[], dict[str, float]]] | None = None,
) -> dict[str, float]:
    """Train, save the model and evaluate it. Returns the evaluation's metrics, which are also saved. The log is written
    last: with it, a run is finished.

    Args:
        counts: further training metrics, such as the number of skipped examples.
        evaluate: `trainer.evaluate` by default.
        test: a dataset that is evaluated once, after the other; its metrics are named `test_*`.
        further: name -> what measures further metrics, which are saved under that name.
    """
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    save_model(trainer)
    save_metrics(trainer, "train", {**result.metrics, **trainer.costs(), **counts})
    metrics = trainer.evaluate() if evaluate is None else evaluate()
    save_metrics(trainer, "eval", metrics)
    if test is not None:
        tested = trainer.evaluate(test, metric_key_prefix="test")
        save_metrics(trainer, "test", tested)
        metrics = {**metrics, **tested}
    if quantities := trainer.args.final_sharpness:
        save_metrics(trainer, "sharpness", as_logs(trainer.sharpness(quantities=quantities)))
    for name, measure in (further or {}).items():
        save_metrics(trainer, name, measure())
    trainer.save_state()
    return metrics


def publish(
    trainer: GRTrainer,
    dataset_name: str,
    embedded: dict[str, str] | None = None,
    kind: str = "Model",
    started: tuple[str, list[str]] | None = None,
    **card: Any,
) -> Path:
    """Write the card, upload everything with `push_to_hub`, and print the paths, and what the run can be compared with.
    Returns the output folder.

    Args:
        dataset_name: the flag's value.
        embedded: name -> description of the datasets that come with a dependency.
        kind: what was trained, in one word.
        started: the script's file and its arguments.
        card: further arguments of `create_model_card`; they override those taken from the script's arguments.
    """
    folder = Path(trainer.args.output_dir).resolve()
    flags = {flag: value for args in trainer.script_args for flag, value in vars(args).items()}
    card = {
        "dataset_config": flags.get("dataset_config_name"),
        "finetuned_from": flags.get("model_name_or_path"),
        "license": flags.get("license"),
        "script_args": trainer.script_args,
        "command": command_line(*started, trainer.args) if started else None,
        **_dataset(dataset_name, embedded or {}),
        **card,
    }
    trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        if trainer.args.push_to_hub:
            _upload(trainer)
        picture = folder / PICTURE if has_curves(trainer.state.log_history) else None
        outputs = {kind: folder, "Card": folder / "README.md", "Picture": picture}
        for label, path in outputs.items():
            if path is not None:
                print(f"{label:8} {path}")
        if started is not None:
            _print_twins(folder, *started, trainer.args)
    return folder


def _print_twins(folder: Path, script: str, argv: list[str], args: GRConfig) -> None:
    """How the run compares with its finished twins; without one, the command of a twin."""
    found = list(comparisons(folder))
    for line in found:
        print(f"Twin     {line}")
    if not found and (twin := twin_command(program(script, args.world_size), argv, args)) is not None:
        print("The same without {}: {}".format(*twin))


def _dataset(name: str, embedded: dict[str, str]) -> dict[str, str | None]:
    """The card's arguments for the dataset: only one from the Hub is linked to its page there."""
    path = Path(name)
    if name in embedded:
        return {"dataset": embedded[name]}
    if path.exists():
        return {"dataset": f"the local {'folder' if path.is_dir() else 'file'} {path.resolve().name}"}
    return {"dataset": name, "dataset_tags": name}


def evaluated_examples(trainer: GRTrainer) -> float | None:
    """The number of examples in the last evaluation."""
    return last_evaluation(trainer.state.log_history)[0].get("evaluated_examples")


def _upload(trainer: GRTrainer) -> None:
    """Push the output folder as `trainer.push_to_hub` does, without saving the model and writing the card again.

    The client does not retry a commit if the connection fails, since that could commit twice. Here a second commit
    would have the same content, and the same call resumes an interrupted upload.
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
        except Exception as error:  # whatever the error, the files are saved
            is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if is_refused or attempt == UPLOAD_ATTEMPTS:
                raise Failure(
                    f"The upload to {repo_id} failed ({error}). Nothing is lost: model, card and plots "
                    f"are in {folder}; upload them with: hf upload {repo_id} {folder}"
                ) from error
            logger.warning(f"The upload failed ({error}). Retry {attempt} of {UPLOAD_ATTEMPTS - 1}.")
            time.sleep(2**attempt)
