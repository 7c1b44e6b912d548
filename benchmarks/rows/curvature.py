"""What a product of the Hessian and a vector costs, in each of two ways, against a plain forward and backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from comparison import Bench, Comparison, Fact, Group, Row
from torch import Tensor, nn
from workloads import Workload

from hf_gr.analysis import curvature
from hf_gr.optim.ascents import length

PLAIN = "forward and backward pass"
NAMES = {"difference": "central difference", "exact": "double backward"}


@contextmanager
def measured(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[curvature._Loss]:
    with curvature._measured(model, lambda model, batch: model(**batch).loss, [inputs], curvature.alone) as loss:
        yield loss


def products(workload: Workload, device: str) -> Bench:
    model, inputs = workload.model(device).eval(), workload.inputs(device)
    generator = torch.Generator().manual_seed(0)
    v = [curvature._like(p, curvature._signs(p.shape, generator)) for p in model.parameters()]

    def plain() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    def product(method: str) -> list[Tensor]:
        with measured(model, inputs) as loss:
            return loss.product(v, method)

    def error() -> float:
        exact = product("exact")
        errors = [a - b for a, b in zip(product("difference"), exact, strict=True)]
        return float(length(errors) / length(exact))

    kinds = {PLAIN: plain, **{name: partial(product, method) for method, name in NAMES.items()}}
    return Bench(kinds, facts=[Fact("relative error of the central difference", error)])


ROWS = (Row(NAMES["difference"], (PLAIN,), 2.1), Row(NAMES["exact"], (PLAIN,)))
GROUP = Group(
    "A product of the Hessian and a vector",
    "Of the mean loss of a batch, in evaluation mode, the copy of the weights included. A central difference is two "
    "passes, and some twenty reads and writes of an array of the size of the weights, which show beside the passes of "
    "a small batch.",
    lambda tiny: [
        Comparison(w.name, ROWS, partial(products, w), 5)
        for w in (Workload("vit-ti", 16).tiny(tiny), Workload("llama-60m", 4, 150).tiny(tiny))
    ],
)
