"""A grid of runs of one script, each in a process of its own.

The folder of a run has its results when it is finished, and a lock while it is being run. Any number of workers, on any
machines that see the folder, can take part.
"""

import fcntl
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .grid_file import Grid
from .record import History, read_history, read_json, read_mapping
from .redaction import flag_name, redact, take_hub_tokens

logger = logging.getLogger(__name__)

#: `Run.settings`, in the folder of a run.
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Run:
    """One point of the grid: its coordinates, the command line that they make, and where its results go."""

    point: Mapping[str, Any]
    arguments: list[str]
    folder: Path
    #: What was given by --hub_token. The script gets the last by its environment, which no one else can read.
    hub_tokens: Sequence[str] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """The log is what a script writes last."""
        return (self.folder / "trainer_state.json").is_file() and (self.folder / "eval_results.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[int | None]:
        """The file descriptor of the lock, or None if another process has it.

        `flock` belongs to the open file: a child that inherits the descriptor holds the lock as long as it lives, also
        when this process is killed.
        """
        path = self.folder.parent / "locks" / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield descriptor if _try_to_lock(descriptor, path) else None
        finally:
            os.close(descriptor)  # not unlocked: that would take the lock from a child, too

    def is_locked(self) -> bool:
        with self.lock() as descriptor:
            return descriptor is None

    @property
    def settings(self) -> list[str]:
        """The arguments, without what depends on where they are given, and without secrets."""
        *arguments, _, _ = self.arguments
        return _as_settings(arguments, self.hub_tokens)

    def refuse_other_settings(self) -> None:
        """Raise `ValueError` if what is in the folder, or is on its way to it, was started with other ones."""
        path = self.folder / SETTINGS
        had = _as_settings(read_json(path)) if path.is_file() else []
        if had == self.settings or not (self.is_finished or (had and self._holds_work())):
            return
        differing = sorted({*had} ^ {*self.settings}) or ["their order"]
        raise ValueError(
            f"{self.folder} was run with other arguments (differing: {' '.join(differing)}), and its results are kept. "
            "Give the arguments it had, or another --output_dir."
        )

    def _holds_work(self) -> bool:
        return any(self.folder.glob("checkpoint-*")) or self.is_locked()

    def results(self) -> dict[str, float]:
        return read_mapping(self.folder / "all_results.json")

    def history(self) -> History:
        return read_history(self.folder)


def _try_to_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"output_dir={path.parent.parent}: its file system has no locks ({error.strerror}), by which workers keep "
            "out of each other's way. Choose a folder on another one."
        ) from error
    return True


def _as_settings(arguments: Iterable[str], hub_tokens: Iterable[str] = ()) -> list[str]:
    words, _ = take_hub_tokens(redact(map(str, arguments), hub_tokens))
    return [Path(word).name if word.endswith(".yaml") else word for word in words]


def expand(grid: Grid, folder: Path, recipes: Path, extra: Iterable[str] = ()) -> list[Run]:
    """All runs, seed by seed, so that an unfinished grid has whole comparisons.

    Args:
        folder: each run gets a folder in it, named after its coordinates.
        extra: further arguments of all runs; they overrule the grid's flags.

    Raises:
        ValueError: an argument has no effect, because the grid sets it for each run or because it is given twice.
    """
    extra, hub_tokens = take_hub_tokens(extra)
    extra = with_underscores(extra)
    _refuse_flags_without_effect(grid, extra)
    base = [str(recipes / grid.recipe)] if grid.recipe else []
    base += [*_as_arguments(grid.flags), *extra]
    dimensions: list[Iterable[Any]] = [*grid.axes.values(), list(grid.arms), grid.seeds]
    names = [folder_names(values) for values in dimensions]
    runs = []
    for seed, *values in itertools.product(grid.seeds, *grid.axes.values()):
        at = dict(zip(grid.axes, values, strict=True))
        for arm, flags in grid.arms.items():
            point = {**at, "arm": arm, "seed": seed}
            where = folder / "_".join(known[str(value)] for known, value in zip(names, point.values(), strict=True))
            arguments = [*base, *_as_arguments({**at, **flags, "seed": seed, "output_dir": where})]
            runs.append(Run(point, arguments, where, hub_tokens))
    return runs


def with_underscores(words: Iterable[str]) -> list[str]:
    """Flags as the grid spells them: `--gr-r=0.1` is `--gr_r=0.1`."""
    return [f"--{name}{word[2 + len(name) :]}" if (name := flag_name(word)) else word for word in words]


def _refuse_flags_without_effect(grid: Grid, extra: list[str]) -> None:
    given = [name.removeprefix("no_") for name in map(flag_name, extra) if name]
    own = {flag for flags in grid.arms.values() for flag in flags} | {*grid.axes, "seed", "output_dir"}
    if idle := sorted(set(given) & own):
        raise ValueError(
            f"--{', --'.join(idle)}: no effect, the grid sets it for each run. Use an axis, or another grid."
        )
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"--{', --'.join(twice)}: given twice, and only one can be in force. Leave the others out.")


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    return [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]


def folder_names(values: Iterable[Any]) -> dict[str, str]:
    """text of a value -> what stands for it in the name of a folder: its last part, and where that is the same for
    several values (also where case does not count) a hash."""
    short = {str(value): _as_name(value) for value in values}
    taken = [name.casefold() for name in short.values()]
    return {
        value: name if taken.count(name.casefold()) == 1 else f"{name}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
        for value, name in short.items()
    }


def _as_name(value: Any) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in str(value).rstrip("/").rsplit("/", 1)[-1])


def run_grid(
    script: Path,
    runs: list[Run],
    workers: int = 1,
    on_end: Callable[[Run, bool], None] = lambda run, went_well: None,
    launcher: Iterable[str] = (sys.executable,),
) -> None:
    """Run what is not finished, once. What a run prints goes to `log.txt` in its folder.

    Runs that are being run elsewhere, or here by what a killed worker has left behind, are waited for. They hold a
    lock, which the operating system takes back from a process that ends in whatever way.

    Args:
        workers: runs at a time in this process.
        on_end: called with each run that ends, and whether it went well. If it raises, no further run is started.
        launcher: what to start the script with.

    Raises:
        ValueError: a run that is finished or under way has other arguments.
    """
    for run in runs:
        run.refuse_other_settings()
    worker = _Worker(script, on_end, list(launcher))
    is_waiting = False
    while left := [run for run in runs if not run.is_finished and run.name not in worker.tried]:
        if worker.take_all(left, workers):
            continue
        if not is_waiting:
            logger.warning(f"Waiting for others, who are at work on {', '.join(run.name for run in left)}.")
        is_waiting = True
        time.sleep(1)
    for run in runs:
        run.refuse_other_settings()  # others may have run some of them in the meantime


@dataclass
class _Worker:
    script: Path
    on_end: Callable[[Run, bool], None]
    launcher: list[str]
    tried: set[str] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)

    def take_all(self, runs: list[Run], count: int) -> bool:
        """Run what nobody else is running, `count` at a time. Whether there was any."""
        before = len(self.tried)
        with ThreadPoolExecutor(count) as pool:
            try:
                for future in as_completed([pool.submit(self.take, run) for run in runs]):
                    future.result()
            finally:
                self.stop.set()  # after Ctrl-C what is under way may end, and nothing is begun
        self.stop.clear()
        return len(self.tried) > before

    def take(self, run: Run) -> None:
        with run.lock() as descriptor:
            if descriptor is None or run.is_finished or self.stop.is_set():
                return
            self.tried.add(run.name)
            try:
                self.on_end(run, _run(self.script, run, self.launcher, descriptor))
            except BaseException as error:
                self.stop.set()  # before this thread takes the next one
                logger.warning(f"{error} No further run is started; those under way are waited for.")
                raise


def _run(script: Path, run: Run, launcher: Iterable[str], lock: int) -> bool:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / SETTINGS).write_text(json.dumps(run.settings))
    # What a run that was not finished has left is in the way, unless it is to be continued.
    anew = [] if "resume_from_checkpoint" in map(flag_name, run.arguments) else ["--overwrite_output_dir", "True"]
    token = {"HF_TOKEN": run.hub_tokens[-1]} if run.hub_tokens else {}
    with (run.folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [*launcher, str(script), *run.arguments, *anew, "--disable_tqdm", "True"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ, **token},
            pass_fds=(lock,),
        )
    return done.returncode == 0
