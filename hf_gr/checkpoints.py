"""Resuming loses nothing: a checkpoint is read whole, into every weight, or not at all.

`Trainer` loads a checkpoint with `load_state_dict(strict=False)` and only warns about names that do not match. Model
classes whose weights are stored under other names than they have in memory (ViT, Swin) then go on with the weights
they were initialized with.
"""

import copy
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)  # accelerate's speaks only once there is an accelerator
#: What the weights and the state of the optimizer may be called: whole, or in parts (FSDP).
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model*.bin",
    "pytorch_model_fsdp_*/.metadata",
)
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata")
#: Left by transformers while it writes a checkpoint on SIGTERM (`enable_jit_checkpoint`).
INCOMPLETE = "checkpoint-is-incomplete.txt"


def check_checkpoint(folder: str) -> None:
    """Raise `ValueError` if a file of the checkpoint is missing or cut short, before anything of it is loaded."""
    path = Path(folder)
    others = ", ".join(sorted(p.name for p in path.parent.glob("checkpoint-*") if p != path)) or "none"
    advice = f"Resume from another checkpoint (beside it: {others}), or start without resume_from_checkpoint."
    if problem := _why_incomplete(path):
        raise ValueError(f"resume_from_checkpoint={folder}: {problem}. {advice}")


def last_complete_checkpoint(output_dir: str, world_size: int = 1) -> str | None:
    """The last checkpoint in `output_dir` of which nothing is missing or cut short; None if there is none.

    A later one that a killed run has left half written is named in a warning. Each of the `world_size` processes must
    have written its random state.
    """
    found = {int(p.name.removeprefix("checkpoint-")): p for p in Path(output_dir).glob("checkpoint-*") if _has_step(p)}
    for step in sorted(found, reverse=True):
        problem = _why_incomplete(found[step], world_size)
        if problem is None:
            return str(found[step])
        logger.warning(f"{found[step]} is not used: {problem}.")
    return None


def _has_step(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()


def _why_incomplete(path: Path, world_size: int | None = None) -> str | None:
    """What is missing or unreadable in a checkpoint; None if it is whole. Without a `world_size`, that of the run that
    wrote it does not matter."""
    if not path.is_dir():
        return "there is no such folder"
    random = [f"rng_state_{rank}.pth" for rank in range(world_size or 0)] if world_size != 1 else ["rng_state.pth"]
    # In the order in which they are written: the weights come first, the state comes last.
    needed = (WEIGHTS, OPTIMIZERS, ("scheduler.pt",), *((name,) for name in random), ("trainer_state.json",))
    for names in needed:
        if not any(True for name in names for _ in path.glob(name)):
            return (
                f"{names[0]} is missing; the checkpoint is incomplete, or was written with save_only_model, and cannot "
                "be resumed from"
            )
    for file in sorted(path.iterdir()):
        if problem := _what_is_wrong_with(file):
            return (
                f"{file.name} cannot be read ({problem}); the run was probably stopped while the checkpoint was written"
            )
    return None


def _what_is_wrong_with(file: Path) -> str | None:
    """Why a file of a checkpoint is unreadable, from its headers alone; None if it looks whole."""
    try:
        if file.name == INCOMPLETE:
            return "it is there as long as a checkpoint is being written"
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            return "not a complete PyTorch archive"
    except (SafetensorError, ValueError, OSError) as error:
        return str(error)
    return None


@contextmanager
def explain_failed_save(folder: str) -> Iterator[None]:
    """Turn what goes wrong in writing a checkpoint, a full disk above all, into an error that says what is left."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if _why_incomplete(Path(folder)) is None:
            raise  # the checkpoint is there: something after it has failed
        others = sorted(p.name for p in Path(folder).parent.glob("checkpoint-*") if p.name != Path(folder).name)
        raise OSError(
            f"{folder} could not be written: {error}. It is incomplete and will not be resumed from; "
            f"{'untouched: ' + ', '.join(others) if others else 'there is no earlier checkpoint'}. Make room (or set "
            "save_total_limit) and resume from the last complete one with resume_from_checkpoint=True."
        ) from error


def load_weights(model: nn.Module, folder: str) -> bool:
    """Load the weights in `folder` into `model`, renamed as `from_pretrained` renames them.

    Returns False, having done nothing, for a model that is not a plain `PreTrainedModel`: the caller's own way of
    loading applies. Raises `ValueError` if a weight is missing in the checkpoint or unknown to the model.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "is_quantized", False):
        return False
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    loaded, info = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32),
        output_loading_info=True,
    )
    require_same_names(folder, info["missing_keys"], info["unexpected_keys"])
    model.load_state_dict(loaded.state_dict())
    return True


def check_adapter(model: PeftModel, folder: str) -> None:
    """Raise `ValueError` unless the adapter saved in `folder` has exactly the weights of the active one of `model`."""
    saved = set(load_peft_weights(folder, device="cpu"))
    expected = set(get_peft_model_state_dict(model, adapter_name=model.active_adapters[0]))
    require_same_names(folder, expected - saved, saved - expected)


def require_same_names(folder: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise `ValueError` if there is a missing or an unexpected name."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            f"The weights in {folder} do not fit the model: {_some(missing)} missing, {_some(unexpected)} unexpected. "
            "Resume with the model and the versions of transformers and peft that wrote the checkpoint."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
