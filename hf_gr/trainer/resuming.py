"""A resumed run must continue the run that wrote the checkpoint: the same method, on the same data.

Other differences are reported, with the value in force: the learning rate and everything else that the optimizer
stores with its state come from the checkpoint, the rest from the arguments.
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
from .part import Host, innermost
from .recording import data_of, method_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = get_logger(__name__)

#: Flags that set the optimizer's parameter groups, which a checkpoint restores.
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
#: Keys of parameter groups that not all versions of torch have.
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay", "amsgrad"}


def prepare_to_resume(trainer: Host, requested: str | bool | None) -> str | None:
    """The checkpoint to resume from, checked; with `True`, the last complete one in `output_dir`. None for a new run.
    Later checkpoints are moved out of the run's way.

    Raises:
        ValueError: there is none, it is truncated, or a different run wrote it.
    """
    args = trainer.args
    if requested is True:
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint=True: there is no complete checkpoint in {args.output_dir!r}. Start without "
                "it, or give the folder of one."
            )
    else:
        checkpoint = requested or None
        if checkpoint and not trainer.is_deepspeed_enabled:
            check_checkpoint(checkpoint)
    if checkpoint:
        refuse_other_run(trainer, checkpoint)
    trainer.accelerator.wait_for_everyone()  # all read the folder before the main process moves anything in it
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
    """Raise `ValueError` if the record of a checkpoint has a different method, or different data, than `trainer`."""
    record = read_record(checkpoint)
    if record is None:
        return
    both = {"method": (record.method, method_of(trainer)), "data": (record.data, data_of(trainer))}
    for kind, (old, new) in both.items():
        in_both = [key for key in old if None not in (old[key], new.get(key)) and key != "is_local"]
        if changed := [key for key in in_both if old[key] != new[key]]:
            there, here = (", ".join(f"{key}={side[key]}" for key in changed) for side in (old, new))
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: the run that wrote it has {there}, this one {here}. Resume with "
                f"the same {kind}, or start a new run in another folder. To change it on purpose, remove {FILE} there."
            )


class ResumeCheck(TrainerCallback):
    """Reports, once a checkpoint is loaded, the arguments that differ from those of the run that wrote it."""

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
        """The arguments that the restored optimizer overrides, and its values."""
        args = self._trainer.args
        requested = {name: getattr(args, name) for name in ("learning_rate", "weight_decay") if name in new}
        return [
            f"{name}={value} has no effect, the checkpoint's {new[name]:g} is in force"
            for name, value in requested.items()
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
    """Raise `ValueError` if the state of another class of optimizer is loaded; torch fails only in the first step."""
    inner = innermost(optimizer)
    if not hasattr(inner, "register_load_state_dict_pre_hook"):  # not a torch optimizer
        yield
        return
    hook = inner.register_load_state_dict_pre_hook(_check_groups)
    try:
        yield
    finally:
        hook.remove()


def _check_groups(optimizer: "Optimizer", state_dict: dict[str, Any]) -> None:
    saved, needed = (set(groups[0]) - IMPLEMENTATION for groups in (state_dict["param_groups"], optimizer.param_groups))
    missing, unknown = sorted(needed - saved - {"initial_lr"}), sorted(saved - needed - {"initial_lr"})
    if missing and unknown:
        raise ValueError(
            f"The optimizer state in the checkpoint is not that of {type(optimizer).__name__}: it lacks "
            f"{', '.join(missing)} and has {', '.join(unknown)}. Resume with the optimizer that wrote it (optim)."
        )
