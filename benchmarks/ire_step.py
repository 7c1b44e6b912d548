"""What IRE costs: its step and its choice of coordinates against the authors' way, and whole steps against AdamW.

    python benchmarks/ire_step.py --threads 1 2

All kinds run in one process, interleaved in a new order each round; what is reported are medians of the ratios within a
round, with the range of their middle half.
"""

import argparse
import copy
import platform
import random
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable
from datetime import date

import torch
from gr_step import LiveBytes, interleave, llama, ratio
from torch import nn
from transformers import Trainer, TrainingArguments, logging

from hf_gr import IRE, GRConfig, GRTrainer, __version__
from hf_gr.models.presets import create_vit
from hf_gr.optim.fisher import causal_lm_losses, classification_losses

KAPPA, GAMMA, INTERVAL = 4.0, 0.6, 10


class LiveBytesWithNumPy(LiveBytes):
    """The same, and what NumPy holds at each operation of torch."""

    def _track(self, storage) -> None:
        super()._track(storage)
        self.peak = max(self.peak, self.live + tracemalloc.get_traced_memory()[0])


class AuthorsStep:
    """The step of the authors' ire.py: copy everything, step, and write new tensors with a float mask."""

    def __init__(self, base: torch.optim.Optimizer, masks: list[torch.Tensor]):
        self.base, self.params = base, base.param_groups[0]["params"]
        self.masks = [mask.float() for mask in masks]

    @torch.no_grad()
    def __call__(self) -> None:
        old = [p.data.clone() for p in self.params]
        self.base.step()
        for p, before, mask in zip(self.params, old, self.masks, strict=True):
            difference = p.data - before
            p.data = p.data + difference * mask * KAPPA


@torch.no_grad()
def authors_mask(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """The choice of the authors' ire_new.py: absolute values in place, one long copy, and its k-th value."""
    magnitudes = [p.grad.abs_() for p in params]
    everything = torch.cat([m.view(-1) for m in magnitudes])
    threshold = torch.kthvalue(everything, int(len(everything) * GAMMA)).values
    del everything
    return [m <= threshold for m in magnitudes]


def estimate(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A real one: gradients of sampled labels."""
    losses = causal_lm_losses if "input_ids" in inputs else classification_losses
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    losses(logits, inputs["labels"], torch.Generator().manual_seed(0)).mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return gradients


def optimizer_steps(model: nn.Module, gradients: list[torch.Tensor], rounds: int) -> list[str]:
    kinds, all_params = {}, {}
    for name in ("AdamW", "authors", "IRE", "IRE, any base"):
        params = list(copy.deepcopy(model).parameters())
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        base = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, fused=True)
        base.step()
        ire = IRE(base, KAPPA, GAMMA)
        ire.update_mask()
        if name == "IRE, any base":
            base.register_step_pre_hook(lambda *_: None)  # whatever IRE does not know, it leaves to the base
        masks = [ire.state_dict()["ire"]["masks"][i] for i in range(len(params))]
        kinds[name] = {"AdamW": base.step, "authors": AuthorsStep(base, masks)}.get(name, ire.step)
        all_params[name] = params
    seconds = interleave(kinds, rounds)
    equal = all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(all_params["authors"], all_params["IRE"], all_params["IRE, any base"], strict=True)
    )
    peak = LiveBytes()
    params = all_params["IRE"]
    state = [t for s in ire_state(kinds["IRE"]) for t in s]
    peak.watch_existing([*params, *(p.grad for p in params), *state])
    with peak:
        kinds["IRE"]()
    n = sum(p.numel() * p.element_size() for p in params)
    mask_bytes = sum(p.numel() for p in params)
    return [
        f"{1e3 * statistics.median(seconds['AdamW']):.1f} ms",
        ratio(seconds, "IRE", "AdamW"),
        ratio(seconds, "IRE", "authors"),
        ratio(seconds, "IRE, any base", "authors"),
        f"{(peak.peak + mask_bytes) / n:.2f} N",
        "yes" if equal else "NO",
    ]


def ire_state(step: Callable) -> list[list[torch.Tensor]]:
    ire = step.__self__
    moments = [[t for t in s.values() if isinstance(t, torch.Tensor)] for s in ire.state.values()]
    return [*moments, list(ire.state_dict()["ire"]["masks"].values())]


def mask_updates(model: nn.Module, gradients: list[torch.Tensor], rounds: int) -> list[str]:
    params = list(model.parameters())

    def fill() -> None:  # the authors' way destroys them
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()

    ire = IRE(torch.optim.AdamW(params), KAPPA, GAMMA)
    fill()
    ire.update_mask()
    masks = ire.state_dict()["ire"]["masks"]
    equal = all(torch.equal(masks[i].bool(), mask) for i, mask in enumerate(authors_mask(params)))
    seconds = interleave({"IRE": ire.update_mask, "authors": lambda: authors_mask(params)}, rounds, before=fill)
    fill()
    peak = LiveBytesWithNumPy()
    peak.watch_existing([*params, *(p.grad for p in params), *masks.values()])
    tracemalloc.start()
    with peak:
        ire.update_mask()
    tracemalloc.stop()
    n = sum(p.numel() * p.element_size() for p in params)
    return [
        f"{1e3 * statistics.median(seconds['authors']):.0f} ms",
        f"{1e3 * statistics.median(seconds['IRE']):.0f} ms",
        ratio(seconds, "IRE", "authors"),
        f"{peak.peak / n:.3f} N",
        "yes" if equal else "NO",
    ]


def whole_steps(model: nn.Module, inputs: dict[str, torch.Tensor], rounds: int) -> list[str]:
    """A step of AdamW, and one of AdmIRE as it is on average over `INTERVAL` steps."""
    common = {"output_dir": tempfile.mkdtemp(), "use_cpu": True, "report_to": "none", "max_steps": 1000}

    def step_of(trainer: Trainer, at: int) -> Callable[[], None]:
        def step() -> None:
            trainer.state.global_step = at
            (batch,), count = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
            trainer.training_step(trainer.model, batch, count)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()

        return step

    def prepared(trainer: Trainer) -> Trainer:
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.max_steps = 1000
        return trainer

    plain = prepared(Trainer(copy.deepcopy(model), TrainingArguments(**common)))
    kinds = {"plain": step_of(plain, 1)}
    for share in (1.0, 0.5):
        flags = {"gr_lambda": 0, "ire_kappa": KAPPA, "ire_interval": INTERVAL, "ire_probe_fraction": share}
        trainer = prepared(GRTrainer(copy.deepcopy(model), GRConfig(**common, **flags)))
        kinds[f"with estimate {share}"] = step_of(trainer, 0)
        kinds[f"between {share}"] = step_of(trainer, 1)
    seconds = interleave(kinds, rounds)
    for share in (1.0, 0.5):
        seconds[f"average {share}"] = [
            (with_estimate + (INTERVAL - 1) * between) / INTERVAL
            for with_estimate, between in zip(
                seconds[f"with estimate {share}"], seconds[f"between {share}"], strict=True
            )
        ]
    return [
        f"{statistics.median(seconds['plain']):.2f} s",
        ratio(seconds, "between 1.0", "plain"),
        ratio(seconds, "with estimate 1.0", "plain"),
        ratio(seconds, "average 1.0", "plain"),
        ratio(seconds, "average 0.5", "plain"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7, help="of whole steps; the others take three times as many")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    random.seed(0)
    ids = torch.randint(0, 8192, (4, 256))
    vit = create_vit("vit-ti", [str(i) for i in range(10)], dropout=0.0)
    torch.nn.init.normal_(vit.classifier.weight, std=0.02)  # it begins at 0, and with it every other gradient
    models = {
        "ViT-Ti, batch 64": (
            vit,
            {"pixel_values": torch.randn(64, 3, 32, 32), "labels": torch.randint(0, 10, (64,))},
        ),
        "Llama 58 M, 4 x 256 tokens": (llama(), {"input_ids": ids, "labels": ids}),
    }
    tables = {optimizer_steps: [], mask_updates: [], whole_steps: []}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, (model, inputs) in models.items():
            gradients = estimate(model, inputs)
            where = f"{name}, {threads} thread{'s' * (threads > 1)}"
            for measure, rows in tables.items():
                whole = measure is whole_steps
                cells = measure(
                    copy.deepcopy(model), inputs if whole else gradients, options.rounds * (1 if whole else 3)
                )
                rows.append(f"| {where} | {' | '.join(cells)} |")
                print(rows[-1], flush=True)

    print(f"\n{date.today()}, hf_gr {__version__}, torch {torch.__version__}, {platform.processor() or 'CPU'}; medians")
    print(f"of {options.rounds} paired ratios ({3 * options.rounds} without passes), the middle half in brackets.\n")
    heads = {
        optimizer_steps: "step, no passes | fused AdamW | IRE / it | IRE / authors' ire.py "
        "| IRE around any base / authors' ire.py | memory beyond AdamW | result bit-equal to the authors'",
        mask_updates: "choice of coordinates | authors' ire_new.py | IRE | IRE / it | temporary memory | same masks",
        whole_steps: "whole step | AdamW | between two estimates / it | with an estimate / it "
        f"| average over {INTERVAL} / it | average, half the batch in the estimate / it",
    }
    for measure, rows in tables.items():
        print(f"| {heads[measure]} |\n|{'---|' * (heads[measure].count('|') + 1)}")
        print("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
