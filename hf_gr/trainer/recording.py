"""The record of a run, `run.json`: what was counted while it happened, and the settings that were in force.

It lies in the output folder and in every checkpoint, from which a resumed run goes on counting. A run consists of
segments, one per start: a run that is resumed with other flags has done some steps with the old ones.
"""

import dataclasses
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .. import __version__
from ..reporting.redaction import redact
from .layerwise import innermost
from .part import Host

FILE = "run.json"
FORMAT = 1

#: Recorded even at their default: without them nobody can read the rest.
ALWAYS_SHOWN = ("seed", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "weight_decay")
#: Where the run was kept, watched and published, not what it computed.
BOOKKEEPING = frozenset(
    """
    output_dir run_name project report_to disable_tqdm log_level log_level_replica log_on_each_node logging_strategy
    logging_steps logging_first_step eval_strategy eval_steps per_device_eval_batch_size save_strategy save_steps
    save_total_limit do_train do_eval do_predict resume_from_checkpoint push_to_hub label_names remove_unused_columns
    accelerator_config ddp_backend local_rank skip_memory_metrics trackio_space_id trackio_bucket_id
    trackio_static_space_id layer_statistics_steps dataset_name model_name_or_path license use_cpu dataloader_pin_memory
    overwrite_output_dir
    """.split()  # noqa: SIM905
)
#: Flags of the Hub, and those whose values in force are recorded as a group.
ELSEWHERE = ("hub_", "gr_", "ire_")


@dataclass
class Segment:
    """The steps from one start of training to its end, or to the checkpoint that the next start resumed from.

    Attributes:
        first_step: the first one, counted from 1 over the whole run; `last_step` is one less as long as there is none.
        settings: the arguments in force, by their flag's name; one that is at its default is left out. What a resumed
            optimizer has brought along (learning rate, weight decay) is as it is in the optimizer.
        learning_rates: of the first and the last step.
        steps: optimizer steps; of these `regularized_steps` took a second pass, in `ire_steps` IRE acted, and
            `skipped_steps` changed nothing because the gradient was not finite.
        passes: forward and backward passes over the batch of a step; of these `ire_passes` for the estimates of IRE.
        ire_estimates: how many of them there were; `ire_choices`, how often IRE chose its coordinates.
        seconds: of training, evaluations not counted.
        is_recorded: False for steps of which nothing is known, from a checkpoint without a record.
    """

    first_step: int = 1
    last_step: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    batch_size: int = 0
    learning_rates: list[float | None] = field(default_factory=list)
    steps: int = 0
    regularized_steps: int = 0
    skipped_steps: int = 0
    passes: float = 0.0
    ire_steps: int = 0
    ire_choices: int = 0
    ire_estimates: int = 0
    ire_passes: float = 0.0
    seconds: float = 0.0
    is_recorded: bool = True


@dataclass
class Record:
    """What `run.json` has.

    Attributes:
        method: what the last start trained with: `gr` and `ire`, whether they were on, and `optimizer`, its class.
        data: what it trained on, as far as it is known: `dataset_name`, `dataset_config_name`, `train_examples`; of a
            local folder the last part of the path, and `is_local`.
    """

    method: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    format: int = FORMAT

    def total(self, count: str) -> int | float:
        """The sum of a count over the segments; passes are exact to a millionth."""
        return round(sum(getattr(segment, count) for segment in self.segments), 6)

    def is_whole(self) -> bool:
        """Whether every step was recorded."""
        return all(segment.is_recorded for segment in self.segments)


def read_record(folder: str | Path) -> Record | None:
    """The record in an output folder or checkpoint; None if there is none.

    Raises:
        ValueError: it cannot be read, or a later version of hf_gr wrote it.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version of hf_gr reads {FORMAT}")
        return Record(**{**content, "segments": [Segment(**segment) for segment in content["segments"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Delete it, and the steps so far count as not recorded."
        ) from error


def write_record(record: Record, folder: str | Path) -> None:
    """Write `run.json` into `folder`. Whoever reads it at the same time gets the old one or the new one, whole."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(dataclasses.asdict(record), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (old, new) of the settings that differ; "default" stands for what is at its default."""
    pairs = {name: (old.get(name, "default"), new.get(name, "default")) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# ---- What a trainer is about to do ----


def method_of(trainer: Host) -> dict[str, Any]:
    """What the run of a trainer is identified by; known before its optimizer is made."""
    flags = trainer.gr_args
    is_ire = flags.ire_kappa != 0 or trainer.ire_optimizer is not None
    return {"gr": flags.gr_degree != 0, "ire": is_ire, "optimizer": _optimizer_name(trainer)}


def _optimizer_name(trainer: Host) -> str | None:
    made = innermost(trainer.optimizer)
    if made is not None:
        return type(made).__name__
    given = getattr(trainer, "optimizer_cls_and_kwargs", None)
    kind, _ = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    # A factory (Muon) makes a class of which only the optimizer itself tells.
    return kind.__name__ if isinstance(kind, type) and issubclass(kind, Optimizer) else None


def data_of(trainer: Host) -> dict[str, Any]:
    """What it trains on: its `script_args` say the name, where a script has set them."""
    data: dict[str, Any] = {}
    for args in trainer.script_args:
        name = getattr(args, "dataset_name", None)
        if name is not None:
            is_local = Path(name).exists()
            data |= {"dataset_name": Path(name).resolve().name if is_local else name, "is_local": is_local}
            data["dataset_config_name"] = getattr(args, "dataset_config_name", None)
    return {**data, "train_examples": count_of(trainer.train_dataset)}


def count_of(dataset: Any) -> int | None:
    """How many examples it has; None if it does not know."""
    return len(dataset) if dataset is not None and has_length(dataset) else None


def settings_of(trainer: Host) -> dict[str, Any]:
    """The settings in force, once optimizer and schedule are made and a checkpoint is loaded."""
    settings: dict[str, Any] = {}
    for args in (*trainer.script_args, trainer.args):
        settings |= changed_arguments(args)
    return settings | _optimizer_settings(trainer) | _gr_settings(trainer) | _ire_settings(trainer)


def changed_arguments(args: Any) -> dict[str, Any]:
    """Of a dataclass what differs from its default, and `ALWAYS_SHOWN`. New flags appear by themselves."""
    values = args.to_dict() if isinstance(args, TrainingArguments) else dataclasses.asdict(args)
    changed = {}
    for argument in dataclasses.fields(args):
        name = argument.name
        if name not in values or name in BOOKKEEPING or name.startswith(ELSEWHERE):
            continue
        if name == "num_train_epochs" and values.get("max_steps", -1) > 0:
            continue  # it is not what ends the run
        default = default_of(argument)
        differs = values[name] != default and not (_is_unset(values[name]) and _is_unset(default))
        if differs or name in ALWAYS_SHOWN:
            value = values[name]
            changed[name] = without_folders(redact([value])[0]) if isinstance(value, str) else value
    return changed


def without_folders(value: str) -> str:
    """A path as others may read it: what leads out of the working folder is cut off, and no folder of it looks like a
    name on the Hub. Anything else is left as it is."""
    if os.path.isabs(value) or value == ".." or value.startswith("../"):
        return f"path/to/{os.path.basename(os.path.abspath(value))}"
    is_folder = os.path.isdir(value) and not value.startswith(".")
    return f"./{value}" if is_folder else value


def default_of(argument: dataclasses.Field) -> Any:
    default = argument.default if argument.default_factory is dataclasses.MISSING else argument.default_factory()
    return default.value if isinstance(default, Enum) else default


def _is_unset(value: Any) -> bool:
    """None, False and empty: `TrainingArguments.__post_init__` turns one into another."""
    return value is None or value is False or value in ("", [], {})


def _optimizer_settings(trainer: Host) -> dict[str, Any]:
    """What an optimizer that has loaded a checkpoint has from there, whatever the flags say."""
    optimizer = innermost(trainer.optimizer)
    if optimizer is None:
        return {}
    settings = {}
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group.get("lr"))
    if rate is not None:
        rate = float(rate) / trainer.layerwise.lr_factor
        given = trainer.args.learning_rate
        settings["learning_rate"] = given if abs(rate - given) <= 1e-9 * abs(given) else rate
    decays = [group["weight_decay"] for group in optimizer.param_groups if "weight_decay" in group]
    if decays:
        settings["weight_decay"] = max(decays)
    return settings


def _gr_settings(trainer: Host) -> dict[str, Any]:
    gr = trainer.gr_args
    if gr.gr_degree == 0:
        return {"gr_lambda": 0}
    settings = {"gr_r": gr.gr_r, "gr_lambda": gr.gr_degree, "gr_warmup": gr.gr_warmup}
    if gr.gr_warmup != "none":
        settings["gr_warmup_steps"] = trainer.gr.warmup_steps(trainer.state.max_steps)
    settings |= {"gr_scope": gr.gr_scope, "gr_interval": gr.gr_interval}
    return settings | _others(gr, "gr_", settings)


def _ire_settings(trainer: Host) -> dict[str, Any]:
    ire, flags = trainer.ire_optimizer, trainer.gr_args
    if ire is None:
        return {"ire_kappa": 0}
    settings = {"ire_kappa": ire.kappa}
    if ire.mask != "uniform":
        settings["ire_gamma"] = ire.gamma
    settings |= {
        "ire_interval": flags.ire_interval,
        "ire_start_step": trainer.ire.start_step(trainer.state.max_steps),
    }
    return settings | _others(flags, "ire_", settings)


def _others(flags: Any, prefix: str, known: Iterable[str]) -> dict[str, Any]:
    """The flags of a method that are neither `known` nor at their defaults."""
    idle = {"ire_gamma", "gr_warmup_steps"}  # where they are not known they have no effect
    fields = [f for f in dataclasses.fields(flags) if f.name.startswith(prefix) and f.name not in {*known, *idle}]
    return {f.name: getattr(flags, f.name) for f in fields if getattr(flags, f.name) != f.default}


def versions() -> dict[str, str]:
    """Of this library, with the commit of its checkout, of Python, and of the packages that a result depends on."""
    commit = _commit()
    packages = ("transformers", "torch", "accelerate", "datasets", "peft")
    own = __version__ + (f" (commit {commit})" if commit else "")
    return {"hf_gr": own, "Python": platform.python_version(), **{name: version(name) for name in packages}}


def _commit() -> str | None:
    """Of the checkout that this package runs from, marked if its files differ from it; None where there is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ---- While it runs ----


class Recorder(TrainerCallback):
    """Keeps the record of a trainer. What happens elsewhere is counted there, in `segment`.

    Attributes:
        segment: the one that is being trained.
        resumed_from: the checkpoint that the next start resumes from.
    """

    def __init__(self, trainer: Host):
        self._trainer = trainer
        self._running_since: float | None = None
        self.resumed_from: str | None = None
        self.segment = Segment()
        self._record = Record(segments=[self.segment])

    @property
    def record(self) -> Record:
        """Of the run so far; of a trainer that has not trained, of what it would do."""
        if not self.segment.settings:
            self._begin(0)
        return self._record

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """A second `train()` is a new run, and so is a start with a smaller batch after one that ran out of memory."""
        self._begin(state.global_step)
        self._running_since = time.perf_counter()

    def _begin(self, done: int) -> None:
        """A new segment, after `done` steps."""
        trainer = self._trainer
        earlier = read_record(self.resumed_from) if self.resumed_from else None
        segments = [s for s in earlier.segments if s.steps or not s.is_recorded] if earlier else []
        recorded = segments[-1].last_step if segments else 0
        if recorded < done:
            segments.append(Segment(recorded + 1, done, is_recorded=False))
        self.segment = Segment(
            first_step=done + 1,
            last_step=done,
            settings=settings_of(trainer),
            versions=versions(),
            world_size=trainer.args.world_size,
            batch_size=trainer.get_total_train_batch_size(trainer.args),
        )
        self._record = Record(method_of(trainer), data_of(trainer), [*segments, self.segment])

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        trainer, segment = self._trainer, self.segment
        if trainer.accelerator.optimizer_step_was_skipped:  # by the gradient scaler
            segment.skipped_steps += 1
        rate = trainer.optimizer.param_groups[0].get("lr")
        if isinstance(rate, Tensor):  # schedulers change it in place; it is read only when it is written down
            rate = rate.detach().clone()
        segment.learning_rates = [*segment.learning_rates[:1], rate]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.segment.steps += 1
        self.segment.last_step = state.global_step

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Stop the clock, and write down what there is."""
        if self._stop_clock() and self.segment.steps:
            self.write(self._folder())

    def _folder(self) -> str:
        return self._trainer._get_output_dir(getattr(self._trainer, "_trial", None))

    def write(self, *folders: str | Path) -> None:
        """Into each of the folders, on the main process."""
        if not self._trainer.args.should_save:
            return
        if self._stop_clock():
            self._running_since = time.perf_counter()
        self.segment.learning_rates = [None if rate is None else float(rate) for rate in self.segment.learning_rates]
        for folder in folders:
            write_record(self.record, folder)

    # ---- The clock ----

    def _stop_clock(self) -> bool:
        """Whether it was running."""
        if self._running_since is None:
            return False
        self.segment.seconds += time.perf_counter() - self._running_since
        self._running_since = None
        return True

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """The body is not training."""
        was_running = self._stop_clock()
        try:
            yield
        finally:
            if was_running:
                self._running_since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of training so far, in all segments."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return sum(segment.seconds for segment in self._record.segments) + running

    @property
    def passes(self) -> float:
        """Over the batch of a step so far, in all segments."""
        return self._record.total("passes")
