"""A grid of runs of one script, each in its own process.

The folder of a run contains its results once it is finished; its lock is held while it runs. Any number of workers, on
any machines that share the folder, can take part.
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

#: The file of `Run.settings` in the folder of a run.
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Run:
    """One point of the grid: its coordinates, the command line they define, and the folder of its results."""

    #: None on an axis that the arm sets or ignores.
    point: Mapping[str, Any]
    arguments: list[str]
    folder: Path
    #: The values of --hub_token. The script gets the last in its environment, which other users cannot read.
    hub_tokens: Sequence[str] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        """A script writes the log last."""
        return (self.folder / "trainer_state.json").is_file() and (self.folder / "eval_results.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[int | None]:
        """The file descriptor of the lock, or None if another process holds it.

        `flock` belongs to the open file: a child that inherits the descriptor holds the lock as long as it lives, even
        if this process is killed.
        """
        path = self.folder.parent / "locks" / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield descriptor if _try_to_lock(descriptor, path) else None
        finally:
            os.close(descriptor)  # not unlocked: that would also release the lock of a child

    def is_locked(self) -> bool:
        with self.lock() as descriptor:
            return descriptor is None

    @property
    def settings(self) -> list[str]:
        """The arguments without secrets and without the folders that depend on the machine."""
        *arguments, _, _ = self.arguments
        return _as_settings(arguments, self.hub_tokens)

    def refuse_other_settings(self) -> None:
        """Raise `ValueError` if a run with other settings has finished, made progress, or is running in the folder."""
        path = self.folder / SETTINGS
        recorded = _as_settings(read_json(path)) if path.is_file() else []
        if recorded == self.settings or not (self.is_finished or (recorded and self._has_progress())):
            return
        differing = sorted({*recorded} ^ {*self.settings}) or ["their order"]
        raise ValueError(
            f"{self.folder} was run with other arguments (differing: {' '.join(differing)}), and its results are kept. "
            "Give the same arguments, or another --output_dir."
        )

    def _has_progress(self) -> bool:
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
            f"output_dir={path.parent.parent}: its file system does not support locks ({error.strerror}), "
            "which keep workers from starting the same run. Choose a folder on another one."
        ) from error
    return True


def _as_settings(arguments: Iterable[str], hub_tokens: Iterable[str] = ()) -> list[str]:
    words, _ = take_hub_tokens(redact(map(str, arguments), hub_tokens))
    return [Path(word).name if word.endswith(".yaml") else word for word in words]


def expand(grid: Grid, folder: Path, recipes: Path, extra: Iterable[str] = ()) -> list[Run]:
    """All runs, seed by seed, so that an unfinished grid contains complete comparisons.

    Args:
        folder: each run gets a subfolder, named after its coordinates.
        extra: further arguments of all runs; they override the grid's flags.

    Raises:
        ValueError: an argument has no effect, because the grid sets it for each run or it is given twice.
    """
    extra, hub_tokens = take_hub_tokens(extra)
    extra = with_underscores(extra)
    _refuse_flags_without_effect(grid, extra)
    base = [str(recipes / grid.recipe)] if grid.recipe else []
    base += [*_as_arguments(grid.flags), *extra]
    dimensions: dict[str, Iterable[Any]] = {**grid.axes, "arm": grid.arms, "seed": grid.seeds}
    names = {name: folder_names(values) for name, values in dimensions.items()}
    runs: dict[Path, Run] = {}
    for seed, *values in itertools.product(grid.seeds, *grid.axes.values()):
        on_axes = dict(zip(grid.axes, values, strict=True))
        for arm, flags in grid.arms.items():
            used = {axis: value for axis, value in on_axes.items() if axis not in grid.fixed_by(arm)}
            point = {**dict.fromkeys(on_axes), **used, "arm": arm, "seed": seed}
            path = folder / "_".join(names[key][str(value)] for key, value in point.items() if value is not None)
            arguments = [*base, *_as_arguments({**used, **flags, "seed": seed, "output_dir": path})]
            runs[path] = Run(point, arguments, path, hub_tokens)
    return list(runs.values())


def with_underscores(words: Iterable[str]) -> list[str]:
    """Flags in the spelling of the grid: `--gr-r=0.1` becomes `--gr_r=0.1`."""
    return [f"--{name}{word[2 + len(name) :]}" if (name := flag_name(word)) else word for word in words]


def _refuse_flags_without_effect(grid: Grid, extra: list[str]) -> None:
    given = [name.removeprefix("no_") for name in map(flag_name, extra) if name]
    set_by_grid = {flag for flags in grid.arms.values() for flag in flags} | {*grid.axes, "seed", "output_dir"}
    if ignored := sorted(set(given) & set_by_grid):
        raise ValueError(
            f"--{', --'.join(ignored)}: no effect, the grid sets it for each run. Use an axis, or another grid."
        )
    if repeated := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"--{', --'.join(repeated)}: given twice, but only one can apply. Leave the others out.")


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    return [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]


def folder_names(values: Iterable[Any]) -> dict[str, str]:
    """Text of a value -> its part of a folder name: the last part of its path, with a hash where several values share
    that part (ignoring case, as some file systems do)."""
    short = {str(value): _as_name(value) for value in values}
    taken = [name.casefold() for name in short.values()]
    return {
        value: name if taken.count(name.casefold()) == 1 else f"{name}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
        for value, name in short.items()
    }


def _as_name(value: Any) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in str(value).rstrip("/").rsplit("/", 1)[-1])


def run_grid(
    script: str | Path,
    runs: list[Run],
    workers: int = 1,
    on_end: Callable[[Run, bool], None] = lambda run, succeeded: None,
    launcher: Iterable[str] = (sys.executable,),
) -> None:
    """Run each unfinished run once. Its output goes to `log.txt` in its folder.

    Waits for runs that other workers, or the surviving children of killed ones, are running. These hold a lock, which
    the operating system releases however a process ends.

    Args:
        script: its file; or, with a launcher that ends with `-m`, its module.
        workers: the number of runs at a time in this process.
        on_end: called with each run that ends and whether it succeeded. If it raises, no further run is started.
        launcher: the command that starts the script.

    Raises:
        ValueError: a finished or running run has other arguments.
    """
    for run in runs:
        run.refuse_other_settings()
    worker = _Worker(script, on_end, list(launcher))
    is_waiting = False
    while remaining := [run for run in runs if not run.is_finished and run.name not in worker.tried]:
        if worker.take_all(remaining, workers):
            continue
        if not is_waiting:
            logger.warning(f"Waiting for other workers, which are running {', '.join(run.name for run in remaining)}.")
        is_waiting = True
        time.sleep(1)
    for run in runs:
        run.refuse_other_settings()  # other workers may have run some of them in the meantime


@dataclass
class _Worker:
    script: str | Path
    on_end: Callable[[Run, bool], None]
    launcher: list[str]
    tried: set[str] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)

    def take_all(self, runs: list[Run], count: int) -> bool:
        """Run those that no other worker is running, `count` at a time; returns whether there were any."""
        before = len(self.tried)
        with ThreadPoolExecutor(count) as pool:
            try:
                for future in as_completed([pool.submit(self.take, run) for run in runs]):
                    future.result()
            finally:
                self.stop.set()  # after Ctrl-C, runs in progress may finish, and no other starts
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
                logger.warning(f"{error} No further run is started; waiting for those in progress.")
                raise


def _run(script: str | Path, run: Run, launcher: Iterable[str], lock: int) -> bool:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / SETTINGS).write_text(json.dumps(run.settings))
    # The files of an unfinished run are in the way, unless it is to be resumed.
    overwrite = [] if "resume_from_checkpoint" in map(flag_name, run.arguments) else ["--overwrite_output_dir", "True"]
    token = {"HF_TOKEN": run.hub_tokens[-1]} if run.hub_tokens else {}
    with (run.folder / "log.txt").open("w") as log:
        result = subprocess.run(
            [*launcher, str(script), *run.arguments, *overwrite, "--disable_tqdm", "True"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ, **token},
            pass_fds=(lock,),
        )
    return result.returncode == 0
