"""Trainings that `test_faults.py` runs in processes of their own, to kill them or to take their disk away."""

import logging
import os
import resource
import signal
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from helpers import toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.trainer.checkpoints import last_complete_checkpoint

SAVE_STEPS = 2
#: Bytes: the weights have 95 KiB, the state of the optimizer 230.
NOT_THE_WEIGHTS, NOT_THE_OPTIMIZER = 2**16, 2**17


class NoMoreRoom(TrainerCallback):
    """After some steps of this process no file can grow beyond a size, as on a full disk."""

    def __init__(self, steps: int, size: int):
        self.steps, self.size = steps, size

    def on_step_begin(self, args, state, control, **kwargs):
        if self.steps == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
        self.steps -= 1


class DiesAfter(TrainerCallback):
    """After so many seconds of processor time in training the process is ended by `SIGPROF`."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        signal.setitimer(signal.ITIMER_PROF, self.seconds)


def train(
    folder: str,
    steps: int,
    room: tuple[int, int] | None = None,
    dies_while_saving: bool = False,
    dies_after: float = 0.0,
):
    """Go on from the last complete checkpoint, if there is one; leave the final weights in final.pt, and in seconds.txt
    the processor time.

    Args:
        room: after so many steps there is none for a file of more than so many bytes (`NOT_THE_WEIGHTS`,
            `NOT_THE_OPTIMIZER`): an error, or, if it `dies_while_saving`, the end by `SIGXFSZ` amid that file.
        dies_after: so many seconds of training the end comes by `SIGPROF`; 0 for never.
    """
    if dies_while_saving:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # pytest's file for it may be too large to grow
    logging.basicConfig(filename=f"{folder}/log.txt", level=logging.WARNING)
    args = GRConfig(
        **toys.arguments(
            folder,
            max_steps=steps,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=3,
            gradient_accumulation_steps=2,
            train_sampling_strategy="random",
            warmup_steps=10,
            ire_kappa=1.0,
            ire_interval=3,
            optim="adamw_torch",
            learning_rate=1e-3,
        )
    )
    callbacks = [DiesAfter(dies_after), *([] if room is None else [NoMoreRoom(*room)])]
    trainer = GRTrainer(toys.llama(0.1), args, train_dataset=toys.text(), callbacks=callbacks)
    began = time.process_time()
    try:
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    except OSError as error:
        Path(folder, "error.txt").write_text(str(error)[:5000])
        raise SystemExit(1) from error
    torch.save(toys.weights(trainer.model), f"{folder}/final.pt")
    Path(folder, "seconds.txt").write_text(str(time.process_time() - began))
