"""The files of a run: `run.json`, its record, and `trainer_state.json`, its log.

Cards, pictures and tables are functions of these files. The record contains only facts: counts made during
the run, the settings in force, and the arguments of `create_model_card`. Every checkpoint contains a copy, which a
resumed run continues.
"""

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__

FILE = "run.json"
STATE = "trainer_state.json"
FRONTIER = "forgetting_frontier.json"  # of a run with final_forgetting
FORMAT = 1
#: Packages that can affect a result.
PACKAGES = ("transformers", "torch", "accelerate", "datasets", "peft")

#: What metrics begin with: those of the test set where training was evaluated on other data, and those of evaluations.
EVALUATIONS = ("test_", "eval_")

History = list[dict[str, float]]


@dataclass
class Segment:
    """The steps from one start of training to its end, or to the checkpoint that the next start resumed from.

    Attributes:
        first_step: counted from 1 over the whole run; `last_step` is `first_step - 1` until the segment has a step.
        settings: flag -> argument in force, except those at their defaults. After a resume, the learning rate and
            weight decay are those of the loaded optimizer.
        learning_rates: of the first and the last step.
        steps: optimizer steps; `regularized_steps` of them used a gradient at perturbed weights, those between them
            reused an earlier one (`reused_steps`) or perturbed along the momentum (`momentum_steps`), IRE acted in
            `ire_steps`, and `skipped_steps` changed nothing because the gradient was not finite.
        passes: forward and backward passes over the batch of a step, including `ire_passes` for IRE's estimates.
        ire_estimates: the number of IRE's estimates; `ire_choices`, how often IRE chose its coordinates.
        seconds: training time without evaluations.
        is_recorded: False for steps from a checkpoint without a record, whose settings and counts are unknown.
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
    reused_steps: int = 0
    momentum_steps: int = 0
    skipped_steps: int = 0
    passes: float = 0.0
    ire_steps: int = 0
    ire_choices: int = 0
    ire_estimates: int = 0
    ire_passes: float = 0.0
    seconds: float = 0.0
    is_recorded: bool = True


class Span(NamedTuple):
    """A value and the steps in which it applied."""

    value: Any
    first_step: int
    last_step: int


@dataclass(frozen=True)
class ModelFacts:
    """The model that was trained.

    Attributes:
        class_name: the class inside the adapter, if there is one.
        adapter: its `type` in peft, and for LoRA `rank`, `alpha` and `modules`; None without an adapter.
        is_new: whether it was created from a configuration in code, with random weights.
        has_code: whether its code is saved with the weights, because transformers does not contain it.
        has_processor: whether a tokenizer or an image processor is saved with it.
    """

    class_name: str
    parameters: int
    trainable_parameters: int
    adapter: dict[str, Any] | None = None
    is_new: bool = False
    has_code: bool = False
    has_processor: bool = False


@dataclass(frozen=True)
class OptimizerFacts:
    """The optimizer inside the wrappers of IRE and accelerate; its class is in `Record.method`.

    Attributes:
        settings: those of its first parameter group, except the ones that schedules change.
        phi: the phi of TVLARS at the first and the last step.
        lr_factor: the factor that `lr_scaling` applied to the learning rate; None without scaling.
    """

    settings: dict[str, Any]
    phi: list[float] | None = None
    lr_factor: float | None = None


@dataclass(frozen=True)
class Publication:
    """The arguments of `create_model_card`, and the time of the call; see `hf_gr.trainer.recording.publication_of`.

    Attributes:
        base_model: its name on the Hub; `has_local_base` is True if it is a local folder instead.
        arguments: those of the script that the trainer did not have during training.
    """

    model_name: str = ""
    hub_model_id: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    tags: list[str] = field(default_factory=list)
    task: str | None = None
    base_model: str | None = None
    has_local_base: bool = False
    dataset_names: list[str] = field(default_factory=list)
    dataset_ids: list[str] = field(default_factory=list)
    dataset_config: str | None = None
    split: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    sample: str | None = None
    command: str | None = None
    date: str | None = None


@dataclass(frozen=True)
class SharpnessFacts:
    """The last measurement of the loss's sharpness; see `hf_gr.analysis.curvature`.

    Attributes:
        step: the optimizer steps that the measured weights had taken; 0 before training.
        data: `train`, `eval`, `eval_NAME` for one of several evaluation datasets, or `other`.
        batches: the number over all processes, of up to `batch_size` examples; None if that is unknown.
        results: quantity -> its `value` and `standard_error`.
        options: quantity -> the numbers and switches among the arguments of its function, and whether it had a
            `preconditioner`.
    """

    step: int
    data: str
    batches: int
    batch_size: int | None
    results: dict[str, dict[str, float]]
    options: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Log:
    """The log of a run of `max_steps` steps, and the name of its best checkpoint."""

    history: History
    max_steps: int = 0
    best_checkpoint: str | None = None


@dataclass
class Record:
    """The content of `run.json`. Facts that an earlier version did not record have their default values.

    Attributes:
        method: that of the last start: whether `gr` and `ire` were on, and the class name of the `optimizer`.
        data: the training data, as far as known: `dataset_name` (for a local folder, which `is_local` marks, the last
            part of its path), `dataset_config_name`, `train_examples`.
        defaults: of the settings that some segments contain and others omit.
        evaluated: the names of the datasets in the last evaluation; "" for a single dataset without a name.
        ire_flat_fractions: kind of layer -> the fraction of its coordinates in IRE's last choice.
        ire_reduced_kappa: kappa after the divergence guard reduced it; None if it never did.
        layer_picture: the plot of the layer norms, if this run drew it.
        further: what a subclass of the trainer adds: `pictures`, further files to show -> their captions, and
            `barlow_twins`, the weight w of its loss and the k and T of its evaluation.
        sharpness: None if it was not measured.
        device: its name; `peak_memory_bytes` is its peak memory use.
        log: the one when `create_model_card` was called, which may be later than the last `trainer_state.json`.
    """

    method: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    format: int = FORMAT
    defaults: dict[str, Any] = field(default_factory=dict)
    model: ModelFacts | None = None
    optimizer: OptimizerFacts | None = None
    evaluated: list[str] | None = None
    ire_flat_fractions: dict[str, float] = field(default_factory=dict)
    ire_reduced_kappa: float | None = None
    layer_picture: str | None = None
    further: dict[str, Any] = field(default_factory=dict)
    sharpness: SharpnessFacts | None = None
    device: str | None = None
    peak_memory_bytes: int | None = None
    publication: Publication = Publication()
    log: Log | None = None

    def total(self, count: str) -> int | float:
        """The sum of a count over the segments; passes are exact to a millionth."""
        return round(sum(getattr(segment, count) for segment in self.segments), 6)

    def is_whole(self) -> bool:
        """Whether every step was recorded."""
        return len(self.recorded) == len(self.segments)

    @property
    def recorded(self) -> list[Segment]:
        """The segments whose settings and counts are known."""
        return [segment for segment in self.segments if segment.is_recorded]

    def segments_with(self, degree: str) -> list[Segment]:
        """The segments with a method turned on, that is `gr_lambda` or `ire_kappa` not 0."""
        return [segment for segment in self.recorded if segment.settings.get(degree, 0) != 0]

    def spans(self, attribute: str) -> list[Span]:
        """The values of an attribute of the segments, each with its steps."""
        return _spans(self.recorded, lambda segment: getattr(segment, attribute))

    def setting(self, name: str, segments: Iterable[Segment] | None = None) -> list[Span]:
        """The values of a setting in `segments` (default: all), each with its steps. Where omitted, its default."""
        default = self.defaults.get(name, "its default")
        segments = self.recorded if segments is None else segments
        return _spans(segments, lambda segment: segment.settings.get(name, default))


def _spans(segments: Iterable[Segment], value: Callable[[Segment], Any]) -> list[Span]:
    spans: list[Span] = []
    for segment in segments:
        if spans and spans[-1].value == value(segment):
            spans[-1] = spans[-1]._replace(last_step=segment.last_step)
        else:
            spans.append(Span(value(segment), segment.first_step, segment.last_step))
    return spans


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (old, new) of the settings that differ; "default" stands for an omitted one."""
    pairs = {name: (old.get(name, "default"), new.get(name, "default")) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# ---- Versions ----


def versions() -> dict[str, str]:
    """The versions of this library (with the commit of its checkout), of Python, and of `PACKAGES`."""
    commit = _commit()
    library = __version__ + (f" (commit {commit})" if commit else "")
    return {"hf_gr": library, "Python": platform.python_version(), **_installed(*PACKAGES)}


def _installed(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """The commit of the checkout this package runs from, marked if it has changes; None without a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


# ---- Files ----

_PARTS = {
    "model": ModelFacts,
    "optimizer": OptimizerFacts,
    "sharpness": SharpnessFacts,
    "publication": Publication,
    "log": Log,
}


def read_record(folder: str | Path) -> Record | None:
    """The record in an output folder or checkpoint; None if there is none.

    Raises:
        ValueError: it cannot be read, or was written by a later version of hf_gr.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version of hf_gr reads {FORMAT}")
        content["segments"] = [Segment(**segment) for segment in content["segments"]]
        parts = {name: kind(**content[name]) for name, kind in _PARTS.items() if content.get(name) is not None}
        return Record(**{**content, **parts})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Delete it; the steps so far then count as not recorded."
        ) from error


def write_record(record: Record, folder: str | Path) -> None:
    """Write `run.json` into `folder` atomically: a concurrent reader gets the old or the new file, complete."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(dataclasses.asdict(record), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it cannot be read, or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}). Give the output folder of a finished run."
        ) from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError(
            f"{path} is not valid JSON ({error}): it was probably cut off. Restore it, or delete its folder and "
            "run again."
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file of names and values; see `read_json`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} has {type(content).__name__} where names and values belong. Delete it and run again.")
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """The state of the run in `folder`, with its `log_history`.

    Raises:
        ValueError: there is none, or it is not in the format that `Trainer` writes.
    """
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {STATE}. Give the output folder of a finished run.")
    state = read_mapping(path)
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "step" in entry for entry in history):
        raise ValueError(f"{path}: log_history is not the list that Trainer writes. Give the output folder of a run.")
    return state


def read_history(folder: Path) -> History:
    """`log_history` of the run in `folder`; see `read_state`."""
    return read_state(folder)["log_history"]


def last_state(folder: Path) -> Path:
    """`folder`, or its last checkpoint if the run has not finished."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    folders = [folder, *sorted(checkpoints, key=lambda path: -int(path.name[11:]))]
    return next((path for path in folders if (path / STATE).is_file()), folder)


# ---- The log ----


def log_of(record: Record, folder: Path) -> Log:
    """The log in `record`, or else in the `trainer_state.json` of `folder` or of its last checkpoint.

    Raises:
        ValueError: there is none.
    """
    if record.log is not None:
        return record.log
    state = read_state(last_state(folder))
    best = state.get("best_model_checkpoint")
    return Log(state["log_history"], state.get("max_steps", 0), best and Path(best).name)


def last_entry(history: History, prefix: str) -> int:
    """Index of the last entry with a key that starts with `prefix`; -1 if there is none."""
    return max((i for i, entry in enumerate(history) if any(key.startswith(prefix) for key in entry)), default=-1)


def last_evaluation(history: History, count: int = 1) -> History:
    """The entries of the last evaluation, one for each of `count` datasets. See `evaluation_prefix`."""
    prefix = evaluation_prefix(history)
    return [entry for entry in history if any(key.startswith(prefix) for key in entry)][-count:]


def evaluation_prefix(history: History) -> str:
    """What the metrics of a run's result begin with: those of the test set, if it was evaluated apart."""
    return next((p for p in EVALUATIONS if last_entry(history, p) >= 0), EVALUATIONS[-1])
