"""What each process of `test_distributed.py` runs: training under DDP, once per case; the paths go to a file."""

import sys

import torch
import torch.distributed as dist

import conftest  # noqa: F401  (the environment)
import toys
from hf_gr import GRConfig, GRTrainer

CASES = {
    (scope, accumulation, degree): {
        "gr_scope": scope,
        "gr_lambda": degree * 0.1,
        "gradient_accumulation_steps": accumulation,
    }
    for scope in ("global", "local", "micro")
    for accumulation in (1, 2)
    for degree in (0.5, 1.0)
}
STEPS = 3
LEARNING_RATE = 0.1
IRE_CASES = {
    (accumulation, degree): {
        "gr_lambda": degree,
        "gradient_accumulation_steps": accumulation,
        "ire_kappa": 2.0,
        "ire_interval": 2,
        "ire_start_step": 0,
        "seed": 5,
    }
    for accumulation in (1, 2)
    for degree in (0, 0.1)
}

OPTIMIZER_CASES = {
    (optim, accumulation, degree): {
        "optim": optim,
        "gr_lambda": degree,
        "gradient_accumulation_steps": accumulation,
        # Some steps of a size that is seen, for the batch of 4 accumulated ones.
        "learning_rate": {"lamb": 0.5, "lars": 200.0, "tvlars": 200.0}[optim],
        "lr_scaling": "linear",
        "weight_decay": 0.1,
        "layer_statistics_steps": 1,
    }
    for optim in ("lamb", "lars", "tvlars")
    for accumulation in (1, 2)
    for degree in (0, 0.1)
}


class RanksAgree(toys.PathRecorder):
    """Fails in the step after which two processes differ in any bit."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        mine = self.path[-1]
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(other, mine) for other in everyone), f"ranks differ after step {state.global_step}"


def run(output_dir: str, cls=GRTrainer, **flags) -> RanksAgree:
    recorder = RanksAgree()
    settings = {
        "ddp_backend": "gloo",
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gr_warmup": "none",
        **flags,
    }
    cls(
        model=toys.llama(),
        args=GRConfig(**toys.arguments(output_dir, **settings)),
        train_dataset=toys.text(24),
        callbacks=[recorder],
    ).train()
    return recorder


class Estimates(GRTrainer):
    """Keeps, for each choice of coordinates, the weights, the estimate and the masks; ranks must agree in every bit."""

    def _ire_update_mask(self, batch_samples):
        super()._ire_update_mask(batch_samples)
        params = list(self.model.parameters())
        self.kept[-1]["masks"] = [self._ire._masks[p].clone() for p in params]
        for tensor in (*self.kept[-1]["masks"], *self.kept[-1]["estimate"]):
            everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, tensor)
            assert all(torch.equal(other, tensor) for other in everyone)

    def _ire_probe(self, batch_samples):
        result = super()._ire_probe(batch_samples)
        estimate = [p.grad.clone() for p in self.model.parameters()]
        self.kept.append({"step": self.state.global_step, "weights": toys.weights(self.model), "estimate": estimate})
        return result


def overflow_on_one_rank(output_dir: str) -> bool:
    """A local g1 that is not finite on one rank only. Nobody may wait forever, and no rank may miss it."""

    class Overflows(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if dist.get_rank() == 0 else loss

    settings = {"ddp_backend": "gloo", "max_steps": 2, "gr_warmup": "none", "gr_scope": "local"}
    trainer = Overflows(
        model=toys.llama(), args=GRConfig(**toys.arguments(output_dir, **settings)), train_dataset=toys.text()
    )
    trainer.train()
    return not toys.weights(trainer.model).isfinite().any()


if __name__ == "__main__":
    folder = sys.argv[1]
    paths = {case: run(folder, **flags).path for case, flags in CASES.items()}
    estimates = {}
    for case, flags in IRE_CASES.items():
        estimates[case] = Estimates.kept = []
        run(folder, Estimates, **flags)
    optimizers = {case: run(f"{folder}/optimizers", **flags).path for case, flags in OPTIMIZER_CASES.items()}
    assert overflow_on_one_rank(folder)
    if dist.get_rank() == 0:
        torch.save({"paths": paths, "estimates": estimates, "optimizers": optimizers}, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()
