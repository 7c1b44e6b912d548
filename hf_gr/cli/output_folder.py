"""An output folder belongs to one run at a time, and never mixes the results of two."""

import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from ..reporting.record import FILE, FRONTIER
from ..trainer.checkpoints import LAST, SUPERSEDED, checkpoints

logger = logging.getLogger(__name__)

#: Files whose names begin with an underscore are not uploaded.
LOCK, HOLDER = "_lock", "_lock.json"
#: Seconds by which child processes of a killed run, such as data loader workers, may outlive it.
GRACE = 30
#: Files that a run writes besides its checkpoints, and by which its folder is recognized.
RESULTS = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.*",
    "pytorch_model*.bin",
    "training_args.bin",
    "trainer_state.json",
    "*_results.json",
    FILE,
    FRONTIER,
)
#: Files that describe the results, and are removed with them.
DESCRIPTIONS = (
    "README.md",
    ".eval_results",
    "curves.png",
    "layer_statistics.*",
    "views.png",
    "cross_correlation.png",
    "backbone",
    "merged",
    SUPERSEDED,
)


@contextmanager
def claim_output_folder(args: TrainingArguments, overwrite: bool = False) -> Iterator[None]:
    """Inside this context no other run, on any machine that shares the output folder, can claim it.

    The main process holds the lock; the operating system releases the lock of a killed process.

    Args:
        args: determine where the run writes and what it resumes from.
        overwrite: whether the folder may contain the results of another run. They stay until `clear` is called.

    Raises:
        ValueError: on all processes: the folder cannot be written to, another run is using it, or it contains results
            that this run neither may overwrite nor resumes from.
    """
    folder, lock, problem = str(args.output_dir), None, None
    if args.process_index == 0:
        try:
            require_writable(folder)
            _refuse_overwriting_what_is_resumed(args, overwrite)
            lock = _lock(Path(folder))
            if not overwrite:
                _refuse_results(args)
        except (ValueError, OSError) as error:
            problem = str(error)
    (problem,) = broadcast_object_list([problem])
    try:
        if problem is not None:
            raise ValueError(problem)
        yield
    finally:
        if lock is not None:
            Path(folder, HOLDER).unlink(missing_ok=True)
            lock.release()


def _lock(folder: Path) -> FileLock | None:
    """An acquired flock, which Linux forwards to NFS servers; None where the file system has no locks."""
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = _holder(folder)
            if _is_alive(holder):
                raise
            lock.acquire(timeout=GRACE)
    except Timeout:
        owner = "process {pid} on {host}, since {since}".format(**_holder(folder))
        raise ValueError(
            f"output_dir={folder}: another run is using this folder ({owner}). Wait until it ends, or choose another."
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning(f"output_dir={folder} cannot be locked ({error}). Make sure that no other run writes to it.")
        return None
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    return lock


def _holder(folder: Path) -> dict[str, str | int]:
    unknown: dict[str, str | int] = {"pid": "unknown", "host": "an unknown machine", "since": "an unknown time"}
    try:
        return unknown | json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run that has just acquired the lock has not written it yet
        return unknown


def _is_alive(holder: dict[str, str | int]) -> bool:
    """Whether the process may still be running; on another machine it always may."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _resumes_here(args: TrainingArguments) -> bool:
    checkpoint, folder = args.resume_from_checkpoint, Path(str(args.output_dir)).resolve()
    if checkpoint in LAST:
        return bool(checkpoints(folder))
    return checkpoint is not None and folder in Path(checkpoint).resolve().parents


def _refuse_overwriting_what_is_resumed(args: TrainingArguments, overwrite: bool) -> None:
    if overwrite and (args.resume_from_checkpoint in LAST or _resumes_here(args)):
        raise ValueError(
            "overwrite_output_dir=True: this would remove the checkpoints that resume_from_checkpoint="
            f"{args.resume_from_checkpoint} needs. Leave one of them out."
        )


def _refuse_results(args: TrainingArguments) -> None:
    folder = str(args.output_dir)
    found = results(folder)
    if not found or _resumes_here(args):
        return
    names = ", ".join(p.name for p in found[:3]) + (", ..." if len(found) > 3 else "")
    resume = "resume it with --resume_from_checkpoint last, " if checkpoints(folder) else ""
    raise ValueError(
        f"output_dir={folder}: the folder contains the results of another run ({names}). Choose another folder, "
        f"{resume}or remove them with --overwrite_output_dir."
    )


def results(folder: str | Path) -> list[Path]:
    """The checkpoints, weights and records of a run in `folder`."""
    return [*checkpoints(folder), *sorted(p for pattern in RESULTS for p in Path(folder).glob(pattern))]


def _everything(folder: str | Path) -> list[Path]:
    return [*results(folder), *(p for pattern in DESCRIPTIONS for p in Path(folder).glob(pattern))]


def refuse_removing(folder: str | Path, sources: Iterable[str]) -> None:
    """Raise `ValueError` if `clear` would remove one of `sources`, the names and paths that a run starts from."""
    targets = [target.resolve() for target in _everything(folder)]
    for source in filter(None, sources):
        path = Path(source).resolve()
        if targets and (path == Path(folder).resolve() or not {path, *path.parents}.isdisjoint(targets)):
            raise ValueError(
                f"overwrite_output_dir=True: this would remove {source}, from which this run starts, with the results "
                f"in {folder}. Choose another output_dir."
            )


def clear(folder: str | Path) -> None:
    """Remove the results of an earlier run, and nothing else, from `folder`."""
    targets = _everything(folder)
    for target in targets:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    if targets:
        logger.warning(f"overwrite_output_dir=True: removed from {folder}: {', '.join(p.name for p in targets)}.")


def require_writable(output_dir: str) -> None:
    """Raise `ValueError` if `output_dir` cannot be created or written to, before the data is loaded."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"output_dir={output_dir!r} cannot be written to ({error}). Choose another folder.") from error
