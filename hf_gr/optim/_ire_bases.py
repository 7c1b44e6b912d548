"""What IRE refuses to wrap: optimizers and parameters with which its step would be wrong."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, Optimizer

from ._sharding import require_parts


def require_own_weights(optimizer: Optimizer) -> None:
    """Raise `ValueError` for an optimizer whose step is not a displacement of the parameters that it was given."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"IRE around {name}, which is no torch.optim.Optimizer: give the optimizer inside it.")
    if isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        inside = type(inner).__name__
        raise ValueError(f"IRE around {name}, which wraps {inside}: put IRE around {inside}, and {name} around IRE.")
    if isinstance(optimizer, LBFGS):
        raise ValueError("IRE around LBFGS: it chooses its step by the loss along it. Use a first-order optimizer.")
    if isinstance(optimizer, ASGD) or (callable(getattr(optimizer, "train", None)) and hasattr(optimizer, "eval")):
        raise ValueError(
            f"IRE around {name}: it keeps an average of the weights, which would not be amplified. Use an optimizer "
            "without train() and eval(), such as AdamW or SGD."
        )


def require_decoupled_decay(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0) and not group.get("decoupled_weight_decay", False):
            raise ValueError(
                f"amplify_weight_decay=False: the weight decay of {type(optimizer).__name__} is part of its gradient "
                "and cannot be told from the rest of the step. Use an optimizer with decoupled decay, such as AdamW."
            )


def require_amplifiable(group: dict[str, Any], excluded: Collection[Tensor]) -> None:
    """Raise `ValueError` for a parameter that cannot be amplified, or for a setting that is not a number."""
    for p in group["params"]:
        require_parts(p, "IRE")
        if p.requires_grad and p not in excluded and p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"IRE around {p.dtype} parameters: what it adds to a step is lost in their rounding. Keep the "
                "weights in float32 and use autocast, or leave these parameters out by exclude."
            )
    for key in ("lr", "weight_decay"):
        if math.isnan(group.get(key, 0.0)):
            raise ValueError(f"{key}={group[key]}: the base optimizer of IRE needs a number.")
