"""Training on toys, and what its results are compared by."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from helpers import toys
from hf_gr import GRArguments, GRConfig, GRMixin, GRTrainer


def run(model, data, output_dir, *, cls=GRTrainer, config=GRConfig, callbacks=None, trainer_kwargs=None, **kwargs):
    args = config(**toys.arguments(output_dir, **kwargs))
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=callbacks, **(trainer_kwargs or {}))
    trainer.train()
    return trainer


def sum_of_token_losses(model, batch, label_smoothing=0.0):
    logits = model(input_ids=torch.stack([e["input_ids"] for e in batch])).logits[:, :-1]
    labels = torch.stack([e["labels"] for e in batch])[:, 1:]
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum", label_smoothing=label_smoothing
    )


def relative_error_of_path(path, expected):
    start = expected[0]
    return max(((a - b).norm() / (b - start).norm()).item() for a, b in zip(path[1:], expected[1:], strict=True))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.features(x), labels)}


class Estimates(GRTrainer):
    """Keeps each estimate of IRE, as it is in `.grad` when the coordinates are chosen by it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.estimates = []

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        choose = self.ire_optimizer.update_mask

        def watched(**kwargs) -> torch.Tensor:
            self.estimates.append([p.grad.clone() for p in self.model.parameters()])
            return choose(**kwargs)

        self.ire_optimizer.update_mask = watched
        return optimizer


@cache
def with_gr(trainer, config):
    """The two classes behind ours; known to this module by name, as checkpoints pickle the arguments."""
    config = dataclass(type(f"GR{config.__name__}", (GRArguments, config), {"__module__": __name__}))
    globals()[config.__name__] = config
    return type(f"GR{trainer.__name__}", (GRMixin, trainer), {}), config
