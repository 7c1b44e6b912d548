"""Trainings that `test_faults.py` runs in processes of their own, to kill them or to take their disk away."""

import logging
import resource
from pathlib import Path

import torch
from transformers import TrainerCallback

import conftest  # noqa: F401  (the environment)
import toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.checkpoints import last_complete_checkpoint

STEPS = 240
SAVE_STEPS = 2


class NoMoreRoom(TrainerCallback):
    """From step 3 on no file can grow beyond 64 KiB, as on a full disk: less than the optimizer's state."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def train(folder: str, disk_is_full: bool = False) -> None:
    """Go on from the last complete checkpoint, if there is one; leave the final weights in final.pt."""
    torch.set_num_threads(1)
    logging.basicConfig(filename=f"{folder}/log.txt", level=logging.WARNING)
    args = GRConfig(
        **toys.arguments(
            folder,
            max_steps=STEPS,
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
    callbacks = [NoMoreRoom()] if disk_is_full else []
    trainer = GRTrainer(toys.llama(0.1), args, train_dataset=toys.text(), callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    except OSError as error:
        Path(folder, "error.txt").write_text(str(error)[:5000])
        raise SystemExit(1) from error
    torch.save(toys.weights(trainer.model), f"{folder}/final.pt")
