"""Resuming loses nothing: a checkpoint is read whole, into every weight, or not at all.

`Trainer` loads a checkpoint with `load_state_dict(strict=False)` and only warns about names that do not match. Model
classes whose weights are stored under other names than they have in memory (ViT, Swin) then go on with the weights
they were initialized with.
"""

import copy
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel


def check_checkpoint(folder: str) -> None:
    """Raise `ValueError` if a file of the checkpoint is missing or cut short, before anything of it is loaded."""
    path = Path(folder)
    others = ", ".join(sorted(p.name for p in path.parent.glob("checkpoint-*") if p != path)) or "none"
    advice = f"Resume from another checkpoint (beside it: {others}), or start without resume_from_checkpoint."
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint={folder}: there is no such folder. {advice}")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        if not (path / name).is_file():
            raise ValueError(
                f"resume_from_checkpoint={folder}: {name} is missing. The checkpoint is incomplete, or was written "
                f"with save_only_model, which cannot be resumed from. {advice}"
            )
    for file in sorted(path.iterdir()):
        if problem := _what_is_wrong_with(file):
            raise ValueError(
                f"resume_from_checkpoint={folder}: {file.name} cannot be read ({problem}); the run was probably "
                f"stopped while it was written. {advice}"
            )


def _what_is_wrong_with(file: Path) -> str | None:
    """Why a file of a checkpoint is unreadable, from its headers alone; None if it looks whole."""
    try:
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
