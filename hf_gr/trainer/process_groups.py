"""The end of a process that has trained with others over gloo.

A thread of gloo may still be letting go of the tensors of the last reduction while the interpreter is being taken down.
For that it needs the interpreter's lock, does not get it, and the process aborts after all its work is done: "terminate
called without an active exception", exit code -6 (https://github.com/pytorch/pytorch/issues/190489). The threads end
with their group, and the group lives for as long as anything refers to it, above all the `DistributedDataParallel` that
a trainer holds; so `destroy_process_group` alone does not end them.
"""

import atexit
import gc
import sys
import weakref
from typing import cast

import torch.distributed as dist
from torch import nn
from transformers import Trainer

_trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()


def end_cleanly(trainer: Trainer) -> None:
    """See to it that the process groups of `trainer` end before the interpreter does, and their threads with them."""
    _trainers.add(trainer)


@atexit.register
def _end_process_groups() -> None:
    """Nothing is reduced after this; what a script registers after importing hf_gr runs before it."""
    if getattr(sys, "last_value", None) is not None or not dist.is_available():
        return  # after an exception the others may be waiting for this process, and the end of a group for them
    for trainer in list(_trainers):
        if trainer.model_wrapped is not trainer.model:
            trainer.model_wrapped = cast(nn.Module, trainer.model)
            trainer.accelerator.free_memory()
    if dist.is_initialized() and "gloo" in dist.get_backend():
        dist.destroy_process_group()
        gc.collect()
