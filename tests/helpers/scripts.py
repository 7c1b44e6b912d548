"""A script given a bad input, in this process: what it says. No case may get as far as a step."""

import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from types import ModuleType
from unittest import mock

import pytest

from helpers import SCRIPTS, forks
from hf_gr.cli import script


def load_script(name: str) -> ModuleType:
    """The module of a script."""
    return importlib.import_module(f"hf_gr.scripts.{name}")


def launch(*arguments, processes=1, script="train_vit.py", has_launcher=False) -> str:
    """What a script prints, run by one or by two processes.

    Args:
        has_launcher: `accelerate launch` starts it with a shipped configuration, on any free port, as users do. Else it
            runs in forks, which is much faster.
    """
    path, arguments = SCRIPTS / script, [*map(str, arguments)]
    if not has_launcher:
        group = processes if processes > 1 else None
        return forks.run(forks.script, path, *arguments, processes=group, ACCELERATE_USE_CPU="true")
    config = SCRIPTS / "accelerate" / ("cpu.yaml" if processes == 1 else "cpu_ddp.yaml")
    command = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes),
               "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *command, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout


def error_line(main: Callable, argv: list, *cheaper: "mock._patch") -> str:
    """The one line that the script ends with. Fails unless the exit code is 2 and nothing was trained.

    Args:
        main: of a script.
        argv: its command line; the words may be paths or numbers.
        cheaper: patches that spare the cases what they do not need, e.g. of a slow loader.
    """
    printed = io.StringIO()
    training = AssertionError(f"{argv}: training started")
    with ExitStack() as stack:
        for trainer in ("transformers.Trainer", "hf_gr.GRTrainer"):
            stack.enter_context(mock.patch(f"{trainer}.training_step", side_effect=training))
        for patch in cheaper:
            stack.enter_context(patch)
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(printed))
        end = stack.enter_context(pytest.raises(SystemExit))
        script.run(main, [str(word) for word in argv])
    text = printed.getvalue()
    assert end.value.code == 2, text
    lines = [line for line in text.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in text, text
    return lines[0]


def check(main: Callable, argv: list, *words: str, cheaper: tuple = ()) -> None:
    """The line names every one of `words`: flag, value and what to do."""
    line = error_line(main, argv, *cheaper)
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"
