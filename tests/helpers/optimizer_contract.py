"""What any `torch.optim.Optimizer` promises, as checks of one optimizer each: those that torch makes of its own
optimizers, where they apply to a CPU and to more than one of them, and a few that training needs.

A check is called with `make(params, **settings)`, which builds the optimizer with its own learning rate unless `lr` or
`weight_decay` are given, and raises whatever goes wrong. `CHECKS` has them all, each with what it promises in words;
they are in `optimizer_checks_training` and `optimizer_checks_interface`.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Make = Callable[..., Optimizer]
CHECKS: dict[str, Callable[[Make], None]] = {}


def check(promise: str) -> Callable:
    def register(function: Callable[[Make], None]) -> Callable[[Make], None]:
        CHECKS[promise] = function
        return function

    return register


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(draw(i, *shape, dtype=dtype)) for i, shape in enumerate(shapes or [(6, 4), (6,)])]


def step(optimizer: Optimizer, params: Iterable[Tensor], *seeds: int, scale: float = 1.0) -> None:
    """A step for each seed, which gives the gradients."""
    for seed in seeds:
        for i, p in enumerate(params):
            p.grad = torch.empty_like(p).copy_(scale * draw(1000 * seed + i, *p.shape))
        optimizer.step()


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(first: Iterable[Tensor], second: Iterable[Tensor], tolerance: float = 0.0) -> None:
    torch.testing.assert_close(list(first), list(second), rtol=tolerance, atol=tolerance, check_dtype=False)


def moved(params: Iterable[Tensor], before: Iterable[Tensor]) -> list[bool]:
    return [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]


def refuses(error: type[Exception], function: Callable[[], Any], pattern: str = "") -> None:
    assert is_refused(error, function, pattern), f"no {error.__name__}"


def is_refused(errors: type[Exception] | tuple[type[Exception], ...], function: Callable[[], Any], pattern="") -> bool:
    """Whether it raises one of these errors, whose message then has to have the pattern."""
    try:
        function()
    except errors as error:
        if not re.search(pattern, str(error)):
            raise
        return True
    return False
