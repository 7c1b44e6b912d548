"""What IRE costs: its step, its choice of coordinates, and whole steps of AdmIRE."""

import copy
from functools import partial
from typing import Any

import torch
from comparison import Bench, Comparison, Fact, Group, Row
from peers import AuthorsIREStep, authors_mask
from timing import Run, peak_bytes
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from workloads import Workload, fill, size_of

from hf_gr import IRE, GRConfig, GRTrainer
from hf_gr.optim.fisher import causal_lm_losses, classification_losses

from .gr import PLAIN, trainer_arguments

KAPPA, GAMMA, INTERVAL = 4.0, 0.6, 10

# ---- The optimizer ----

ADAMW, STEP_OF_AUTHORS, ANY_BASE = "fused AdamW", "step of the authors' ire.py", "IRE around any base"
UPDATE, UPDATE_OF_AUTHORS = "IRE, choice of coordinates", "choice of the authors' ire_new.py"


def estimate(workload: Workload, model: nn.Module, device: str) -> list[Tensor]:
    """A real one, the gradient of sampled labels: random gradients have no ties and no zeros."""
    inputs = workload.inputs(device)
    labels = inputs.pop("labels")
    losses = causal_lm_losses if workload.length else classification_losses
    logits = model(**inputs).logits
    losses(logits, labels, torch.Generator(device).manual_seed(0)).mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return gradients


def optimizer_steps(workload: Workload, device: str) -> Bench:
    model = workload.model(device)
    gradients = estimate(workload, model, device)
    trained: dict[str, list[nn.Parameter]] = {}
    state: list[Tensor] = []

    def step_of(name: str) -> Run:
        params = trained[name] = list(copy.deepcopy(model).parameters())
        fill(params, gradients)
        base = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, fused=True)
        base.step()
        ire = IRE(base, KAPPA, GAMMA)
        ire.update_mask()
        masks = ire.state_dict()["ire"]["masks"]
        if name == "IRE":
            state.extend([*masks.values(), *(t for s in base.state.values() for t in s.values())])
        if name == ANY_BASE:
            base.register_step_pre_hook(lambda *_: None)  # a base that IRE cannot step by itself
        authors = AuthorsIREStep(base, [masks[i] for i in range(len(params))], KAPPA)
        return {ADAMW: base.step, STEP_OF_AUTHORS: authors}.get(name, ire.step)

    kinds = {name: step_of(name) for name in (ADAMW, STEP_OF_AUTHORS, "IRE", ANY_BASE)}

    def are_equal() -> bool:
        theirs = trained[STEP_OF_AUTHORS]
        return all(torch.equal(a, b) for name in ("IRE", ANY_BASE) for a, b in zip(trained[name], theirs, strict=True))

    def memory() -> float:
        params = trained["IRE"]
        existing = [*params, *(p.grad for p in params), *state]
        mask_bytes = sum(p.numel() for p in params)
        return (peak_bytes(kinds["IRE"], existing, device) + mask_bytes) / size_of(params)

    facts = (
        Fact("weights equal to the authors', bitwise", are_equal, True),
        Fact("memory beside AdamW: the mask, and the step's own", memory, 1.0, "N"),
    )
    return Bench(kinds, facts=facts)


def mask_updates(workload: Workload, device: str) -> Bench:
    model = workload.model(device)
    params = list(model.parameters())
    start = partial(fill, params, estimate(workload, model, device))  # the authors' way destroys them
    ire = IRE(torch.optim.AdamW(params), KAPPA, GAMMA)
    kinds = {UPDATE: ire.update_mask, UPDATE_OF_AUTHORS: partial(authors_mask, params, GAMMA)}

    def masks() -> list[Tensor]:
        return list(ire.state_dict()["ire"]["masks"].values())

    def are_same() -> bool:
        start()
        return all(torch.equal(a.bool(), b) for a, b in zip(masks(), authors_mask(params, GAMMA), strict=True))

    def memory() -> float:
        start()
        existing = [*params, *(p.grad for p in params), *masks()]
        return peak_bytes(ire.update_mask, existing, device, numpy=True) / size_of(params)

    facts = (
        Fact("the same masks as the authors'", are_same, True),
        Fact("temporary memory of the choice, NumPy's included", memory, 0.1, "N"),
    )
    return Bench(kinds, before=start, facts=facts)


OPTIMIZER_ROWS = (
    Row("IRE", (STEP_OF_AUTHORS,), 0.70),
    Row("IRE", (ADAMW,)),
    Row(ANY_BASE, (STEP_OF_AUTHORS,), cpu_only=True),
)
MASK_ROWS = (Row(UPDATE, (UPDATE_OF_AUTHORS,), 0.30),)


def optimizer_comparisons(tiny: bool) -> list[Comparison]:
    vit, llama = Workload("vit-ti", 64).tiny(tiny), Workload("llama-60m", 4, 128).tiny(tiny)
    return [
        Comparison(w.model_name, rows, partial(make, w), rounds[w == llama])
        for w in (vit, llama)
        for rows, make, rounds in ((OPTIMIZER_ROWS, optimizer_steps, (31, 11)), (MASK_ROWS, mask_updates, (21, 7)))
    ]


OPTIMIZER = Group(
    "The step of IRE and its choice of coordinates",
    "Without passes, around a fused AdamW, with kappa = 4, gamma = 0.6, and the gradient of sampled labels. Of the "
    "authors' two files, the step of ire.py is the faster, and the choice of ire_new.py. N is the size of all "
    "parameters.",
    optimizer_comparisons,
)

# ---- Whole steps ----

BETWEEN, AVERAGE, AVERAGE_HALF = "AdmIRE, between two choices", "AdmIRE, average", "AdmIRE, average, half the batch"
SHARES = {AVERAGE: 1.0, AVERAGE_HALF: 0.5}


def whole_steps(workload: Workload, device: str) -> Bench:
    """Steps with and without an estimate; a real run has one of the former in `INTERVAL`."""
    model, inputs = workload.model(device), workload.inputs(device)

    def step_of(trainer: Trainer, at: int) -> Run:
        def step() -> None:
            trainer.state.global_step = at
            (batch,), count = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
            trainer.training_step(trainer.model, batch, count)
            nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()

        return step

    def prepared(cls: type[Trainer], arguments: type[TrainingArguments], **flags: Any) -> Trainer:
        trainer = cls(copy.deepcopy(model), arguments(**trainer_arguments(device), **flags))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.max_steps = 1000
        return trainer

    kinds = {PLAIN: step_of(prepared(Trainer, TrainingArguments), 1)}
    averages = {}
    for name, share in SHARES.items():
        flags = {"gr_lambda": 0, "ire_kappa": KAPPA, "ire_interval": INTERVAL, "ire_probe_fraction": share}
        trainer = prepared(GRTrainer, GRConfig, **flags)
        step_of(trainer, 0)()  # which has no mask before, and so none to compare with
        kinds[f"{name}: with an estimate"] = step_of(trainer, 0)
        averages[name] = {f"{name}: with an estimate": 1 / INTERVAL, BETWEEN: 1 - 1 / INTERVAL}
    kinds[BETWEEN] = step_of(trainer, 1)  # the same for every share
    return Bench(kinds, averages=averages)


STEP_ROWS = (Row(AVERAGE, (PLAIN,), 1.12), Row(AVERAGE_HALF, (PLAIN,), 1.08), Row(BETWEEN, (PLAIN,)))
STEP = Group(
    "A whole step of AdmIRE",
    "Averaged over K = 10 steps, of which one chooses coordinates, from an estimate with the whole batch or half of "
    "it (`ire_probe_fraction=0.5`). The estimate is a pass of its own: with the whole batch, 1.10 is the limit.",
    lambda tiny: [
        Comparison(w.name, STEP_ROWS, partial(whole_steps, w), 4)
        for w in (Workload("vit-ti", 64).tiny(tiny), Workload("llama-60m", 4, 150).tiny(tiny))
    ],
)
