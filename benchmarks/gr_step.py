"""What a GR step costs: against a plain step, a SAM loop written by hand, and SAM optimizers; time and memory.

    pip install -c constraints.txt -e ".[bench]" && python benchmarks/gr_step.py --threads 1 2

All kinds of step run in one process, interleaved in a new order each round; what is reported are medians of the ratios
within a round, with the range of their middle half.
"""

import argparse
import copy
import platform
import random
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from datetime import date

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, logging

from hf_gr import GRConfig, GRTrainer, __version__
from hf_gr.models.presets import create_vit
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm, scale_gradients_


class TwoPassSAM:
    """SAM in the manner of the widely used davda54/sam: copy, move along scale * grad, point back at the copy."""

    def __init__(self, params, rho: float):
        self.params, self.rho, self.state = list(params), rho, {}

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.norm(torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params if p.grad is not None]), p=2)
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.state[p] = p.data.clone()
                p.add_(1.0 * p.grad * scale.to(p))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self.state[p]


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that are created inside the context and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        return out

    def watch_existing(self, tensors) -> None:
        """Storages that were there before do not count."""
        self._seen |= {t.untyped_storage()._cdata for t in tensors}

    def _track(self, storage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes(), storage._cdata)

    def _free(self, nbytes: int, key: int) -> None:
        self.live -= nbytes
        self._seen.discard(key)


def interleave(
    kinds: dict[str, Callable[[], None]], rounds: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds per kind and round, after one warm-up each. `before` runs ahead of each, outside the clock."""
    seconds = {name: [] for name in kinds}
    for run in kinds.values():
        before()
        run()
    for _ in range(rounds):
        for name in random.sample(list(kinds), len(kinds)):
            before()
            start = time.perf_counter()
            kinds[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> str:
    ratios = sorted(a / b for a, b in zip(seconds[of], seconds[to], strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})"


def vit_step(rounds: int, batch: int, threads: int) -> list[str]:
    """Whole optimizer steps of ViT-Ti."""
    inputs = {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.randint(0, 10, (batch,))}
    rows = []
    for degree in (0.1, 0.08):
        model = create_vit("vit-ti", [str(i) for i in range(10)], dropout=0.0)
        args = GRConfig(tempfile.mkdtemp(), use_cpu=True, report_to="none", gr_warmup="none", gr_lambda=degree)
        trainer = GRTrainer(model=model, args=args)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        sam = TwoPassSAM(model.parameters(), 0.1)

        def finish(trainer=trainer, model=model):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.optimizer.step()
            model.zero_grad()

        def plain(trainer=trainer, model=model, finish=finish):
            Trainer.training_step(trainer, model, inputs)
            finish()

        def gr(trainer=trainer, model=model, finish=finish):
            trainer.training_step(model, inputs)
            finish()

        def by_hand(model=model, sam=sam, finish=finish):
            model.train()
            model(**inputs).loss.backward()
            sam.first_step()
            model.zero_grad()
            model(**inputs).loss.backward()
            sam.second_step()
            finish()

        seconds = interleave({"plain": plain, "gr": gr, "sam": by_hand}, rounds)
        name = f"ViT-Ti, batch {batch}, lambda/r = {degree / 0.1:g}, {threads} thread{'s' * (threads > 1)}"
        rows.append(
            f"| {name} | {statistics.median(seconds['plain']):.2f} s | {ratio(seconds, 'gr', 'plain')} "
            f"| {ratio(seconds, 'gr', 'sam')} |"
        )
    return rows


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=14, num_attention_heads=8
    )
    return LlamaForCausalLM(config)


def bookkeeping(name: str, model: nn.Module, rounds: int, threads: int) -> list[str]:
    """Everything of a GR step but the passes, on random gradients."""
    params = list(model.parameters())
    gradients = [torch.randn_like(p) * 1e-2 for p in params]

    def fill_gradients():
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()

    sam = TwoPassSAM(params, 0.1)

    def two_pass_sam():
        sam.first_step()
        sam.second_step()

    def ours(degree):
        perturbation = Perturbation(params)
        perturbation.apply(0.1, gradient_norm(params), grad_scale=(0.1 - degree) / degree)
        for p, gradient in zip(params, gradients, strict=True):
            if p.grad is None:  # what the second pass would leave there
                p.grad = gradient
        perturbation.restore()
        scale_gradients_(params, degree / 0.1)

    kinds = {"sam": two_pass_sam, "gr 1": lambda: ours(0.1), "gr 0.8": lambda: ours(0.08)}
    library = library_sam(params)
    if library is not None:
        kinds["library"] = library

    seconds = interleave(kinds, rounds, before=fill_gradients)
    fill_gradients()
    peak = LiveBytes()
    peak.watch_existing([*params, *(p.grad for p in params)])
    with peak:
        ours(0.08)
    size = sum(p.numel() * p.element_size() for p in params)
    row = f"| {name}, {sum(p.numel() for p in params) / 1e6:.1f} M, {threads} thread{'s' * (threads > 1)} "
    row += f"| {1e3 * statistics.median(seconds['sam']):.1f} ms | {ratio(seconds, 'gr 1', 'sam')} "
    row += f"| {ratio(seconds, 'gr 0.8', 'sam')} "
    row += f"| {ratio(seconds, 'gr 1', 'library') if library else 'not installed'} | {peak.peak / size:.2f} N |"
    return [row]


def library_sam(params: list[torch.Tensor]) -> Callable[[], None] | None:
    """pytorch_optimizer's SAM with a base step that does nothing."""
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        return None

    class Nothing(torch.optim.SGD):
        def step(self, closure=None):
            pass

    sam = SAM(params, Nothing, rho=0.1, lr=0.0)

    def run():
        sam.first_step()
        sam.second_step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7, help="of whole steps; bookkeeping takes five times as many")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    random.seed(0)

    step_rows, bookkeeping_rows = [], []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, create in (("ViT-Ti", lambda: create_vit("vit-ti", ["a"])), ("Llama", llama)):
            bookkeeping_rows += bookkeeping(name, copy.deepcopy(create()), 5 * options.rounds, threads)
        step_rows += vit_step(options.rounds, options.batch, threads)

    print(
        f"{date.today()}, hf_gr {__version__}, torch {torch.__version__}, {platform.processor() or 'CPU'}; medians of"
    )
    print(f"{options.rounds} paired ratios (bookkeeping: {5 * options.rounds}), the middle half in brackets.\n")
    print("| whole step | plain step | GR / plain | GR / two-pass SAM by hand |\n|---|---|---|---|")
    print("\n".join(step_rows))
    print("\n| bookkeeping (norm, perturb, restore, combine) | davda54-style SAM | GR (lambda = r) / it ", end="")
    print("| GR (lambda = 0.8 r) / it | GR (lambda = r) / pytorch_optimizer SAM | memory beyond theta and g |")
    print("|---|---|---|---|---|---|\n" + "\n".join(bookkeeping_rows))


if __name__ == "__main__":
    main()
