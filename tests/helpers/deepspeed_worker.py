"""What each process of `test_deepspeed.py` runs. torchrun --nproc_per_node N deepspeed_worker.py FOLDER"""

import os
import sys

import torch
from transformers import Trainer

from helpers import toys
from hf_gr import GRConfig, GRTrainer

OFF = {"gr_lambda": 0}
REFUSED = {
    "GR": {},
    "momentum": {"gr_ascent": "momentum"},
    "IRE": {**OFF, "ire_kappa": 2.0},
    "LARS": {**OFF, "optim": "lars"},
}


def trainer_of(folder: str, cls: type[Trainer], stage: int, **flags) -> Trainer:
    deepspeed = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    deepspeed |= dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    settings = {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": deepspeed, "max_steps": 2, "optim": "adamw_torch"}
    args = GRConfig(**toys.arguments(folder, gradient_accumulation_steps=2, **{**settings, **flags}))
    return cls(model=toys.llama(), args=args, train_dataset=toys.text())


class Watched(GRTrainer):
    """Notes, for each micro-batch, whether it ends a step, moves the weights, and leaves gradients."""

    def training_step(self, *args, **kwargs):
        before = toys.weights(self.model)
        loss = super().training_step(*args, **kwargs)
        moved = not torch.equal(toys.weights(self.model), before)
        has_gradients = any(p.grad is not None for p in self.model.parameters())
        self.seen.append((self.accelerator.sync_gradients, moved, has_gradients))
        return loss

    def has_shards(self) -> bool:
        """Whether what the optimizer steps are other tensors than the parameters."""
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return stepped.isdisjoint(map(id, self.model.parameters()))


def run(folder: str) -> dict:
    results: dict = {"seen": {}, "has_shards": {}, "refused": {}}
    for stage in (0, 1, 2):
        trainer = trainer_of(folder, Watched, stage, **OFF)
        trainer.seen = []
        trainer.train()
        results["seen"][stage], results["has_shards"][stage] = trainer.seen, trainer.has_shards()
    results["weights"] = toys.weights(trainer.model)
    plain = trainer_of(folder, Trainer, 2, **OFF)
    plain.train()
    results["plain"] = toys.weights(plain.model)
    for name, flags in REFUSED.items():
        try:
            trainer_of(folder, GRTrainer, 1, **flags)
        except ValueError as error:
            results["refused"][name] = str(error)
    return results


if __name__ == "__main__":
    # accelerate takes these processes, without accelerators, for single ones: each has all data, and files of its own.
    folder = f"{sys.argv[1]}/{os.environ['RANK']}"
    results = run(folder)
    torch.save(results, f"{folder}.pt")
