"""A run that resumes is the run that wrote the checkpoint: by the same method, on the same data.

What else differs is named, with the value that is in force: the learning rate and all that the optimizer keeps with its
state come from the checkpoint, everything else from the arguments.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .layerwise import innermost
from .recording import FILE, data_of, differences, method_of, read_record

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .trainer import GRMixin

logger = get_logger(__name__)

#: Flags that make the groups of the optimizer, which a checkpoint brings along.
OF_THE_OPTIMIZER = {
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "lr_scaling",
    "decay_norms_and_biases",
}
#: Groups of torch's optimizers may have these or not, as the version has it.
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay", "amsgrad"}


def refuse_other_run(trainer: "GRMixin", checkpoint: str) -> None:
    """Raise `ValueError` if the record of a checkpoint has another method, or other data, than `trainer`."""
    record = read_record(checkpoint)
    if record is None:
        return
    both = {"method": (record.method, method_of(trainer)), "data": (record.data, data_of(trainer))}
    for kind, (old, new) in both.items():
        known = [key for key in old if None not in (old[key], new.get(key)) and key != "is_local"]
        if other := [key for key in known if old[key] != new[key]]:
            there, here = (", ".join(f"{key}={side[key]}" for key in other) for side in (old, new))
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: the run that wrote it has {there}, this one {here}. Resume with "
                f"the same {kind}, or start a new run in another folder. To change it on purpose, remove {FILE} there."
            )


class ResumeCheck(TrainerCallback):
    """Names, once a checkpoint is loaded, the arguments that are not those of the run that wrote it."""

    def __init__(self, trainer: "GRMixin"):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        recorder = self._trainer.recorder
        earlier = [s for s in recorder.record.segments[:-1] if s.is_recorded]
        if recorder.resumed_from and earlier:
            old, new = earlier[-1].settings, json.loads(json.dumps(recorder.segment.settings, default=str))
            if lines := [*_in_force(differences(old, new)), *self._overruled(new)]:
                logger.warning(f"Differs from the run that wrote {recorder.resumed_from}: {'; '.join(lines)}.")

    def _overruled(self, new: dict[str, Any]) -> list[str]:
        """What was asked for, and what the optimizer has brought along instead."""
        args = self._trainer.args
        asked = {name: getattr(args, name) for name in ("learning_rate", "weight_decay") if name in new}
        return [
            f"{name}={value} has no effect, the checkpoint's {new[name]:g} is in force"
            for name, value in asked.items()
            if abs(new[name] - value) > 1e-9 * abs(value)
        ]


def _in_force(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    lines = []
    for name, (old, new) in changes.items():
        if name in OF_THE_OPTIMIZER:
            lines.append(f"{name}={new} has no effect, the checkpoint's {old} is in force")
        else:
            lines.append(f"{name}={new} is in force, it was {old}")
    return lines


@contextmanager
def same_optimizer_required(optimizer: "Optimizer | None") -> Iterator[None]:
    """Within, loading the state of another class of optimizer raises `ValueError`: torch's fail in the first step."""
    inner = innermost(optimizer)
    if not hasattr(inner, "register_load_state_dict_pre_hook"):  # it is not torch's
        yield
        return
    hook = inner.register_load_state_dict_pre_hook(_check_groups)
    try:
        yield
    finally:
        hook.remove()


def _check_groups(optimizer: "Optimizer", state_dict: dict[str, Any]) -> None:
    saved, own = (set(groups[0]) - IMPLEMENTATION for groups in (state_dict["param_groups"], optimizer.param_groups))
    missing, unknown = sorted(own - saved - {"initial_lr"}), sorted(saved - own - {"initial_lr"})
    if missing and unknown:
        raise ValueError(
            f"The state of the optimizer in the checkpoint is not of {type(optimizer).__name__}: it has no "
            f"{', '.join(missing)}, but {', '.join(unknown)}. Resume with the optimizer that wrote it (optim)."
        )
