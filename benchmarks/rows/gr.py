"""What gradient regularization costs: whole optimizer steps, and what a step does beside its passes."""

import contextlib
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comparison import Bench, Comparison, Fact, Group, Row
from peers import ComposerSAM, Davda54SAM, library_sam, there_and_back
from timing import Run, peak_bytes
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from workloads import Workload, fill, random_gradients, size_of

from hf_gr import GRConfig, GRTrainer
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm, scale_gradients_

R = 0.1
#: lambda by its name in the table.
DEGREES = {"GR, λ = r": R, "GR, λ = 0.8 r": 0.8 * R}
EQUAL, OTHER = DEGREES

# ---- Whole steps ----

PLAIN, ZERO, BY_HAND = "plain step of Trainer", "zero-warmup phase", "SAM by hand"


def trainer_arguments(device: str) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": device == "cpu",
        "report_to": "none",
        "max_steps": 1000,
        "dataloader_pin_memory": False,
    }


def whole_steps(workload: Workload, with_sam: bool, device: str) -> Bench:
    """All kinds train one model with one optimizer: what a step costs does not depend on the weights."""
    model, inputs = workload.model(device), workload.inputs(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sam = Davda54SAM(list(model.parameters()), R)

    def backward_of(cls: type[Trainer], arguments: type[TrainingArguments], **flags: Any) -> Run:
        trainer = cls(model, arguments(**trainer_arguments(device), **flags), optimizers=(optimizer, None))
        trainer.current_gradient_accumulation_steps = 1
        return partial(trainer.training_step, model, inputs)

    def by_hand() -> None:
        model.train()
        model(**inputs).loss.backward()
        sam.first_step()
        model.zero_grad()
        model(**inputs).loss.backward()
        sam.second_step()

    def step_of(backward: Run) -> Run:
        def step() -> None:
            backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()

        return step

    backwards = {
        PLAIN: backward_of(Trainer, TrainingArguments),
        ZERO: backward_of(GRTrainer, GRConfig, gr_r=R, gr_warmup="zero", gr_warmup_steps=100),
    }
    if with_sam:
        backwards[BY_HAND] = by_hand
    for name, degree in DEGREES.items():
        backwards[name] = backward_of(GRTrainer, GRConfig, gr_r=R, gr_lambda=degree, gr_warmup="none")

    def gradients(kind: str) -> list[Tensor]:
        model.zero_grad()
        backwards[kind]()
        return [p.grad for p in model.parameters()]

    def are_equal() -> bool:
        return all(torch.equal(a, b) for a, b in zip(gradients(PLAIN), gradients(ZERO), strict=True))

    # On a GPU, the plain step itself is not always bitwise repeatable.
    facts = [Fact("zero-warmup gradient equals that of Trainer, bitwise", are_equal, True)] if device == "cpu" else []
    return Bench({name: step_of(backward) for name, backward in backwards.items()}, facts=facts)


STEP_ROWS = tuple(Row(name, (PLAIN,)) for name in (*DEGREES, ZERO))
#: With bars: at a batch that fills the time, so that it is that of passes.
BAR_ROWS = (
    *(Row(name, (PLAIN,), 2.05) for name in DEGREES),
    Row(ZERO, (PLAIN,)),
    *(Row(name, (BY_HAND,), 1.02) for name in DEGREES),
)


def step_comparisons(tiny: bool) -> list[Comparison]:
    """SAM by hand, another quarter of the time, is there for one of them."""
    compared = ((Workload("vit-ti", 64), 9), (Workload("vit-b", 2), 4), (Workload("resnet-18", 8), 5),
                (Workload("llama-60m", 1, 128), 5))  # fmt: skip
    found = []
    for workload, rounds in compared:
        with_sam, workload = workload.preset == "vit-ti", workload.tiny(tiny)
        rows = BAR_ROWS if with_sam else STEP_ROWS
        found.append(Comparison(workload.name, rows, partial(whole_steps, workload, with_sam), rounds))
    return found


STEP = Group(
    "A whole step of gradient regularization",
    "Forward and backward passes, clipping, and a fused AdamW, as `Trainer` runs them. SAM by hand is a loop of two "
    "passes in plain torch around a SAM in the manner of davda54/sam. Two passes take two passes: the limit is 2.00. "
    "With the small batches of ViT-B and the Llama, the bookkeeping is a visible share of a step.",
    step_comparisons,
)

# ---- Bookkeeping ----

DAVDA54, LIBRARY, COMPOSER = "SAM like davda54/sam", "SAM of pytorch_optimizer", "SAM like Composer"


def regularize(
    params: list[nn.Parameter], degree: float, second_gradients: list[Tensor], scratch: dict[int, Tensor]
) -> None:
    """A regularized step whose passes cost nothing. `.grad` is g1 before it and the combined gradient afterwards."""
    perturbation = Perturbation(params, scratch=scratch)
    perturbation.apply(R, gradient_norm(params), grad_scale=(R - degree) / degree)
    for p, gradient in zip(params, second_gradients, strict=True):
        if p.grad is None:  # what the second pass would leave there
            p.grad = gradient
    perturbation.restore()
    scale_gradients_(params, degree / R)


def bookkeeping(workload: Workload, device: str) -> Bench:
    params = list(workload.model(device).parameters())
    gradients = random_gradients(params)
    start: Callable[[], None] = partial(fill, params, gradients)
    scratch: dict[int, Tensor] = {}  # a trainer keeps one for all its steps
    kinds: dict[str, Run] = {
        name: partial(regularize, params, degree, gradients, scratch) for name, degree in DEGREES.items()
    }
    kinds[DAVDA54] = there_and_back(Davda54SAM(params, R))
    kinds[COMPOSER] = there_and_back(ComposerSAM(params, R))
    with contextlib.suppress(ImportError):
        kinds[LIBRARY] = there_and_back(library_sam(params, R))

    def memory(kind: str) -> float:
        start()
        scratch.clear()
        existing = [*params, *gradients, *(p.grad for p in params)]
        return peak_bytes(kinds[kind], existing, device) / size_of(params)

    facts = [Fact(f"memory beside θ and g1: {name}", partial(memory, name), 1.0, "N") for name in DEGREES]
    return Bench(kinds, before=start, facts=facts)


BOOKKEEPING_ROWS = (
    *(Row(name, (DAVDA54,), 0.80) for name in DEGREES),
    *(Row(name, (peer,)) for peer in (LIBRARY, COMPOSER) for name in DEGREES),
)
BOOKKEEPING = Group(
    "What a regularized step does beside its passes",
    "The norm, the perturbation, the way back, and the mix of both gradients, on random gradients. Composer's way "
    "subtracts what it added, and does not return to the same weights; the others do. N is the size of all "
    "parameters.",
    lambda tiny: [
        Comparison(w.model_name, BOOKKEEPING_ROWS, partial(bookkeeping, w), rounds)
        for w, rounds in (
            (Workload("vit-ti", 1).tiny(tiny), 31),
            (Workload("resnet-18", 1).tiny(tiny), 21),
            (Workload("llama-60m", 1, 1).tiny(tiny), 15),
        )
    ],
)
