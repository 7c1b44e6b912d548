"""What each process of `test_trl.py` runs: GRPO on two processes, against two passes by hand, averaged over them."""

from pathlib import Path

import torch
import torch.distributed as dist

from helpers import toys
from trainer.test_trl import R, Seen, by_hand, comparable, make, with_gr_on

#: TRL gives each process a seed of its own, and so completions of its own.
CASE = "GRPO"


def averaged(g):
    dist.all_reduce(g)
    return g / dist.get_world_size()


def run(folder: Path) -> dict:
    seen = Seen()
    trainer = with_gr_on(CASE, folder / "gr", folder, cls_of=seen.watching)
    trainer.add_callback(seen)
    trainer.train()
    plain = make(CASE, folder / "plain", folder, has_gr=False)
    errors = []
    for theta, batches, g in seen.steps:
        expected = by_hand(plain, theta, batches, R, 0.5, reduce=averaged)[1]
        errors.append(((g - expected).norm() / expected.norm()).item())
    logs = []
    for degree in (0.0, R):
        still = make(CASE, folder / "still", folder, learning_rate=0.0, gr_lambda=degree, gr_r=R, gr_warmup="none")
        still.train()
        logs.append(comparable(still.state.log_history))
    return {
        "errors": errors,
        "generated": len(seen.generated),
        "weights": toys.weights(trainer.model),
        "logs": logs,
        "completions": [batch["completion_ids"] for _, batches, _ in seen.steps for batch, _ in batches],
    }


def main(folder: Path) -> None:
    result = run(folder)
    torch.save(result, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
