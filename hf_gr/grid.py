"""A grid of runs of one script, each in a process of its own, handed out by optuna.

What is finished is told by the folder of a run, which has its results; optuna's storage says who takes the next one, so
that any number of workers, on any machines that share the storage and the folder, can take part.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

#: `Run.settings`, in the folder of a run.
SETTINGS = "settings.json"


@dataclass
class Grid:
    """Arms, which are compared with each other, at every combination of axes and seeds.

    Args:
        script: the training script, in the folder above that of the grid's file.
        arms: name -> flags that make it.
        baseline: the arm that the others are held against.
        metric: a key of the evaluation; of which less is better.
        percent: whether to show it times 100.
        recipe: what the script begins with, in `recipes` beside the script.
        flags: given to all runs.
        axes: flag -> values.
        published: `file` (columns table, model, dataset, optimizer, method, mean, std), `arms` (name -> method) and
            `names` (value of a flag -> name in the file).
        published_like: model, dataset and optimizer to look up where the runs themselves are of something else.
    """

    script: str
    arms: dict[str, dict[str, Any]]
    baseline: str
    metric: str = "eval_loss"
    percent: bool = False
    recipe: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    published: dict[str, Any] | None = None
    published_like: dict[str, str] | None = None

    def __post_init__(self):
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline!r}: choose one of the arms, {', '.join(self.arms)}.")
        for name, values in {**self.axes, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values}: list each value once, and at least one.")


def load_grid(path: Path, scale: str | None = None) -> Grid:
    """The grid in a YAML file. Under `scales` it has what changes with the size: recipe, flags, axes, seeds.

    Raises:
        ValueError: there is no such file or scale, or it has a key that is not known.
    """
    if not path.is_file():
        others = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"{path} does not exist. Give a file, or one of {others}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    scales = content.pop("scales", {})
    if scale is not None:
        if scale not in scales:
            raise ValueError(f"scale={scale!r}: {path.stem} has {', '.join(scales) or 'none'}.")
        content |= {key: {**content.get(key, {}), **value} if isinstance(value, dict) else value
                    for key, value in scales[scale].items()}  # fmt: skip
    if unknown := sorted(set(content) - {f.name for f in fields(Grid)}):
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}.")
    return Grid(**content)


@dataclass(frozen=True)
class Run:
    """One point of the grid: its coordinates, the command line that they make, and where its results go."""

    point: Mapping[str, Any]
    arguments: list[str]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """The log is what a script writes last."""
        return (self.folder / "trainer_state.json").is_file() and (self.folder / "eval_results.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process is the one to run it."""
        locks = self.folder.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / self.name, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_locked(self) -> bool:
        with self.lock() as is_ours:
            return not is_ours

    @property
    def settings(self) -> list[str]:
        """The arguments, without what depends on where they are given: the folder, and that of the recipe."""
        *arguments, _, _ = self.arguments
        return [Path(argument).name if argument.endswith(".yaml") else argument for argument in arguments]

    def refuse_other_settings(self) -> None:
        """Raise `ValueError` if what is in the folder was run with other ones."""
        if not self.is_finished:
            return
        path = self.folder / SETTINGS
        had = json.loads(path.read_text()) if path.is_file() else []
        if had != self.settings:
            differing = sorted({*had} ^ {*self.settings}) or ["their order"]
            raise ValueError(
                f"{self.folder} was run with other arguments (differing: {' '.join(differing)}), and finished runs are "
                "not run again. Give the arguments it had, or another --output_dir."
            )

    def results(self) -> dict[str, float]:
        return json.loads((self.folder / "all_results.json").read_text())

    def history(self) -> list[dict[str, float]]:
        return json.loads((self.folder / "trainer_state.json").read_text())["log_history"]


def expand(grid: Grid, folder: Path, recipes: Path, extra: Iterable[str] = ()) -> list[Run]:
    """All runs, seed by seed, so that an unfinished grid has whole comparisons.

    Args:
        folder: each run gets a folder in it, named after its coordinates.
        extra: further arguments of all runs; they overrule the grid's flags.

    Raises:
        ValueError: a flag is both an axis and of an arm, or given to all runs and one of those.
    """
    _refuse_flags_without_effect(grid, extra := list(extra))
    base = [str(recipes / grid.recipe)] if grid.recipe else []
    base += [*_as_arguments(grid.flags), *extra]
    runs = []
    for seed, *values in itertools.product(grid.seeds, *grid.axes.values()):
        at = dict(zip(grid.axes, values, strict=True))
        for arm, flags in grid.arms.items():
            point = {**at, "arm": arm, "seed": seed}
            where = folder / "_".join(_as_name(value) for value in point.values())
            arguments = [*base, *_as_arguments({**at, **flags, "seed": seed, "output_dir": where})]
            runs.append(Run(point, arguments, where))
    return runs


def _refuse_flags_without_effect(grid: Grid, extra: list[str]) -> None:
    in_arms = {flag for flags in grid.arms.values() for flag in flags}
    if both := sorted(in_arms & set(grid.axes)):
        raise ValueError(
            f"{', '.join(both)}: an axis has no effect on a flag that the arms set. Leave one of them out."
        )
    given = {argument[2:].split("=")[0] for argument in extra if argument.startswith("--")}
    if idle := sorted(given & (in_arms | set(grid.axes) | {"seed", "output_dir"})):
        raise ValueError(
            f"--{', --'.join(idle)}: no effect, the grid sets it for each run. Use an axis, or another grid."
        )


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    return [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]


def _as_name(value: Any) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in str(value).rstrip("/").rsplit("/", 1)[-1])


def run_grid(
    script: Path,
    runs: list[Run],
    storage: str,
    workers: int = 1,
    on_end: Callable[[Run, bool], None] = lambda run, went_well: None,
    launcher: Iterable[str] = (sys.executable,),
) -> None:
    """Run what is not finished, once. What a run prints goes to `log.txt` in its folder.

    A run that is being run, here or elsewhere, holds a lock, which the operating system takes back from a process that
    is killed; so its run is taken up again.

    Args:
        storage: a file, or the URL of a database, in which workers, here and elsewhere, see what is left to do.
        workers: runs at a time in this process.
        on_end: called with each run that ends, and whether it went well.
        launcher: what to start the script with.

    Raises:
        ValueError: a run that is finished had other arguments.
    """
    import optuna

    for run in runs:
        run.refuse_other_settings()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in storage:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    study = optuna.create_study(study_name="runs", storage=storage, load_if_exists=True)
    by_name = {run.name: run for run in runs}
    tried: set[str] = set()

    def objective(trial: optuna.Trial) -> float:
        run = by_name.get(trial.user_attrs.get("run"))
        if run is None:  # the queue was empty, and optuna has made one up; or it is of another grid
            raise optuna.TrialPruned
        with run.lock() as is_ours:
            if is_ours and not run.is_finished:
                tried.add(run.name)
                on_end(run, _run(script, run, launcher))
        return 0.0

    while left := [run for run in runs if not run.is_finished and run.name not in tried]:
        trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        waiting = {trial.user_attrs.get("run") for trial in trials}
        for run in left:
            if run.name not in waiting and not run.is_locked():
                study.enqueue_trial({}, user_attrs={"run": run.name})
                waiting.add(run.name)
        if waiting:
            study.optimize(objective, n_trials=len(waiting), n_jobs=min(workers, len(waiting)))
        else:  # others are at work on all that is left
            time.sleep(1)


def _run(script: Path, run: Run, launcher: Iterable[str]) -> bool:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / SETTINGS).write_text(json.dumps(run.settings))
    with (run.folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [*launcher, str(script), *run.arguments, "--disable_tqdm", "True"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
    return done.returncode == 0
