"""How scripts report errors: one line on stderr and an exit code, not a traceback."""

import argparse
import difflib
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import str_to_bool
from accelerate.utils.environment import get_int_from_env
from tqdm.auto import tqdm
from transformers import HfArgumentParser

TRACEBACK_VARIABLE = "HF_GR_TRACEBACK"
#: Seconds that other processes wait for the main one to report the same error.
HEAD_START = 10
#: Characters kept of a library's message: some list every supported name.
MAX_REASON = 400
_WORKER = "in DataLoader worker process"
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_REMEDIES = {
    r"(invalid float value: .*)": r"\1. Give a number.",
    r"(invalid int value: .*)": r"\1. Give a whole number.",
    r"(expected (?:one|at least one|\d+) arguments?)": r"\1. Write the value after the flag.",
}


@contextmanager
def extra(name: str) -> Iterator[None]:
    """For imports of packages that an extra of hf_gr installs: the error about a missing one names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f"It comes with the extra {name!r}: pip install 'hf_gr[{name}]'"
        raise ModuleNotFoundError(f"{error.name} is not installed. {remedy}", name=error.name) from None


class Failure(RuntimeError):
    """A failure that is not the user's mistake, and that one line explains as well as a traceback."""


#: Exceptions that end a script with one line and exit code 2: the user can fix the cause.
MISTAKES = (ValueError, OSError, ImportError)
#: Exceptions that end it with one line and exit code 1. All others show their traceback.
FAILURES = (Failure, FloatingPointError)


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Call `main` with the command line; on a mistake or failure, end the process with one line `error: ...`.

    Exit code 0: success; 2: the user's mistake; 1: anything else. `--traceback` or HF_GR_TRACEBACK=1 shows the
    traceback instead. Of several processes the main one reports the error. Another one does only if it is still alive
    `HEAD_START` seconds later, because the main one did not encounter it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    shows_traceback = "--traceback" in argv or str_to_bool(os.environ.get(TRACEBACK_VARIABLE) or "0")
    try:
        main([word for word in argv if word != "--traceback"])
    except (*MISTAKES, *FAILURES) as error:
        if shows_traceback:
            traceback.print_exc()
        else:
            _report(error, main)
        sys.exit(2 if isinstance(error, MISTAKES) else 1)


def _report(error: Exception, main: Callable) -> None:
    rank = get_int_from_env(_RANKS, 0)
    source = ""
    if rank:
        time.sleep(HEAD_START)
        source = f"process {rank}: "
    # tqdm first clears its progress bars from the line.
    tqdm.write(f"error: {source}{one_line(error)}{_origin(error, main)}", file=sys.stderr)
    sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """The message of `error`, or its type if it has none."""
    message = str(error)
    if _WORKER in message:  # PyTorch replaces the message with the worker's traceback
        message = message.rpartition(f"\n{type(error).__name__}: ")[2]
    return " ".join(message.split()) or type(error).__name__


def _origin(error: Exception, main: Callable) -> str:
    """Where an error was raised, if not in our own code: its message alone may not explain it."""
    if _WORKER in str(error):
        return ""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    path = Path(next(name for name in reversed(frames) if not name.startswith("<")))
    package, script = Path(__file__).parent, Path(main.__code__.co_filename)
    if package in path.parents or path.parent == script.parent:
        return ""
    return f" ({type(error).__name__} in {path.parent.name}/{path.name}; --traceback shows all)"


@contextmanager
def explained(problem: str, remedy: str) -> Iterator[None]:
    """Turn any exception of a library into a `ValueError`: "PROBLEM (its error). REMEDY"

    Args:
        problem: what failed, with flag and value: "model_name_or_path='x' could not be loaded".
    """
    try:
        yield
    except Exception as error:  # a name fails in many ways: wrong path, no network, a broken file
        message = textwrap.shorten(f"{type(error).__name__}: {one_line(error)}", MAX_REASON, placeholder=" ...")
        raise ValueError(f"{problem} ({message.rstrip('.')}). {remedy}") from error


class _Ignored(argparse.Action):
    def __call__(self, *_: Any) -> None:
        pass


class ArgumentParser(HfArgumentParser):
    """For dataclasses or plain arguments: mistakes raise a one-line `ValueError`, and flags cannot be abbreviated."""

    def __init__(self, dataclass_types: Any = None, **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        help_ = f"Show the traceback of an error, not only one line; {TRACEBACK_VARIABLE}=1 does the same."
        self.add_argument("--traceback", action=_Ignored, nargs=0, default=argparse.SUPPRESS, help=help_)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message.removeprefix("argument "))
        for pattern, remedy in _REMEDIES.items():
            message = re.sub(pattern, remedy, message)
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return parsed

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        # Before the dataclasses check the values: a misspelled flag may be why one is wrong.
        self.refuse(self.parse_known_args(args)[1])
        return super().parse_args_into_dataclasses(args, look_for_args_file=False, **kwargs)

    def refuse(self, words: Sequence[str]) -> None:
        """Raise `ValueError` if there are `words`, which the parser did not recognize."""
        flags = [word.split("=")[0] for word in words if word.startswith("-")]
        if flags:
            raise ValueError(f"{flags[0]}: there is no such flag. {self._suggestion(flags[0])}")
        if words:
            raise ValueError(f"{words[0]!r} belongs to no flag. Write --FLAG VALUE; a recipe comes first.")

    def refuse_unknown(self, flags: Iterable[str]) -> None:
        """Raise `ValueError` if one of `flags` is none of the parser's."""
        self.refuse([f"--{flag}" for flag in flags if f"--{flag}" not in self._option_string_actions])

    def _suggestion(self, flag: str) -> str:
        names = [option[2:] for action in self._actions for option in action.option_strings[:1]]
        wrong = flag.lstrip("-").replace("-", "_")
        completions = [name for name in names if name.startswith(wrong)]
        similar = completions[:3] or difflib.get_close_matches(wrong, names, n=1)
        if not similar:
            return "See --help for all flags."
        return f"Did you mean {' or '.join('--' + name for name in similar)}?"
