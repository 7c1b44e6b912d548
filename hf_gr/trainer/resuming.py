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
from transformers.trainer_utils import SaveStrategy

from ..reporting.record import FILE, differences, read_record
from .checkpoints import (
    check_checkpoint,
    last_complete_checkpoint,
    set_later_checkpoints_aside,
    warn_of_earlier_run,
    warn_of_other_processes,
)
from .layerwise import innermost
from .part import Host
from .recording import data_of, method_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

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


def prepare_to_resume(trainer: Host, asked: str | bool | None) -> str | None:
    """The checkpoint that a run is to resume from, checked; with `True` the last complete one in `output_dir`. None for
    a new run. Later checkpoints are moved out of the run's way.

    Raises:
        ValueError: there is none, it is cut short, or another run has written it.
    """
    args = trainer.args
    if asked is True:
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True: there is no complete checkpoint in {args.output_dir!r}. Start without "
                "it, or give the folder of one."
            )
    else:
        checkpoint = asked or None
        if checkpoint and not trainer.is_deepspeed_enabled:
            check_checkpoint(checkpoint)
    if checkpoint:
        refuse_other_run(trainer, checkpoint)
    trainer.accelerator.wait_for_everyone()  # to read what is there, before the main process moves any of it
    if args.should_save:
        _clear_the_way(trainer, checkpoint)
    return checkpoint


def _clear_the_way(trainer: Host, checkpoint: str | None) -> None:
    args = trainer.args
    if checkpoint and not (trainer.is_deepspeed_enabled or args.save_on_each_node):
        warn_of_other_processes(checkpoint, args.world_size)
    if args.save_strategy != SaveStrategy.NO:
        if checkpoint:
            set_later_checkpoints_aside(args.output_dir, checkpoint)
        else:
            warn_of_earlier_run(args.output_dir)


def refuse_other_run(trainer: Host, checkpoint: str) -> None:
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

    def __init__(self, trainer: Host):
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
def same_optimizer_required(optimizer: Any) -> Iterator[None]:
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
