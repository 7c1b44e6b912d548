"""What a result says of where it comes from."""

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

from hf_gr import __version__

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The short hash of the checkout, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def versions() -> list[str]:
    return [
        f"hf_gr {__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"Python {platform.python_version()}",
    ]


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().split("model name\t: ")[1:] if cpuinfo.exists() else []
    name = models[0].partition("\n")[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"


def load() -> str:
    """Processes that were running or waiting, on average over 1, 5 and 15 minutes."""
    return ", ".join(f"{average:.2f}" for average in os.getloadavg())
