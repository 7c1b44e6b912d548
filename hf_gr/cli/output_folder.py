"""An output folder belongs to one run: to one at a time, and never with the results of another."""

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

from ..reporting.record import FILE
from ..trainer.checkpoints import LAST, SUPERSEDED, checkpoints

logger = logging.getLogger(__name__)

#: What begins with an underscore is not uploaded.
LOCK, HOLDER = "_lock", "_lock.json"
#: Seconds that the processes which a killed run has started, such as those of its data loader, may outlive it.
GRACE = 30
#: What a run leaves besides its checkpoints, and what makes a folder that of a run.
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
)
#: What describes the results, and goes with them.
DESCRIPTIONS = ("README.md", ".eval_results", "curves.png", "layer_statistics.*", "merged", SUPERSEDED)


@contextmanager
def claim_output_folder(args: TrainingArguments, overwrite: bool = False) -> Iterator[None]:
    """Within, the output folder is this run's: no other run, on any machine that sees the folder, can claim it.

    Of several processes the main one takes the lock. The operating system takes it back from a process that is killed.

    Args:
        args: the arguments of the run, which say where it writes and what it resumes from.
        overwrite: whether the results of another run may be there. They stay until `clear` is called.

    Raises:
        ValueError: on all processes: the folder cannot be written to, another run is at work in it, or it holds the
            results of one and there is neither `overwrite` nor a checkpoint in it to resume from.
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
    """Locked, by flock, which Linux hands on to the server of NFS; None where the file system has no locks."""
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
        who = "process {pid} on {host}, since {since}".format(**_holder(folder))
        raise ValueError(
            f"output_dir={folder}: another run is at work in this folder ({who}). Wait for its end, or choose another "
            "folder."
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning(f"output_dir={folder} has no lock ({error}). Make sure that no other run writes here.")
        return None
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    return lock


def _holder(folder: Path) -> dict[str, str | int]:
    unknown: dict[str, str | int] = {"pid": "unknown", "host": "an unknown machine", "since": "an unknown time"}
    try:
        return unknown | json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it has the lock and has not yet said so
        return unknown


def _is_alive(holder: dict[str, str | int]) -> bool:
    """Whether it may be: of processes on other machines nobody knows here."""
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
    asked, folder = args.resume_from_checkpoint, Path(str(args.output_dir)).resolve()
    if asked in LAST:
        return bool(checkpoints(folder))
    return asked is not None and folder in Path(asked).resolve().parents


def _refuse_overwriting_what_is_resumed(args: TrainingArguments, overwrite: bool) -> None:
    if overwrite and (args.resume_from_checkpoint in LAST or _resumes_here(args)):
        raise ValueError(
            "overwrite_output_dir=True: it would remove the checkpoints that resume_from_checkpoint="
            f"{args.resume_from_checkpoint} asks for. Leave one of them out."
        )


def _refuse_results(args: TrainingArguments) -> None:
    folder = str(args.output_dir)
    found = results(folder)
    if not found or _resumes_here(args):
        return
    named = ", ".join(p.name for p in found[:3]) + (", ..." if len(found) > 3 else "")
    continued = "continue it with --resume_from_checkpoint last, " if checkpoints(folder) else ""
    raise ValueError(
        f"output_dir={folder}: the folder has the results of another run ({named}). Choose another one, "
        f"{continued}or remove them with --overwrite_output_dir."
    )


def results(folder: str | Path) -> list[Path]:
    """What a run has left in `folder`: checkpoints, weights and records."""
    return [*checkpoints(folder), *sorted(p for pattern in RESULTS for p in Path(folder).glob(pattern))]


def _everything(folder: str | Path) -> list[Path]:
    return [*results(folder), *(p for pattern in DESCRIPTIONS for p in Path(folder).glob(pattern))]


def refuse_removing(folder: str | Path, sources: Iterable[str]) -> None:
    """Raise `ValueError` if one of `sources`, names and paths of what a run starts from, would go with `clear`."""
    targets = [target.resolve() for target in _everything(folder)]
    for source in filter(None, sources):
        path = Path(source).resolve()
        if targets and (path == Path(folder).resolve() or not {path, *path.parents}.isdisjoint(targets)):
            raise ValueError(
                f"overwrite_output_dir=True: {source}, which this run starts from, would be removed with what is in "
                f"{folder}. Choose another output_dir."
            )


def clear(folder: str | Path) -> None:
    """Remove what an earlier run has left in `folder`, and nothing else."""
    targets = _everything(folder)
    for target in targets:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    if targets:
        logger.warning(f"overwrite_output_dir=True: removed from {folder}: {', '.join(p.name for p in targets)}.")


def require_writable(output_dir: str) -> None:
    """Raise `ValueError` if `output_dir` cannot be made or written to: before the data is loaded, not after."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"output_dir={output_dir!r} cannot be written to ({error}). Choose another folder.") from error
