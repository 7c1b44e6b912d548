"""What is installed here: the environment of a bug report, and the optimizers that `--optim` knows."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim import OPTIMIZERS
from ..optimizer_factory import list_optimizers
from ..reporting.record import versions

#: Beside those of `versions`.
PACKAGES = ("huggingface_hub", "numpy", "safetensors", "evaluate", "scikit-learn", "pillow", "matplotlib", "optuna")
BACKENDS = ("gloo", "nccl", "mpi", "xccl", "ucc")


def environment() -> dict[str, str]:
    """What a bug report needs: versions, the platform, devices, threads and the backends of torch.distributed."""
    backends = [name for name in BACKENDS if distributed.is_available() and distributed.is_backend_available(name)]
    return {
        **versions(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": ", ".join(_devices()),
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "torch.distributed": ", ".join(backends) or "not available",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda = f"CUDA {torch.version.cuda}" if gpus else "no CUDA device"
    return [cuda, *gpus, *(["MPS"] if torch.backends.mps.is_available() else [])]


def optimizers() -> dict[str, str]:
    """Each value of `--optim` -> what it is, or what is missing here."""
    return {name: about if name in OPTIMIZERS else _about(name) for name, about in list_optimizers().items()}


def _about(name: str) -> str:
    """The class behind a name of transformers. Where it cannot be imported, the command in transformers' error."""
    args: Any = SimpleNamespace(**{flag: f.default for flag, f in TrainingArguments.__dataclass_fields__.items()})
    args.optim, args.learning_rate, args.optim_target_modules = OptimizerNames(name), 0.1, "all-linear"
    try:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(args, nn.Linear(1, 1))  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        command = re.search(r"`(pip install .*?)\.?`", str(error))
        return f"not installed: {command.group(1) if command else error}"
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"
