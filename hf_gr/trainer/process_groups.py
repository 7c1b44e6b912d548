"""A clean exit for processes that trained together over gloo.

A gloo thread may still be releasing the tensors of the last reduction while the interpreter shuts down. It needs the
GIL for that, cannot get it, and the process aborts after all its work is done: "terminate called without an active
exception", exit code -6 (https://github.com/pytorch/pytorch/issues/190489). The threads end with their process group,
which lives as long as anything refers to it, above all the trainer's `DistributedDataParallel`; so
`destroy_process_group` alone does not end them. A group waits for its threads, and releases the GIL for that only if
the last reference to it is Python's own: the reducer's would keep the GIL, and both would wait forever.
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
    """Make sure that the process groups of `trainer`, and their threads, end before the interpreter does."""
    _trainers.add(trainer)


@atexit.register
def _end_process_groups() -> None:
    """Nothing can be reduced after this. Exit handlers registered after importing hf_gr run before it."""
    if getattr(sys, "last_value", None) is not None or not dist.is_available():
        return  # after an exception the other processes may be waiting for this one, and destroying a group for them
    last_references = []
    for trainer in list(_trainers):
        if trainer.model_wrapped is not trainer.model:
            last_references.append(getattr(trainer.model_wrapped, "process_group", None))
            trainer.model_wrapped = cast(nn.Module, trainer.model)
            trainer.accelerator.free_memory()
    if dist.is_initialized() and "gloo" in dist.get_backend():
        dist.destroy_process_group()
    if last_references:
        gc.collect()
