"""Processes that have their imports behind them: forks of a server, which each process of pytest starts at most once.

To import Trainer takes a process some ten seconds, more than most of what is run here. Nothing has been computed in the
server, so that a fork is like a process that has only just imported the same modules.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from helpers import SCRIPTS

#: What the forks need, and what Trainer and scripts would import while they run.
PRELOADED = [
    *("helpers.distributed_worker", "helpers.faults_worker"),
    *(f"hf_gr.scripts.{path.stem}" for path in SCRIPTS.glob("*_*.py")),
    *(f"transformers.models.{name}" for name in ("vit.modeling_vit", "llama.modeling_llama")),
    *("matplotlib.pyplot", "peft", "sklearn.datasets"),
]
#: Seconds, for what takes some on an idle machine.
PATIENCE = 1800


@cache
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    # The server finds modules by the first alone, and libraries read the others as they are imported.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return found


def start(target: Callable, *args, **kwargs) -> BaseProcess:
    """`target(*args, **kwargs)` in a fork."""
    fork = context().Process(target=_start, args=(target, *args), kwargs=kwargs)
    fork.start()
    return fork


def _start(target: Callable, *args, **kwargs) -> None:
    gc.freeze()  # as conftest.py does
    target(*args, **kwargs)


def run(target: Callable, *args, processes: int | None = None, **environment: str) -> str:
    """What `target(*args)` prints in a fork alone, or in so many that form a group, as those of torchrun do.

    Raises:
        AssertionError: a process has failed. The others are killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ranks = [{}]
    if processes is not None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [group_of(store.port, rank, processes) for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(len(ranks))]
        codes = ended([
            start(_call, log, {**environment, **rank}, target, args) for log, rank in zip(logs, ranks, strict=True)
        ])  # fmt: skip
        printed = [log.with_suffix(kind).read_text() for kind in (".out", ".err") for log in logs]
    assert not any(codes), f"exit codes {codes}\n" + "".join(text[-2500:] for text in printed)
    return "".join(printed)


def group_of(port: int, rank: int, processes: int) -> dict[str, str]:
    """The environment of a process of a group. The store is another's, so that the port is certain to be free."""
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {**store, "TORCHELASTIC_RESTART_COUNT": "0", **{name: str(value) for name, value in place.items()}}


def ended(forks: list[BaseProcess]) -> list[int | None]:
    """Their exit codes. Once one has failed, or if none ends for a long time, those that are left are killed."""
    left = {fork.sentinel: fork for fork in forks}
    while left:
        ready = connection.wait(left, PATIENCE)
        for sentinel in ready:
            left.pop(sentinel).join()
        if not ready or any(fork.exitcode for fork in forks):
            for fork in left.values():
                fork.kill()
    return [fork.exitcode for fork in forks]


def _call(log: Path, environment: dict[str, str], target: Callable, args: tuple) -> None:
    for stream, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(kind), os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def script(path: Path, *argv: str) -> None:
    """To be run: the script at `path`, as `python PATH ARGV...` runs it."""
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")
