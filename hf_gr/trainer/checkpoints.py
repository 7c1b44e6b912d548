"""Checkpoints are loaded in full, into every weight, or not at all.

`Trainer` loads a checkpoint with `load_state_dict(strict=False)` and only warns about names that do not match. Models
whose weights are saved under different names than they have in memory (ViT, Swin) then keep their initial weights.
"""

import copy
import itertools
import json
import logging
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)  # accelerate's logger requires an accelerator
#: File names of the weights and of the optimizer state, whole or sharded (FSDP).
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "*/adapter_model.safetensors",  # a named adapter
    "*/adapter_model.bin",
    "pytorch_model*.bin",
    "pytorch_model_fsdp_*/.metadata",
)
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata")
RANDOM_STATES = ("rng_state.pth", "rng_state_*.pth")
#: Values that request the last complete checkpoint of the output folder. Only with "last" may there be none.
LAST = ("last", "True", "true", True)
#: Where `set_later_checkpoints_aside` moves them. Names that begin with an underscore are not uploaded.
SUPERSEDED = "_superseded"
#: Present while transformers writes a checkpoint on SIGTERM (`enable_jit_checkpoint`).
INCOMPLETE = "checkpoint-is-incomplete.txt"


def check_checkpoint(folder: str) -> None:
    """Raise `ValueError`, before anything is loaded, if a file of the checkpoint is missing or truncated."""
    path = Path(folder)
    siblings = _names([p for p in checkpoints(path.parent) if p != path]) or "none"
    advice = f"Resume from another checkpoint (beside it: {siblings}), or start without resume_from_checkpoint."
    if problem := _why_incomplete(path):
        raise ValueError(f"resume_from_checkpoint={folder}: {problem}. {advice}")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, complete or not, from the first step to the last."""
    found = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir() and _step(p) >= 0]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for a folder with another name."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The last complete checkpoint in `output_dir`, written by any number of processes; None if there is none.

    Later ones that a killed run left incomplete are named in warnings.
    """
    for path in reversed(checkpoints(output_dir)):
        problem = _why_incomplete(path)
        if problem is None:
            return str(path)
        logger.warning(f"{path} is not used: {problem}.")
    return None


def warn_of_other_processes(folder: str, world_size: int) -> None:
    """Warn unless a checkpoint has the random states of exactly `world_size` processes."""
    saved = {p.name for names in RANDOM_STATES for p in Path(folder).glob(names)}
    expected = {f"rng_state_{rank}.pth" for rank in range(world_size)} if world_size > 1 else {"rng_state.pth"}
    if saved != expected:
        logger.warning(
            f"{folder} was written by a run of {len(saved)} process{'es' if len(saved) > 1 else ''}, this one has "
            f"{world_size}: weights, optimizer, schedule and step are restored, but random states and the order of the "
            "examples differ, so the run is not bitwise the one that was interrupted."
        )


def set_later_checkpoints_aside(output_dir: str, folder: str) -> None:
    """Move the checkpoints in `output_dir` that are later than `folder`, from which a run resumes, out of its way.

    They are not part of the resumed run. If they stayed, `save_total_limit` would delete them, or new checkpoints in
    their place, and the next resume would continue from them. Unfinished ones stay and are overwritten.
    """
    step = max(0, _step(Path(folder).resolve()))
    later = [p for p in checkpoints(output_dir) if _step(p) > step and (p / "trainer_state.json").exists()]
    if not later:
        return
    target = next(t for n in itertools.count(1) if not (t := Path(output_dir, SUPERSEDED, str(n))).exists())
    target.mkdir(parents=True)
    for path in later:
        path.rename(target / path.name)
    logger.warning(
        f"The run resumes from {folder}. The later checkpoints in {output_dir}, {_names(later)}, are not part of this "
        f"run and were moved to {target}. Delete them if you do not need them."
    )


def warn_of_earlier_run(output_dir: str) -> None:
    """Warn if a new run finds checkpoints in the folder to which it will write its own."""
    if found := checkpoints(output_dir):
        logger.warning(
            f"output_dir={output_dir}: the checkpoints of an earlier run, {_names(found)}, are where this run writes "
            "its own. save_total_limit deletes both alike, and resume_from_checkpoint=True uses the last of all. "
            "Choose another folder, or delete them."
        )


def _names(paths: list[Path]) -> str:
    return ", ".join(p.name for p in paths)


def _why_incomplete(path: Path) -> str | None:
    """What is missing or unreadable in a checkpoint; None if it is complete, however many processes wrote it."""
    if not path.is_dir():
        return "there is no such folder"
    # In the order they are written: weights first, trainer state last, after all processes wrote their random states.
    for names in (WEIGHTS, OPTIMIZERS, ("scheduler.pt",), RANDOM_STATES, ("trainer_state.json",)):
        if not any(True for name in names for _ in path.glob(name)):
            return (
                f"{names[0]} is missing; the checkpoint is incomplete, or was written with save_only_model, and cannot "
                "be resumed from"
            )
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if problem := _what_is_wrong_with(file):
            return (
                f"{file.relative_to(path)} cannot be read ({problem}); the run was probably stopped while writing the "
                "checkpoint"
            )
    return None


def _what_is_wrong_with(file: Path) -> str | None:
    """Why a file of a checkpoint is unreadable, from its headers alone; None if it looks whole."""
    try:
        if file.name == INCOMPLETE:
            return "it marks a checkpoint that is still being written"
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
    """Turn a failure to write a checkpoint, usually a full disk, into an error that names the checkpoints left."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if _why_incomplete(Path(folder)) is None:
            raise  # the checkpoint is complete: something later failed
        siblings = _names([p for p in checkpoints(Path(folder).parent) if p.name != Path(folder).name])
        raise OSError(
            f"{folder} could not be written: {error}. It is incomplete and will not be resumed from; "
            f"{'untouched: ' + siblings if siblings else 'there is no earlier checkpoint'}. Make room (or set "
            "save_total_limit) and resume from the last complete one: resume_from_checkpoint=True in Python, "
            "--resume_from_checkpoint last for a script."
        ) from error


def load_weights(model: nn.Module, folder: str) -> bool:
    """Load the weights in `folder` into `model`, renamed as by `from_pretrained`; for a `PeftModel`, every adapter.

    Returns False, having loaded nothing, if the model is neither a `PeftModel` nor a plain `PreTrainedModel`; the
    caller then loads it. Raises `ValueError` if a weight is missing from the checkpoint or unknown to the model.
    """
    peft = sys.modules.get("peft")  # unless it is imported, no model is a PeftModel
    if peft is not None and isinstance(model, peft.PeftModel):
        _load_adapters(model, Path(folder))
        return True
    if not isinstance(model, PreTrainedModel) or getattr(model, "is_quantized", False):
        return False
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    result: Any = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32),
        output_loading_info=True,
    )
    loaded, info = result
    require_same_names(folder, info["missing_keys"], info["unexpected_keys"])
    model.load_state_dict(loaded.state_dict())
    return True


def _load_adapters(model: "PeftModel", folder: Path) -> None:
    """Load each adapter from where peft saves it: "default" from `folder` itself, others from subfolders named after
    them. All stay trainable; `Trainer` would train only the first active one."""
    from peft import get_peft_model_state_dict, load_peft_weights

    places = {name: folder if name == "default" else folder / name for name in model.peft_config}
    saved, expected = set(), set()
    for name, place in places.items():
        expected |= {f"{name}: {key}" for key in get_peft_model_state_dict(model, adapter_name=name)}
        if _holds_adapter(place):
            saved |= {f"{name}: {key}" for key in load_peft_weights(str(place), device="cpu")}
    unknown_adapters = {p.name for p in folder.iterdir() if _holds_adapter(p)} - set(places)
    require_same_names(str(folder), expected - saved, saved - expected | unknown_adapters)
    for name, place in places.items():
        model.load_adapter(str(place), name, is_trainable=True)


def _holds_adapter(folder: Path) -> bool:
    return any(folder.glob("adapter_model.*"))


def require_same_names(folder: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise `ValueError` if any name is missing or unexpected."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            f"The weights in {folder} do not fit the model: {_some(missing)} missing, {_some(unexpected)} unexpected. "
            "Resume with the model and the versions of transformers and peft that wrote the checkpoint."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
