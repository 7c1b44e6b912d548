"""The weight norm, gradient norm and learning rate of each layer over a run, as a table and a plot.

The TVLARS paper bases its argument on them: LWN = ||w||, LGN = ||g||, LNR = ||w|| / ||g||, the trust ratio of LARS
without its constants, and gamma_t^k, the rate of layer k with them.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import extra
from ..optim._layerwise import LayerwiseOptimizer
from ..reporting.plots import LAYER_PICTURE, LAYER_TABLE, plot_layer_statistics
from .part import innermost

with extra("report"):
    import pyarrow as pa
    import pyarrow.parquet as pq

KINDS = ("weight_norm", "gradient_norm", "trust_ratio", "rate")
MAX_ROWS = 100_000


class LayerStatisticsCallback(TrainerCallback):
    """Writes `layer_statistics.parquet`, with the columns step, layer, kind and value, and a plot of it.

    A layer is the name of a trainable parameter with at least two dimensions; a kind is one of `KINDS`. The gradient is
    the one the optimizer uses, after clipping; steps count from 1. The rate is that of LARS, TVLARS or LAMB, as its
    step used it: the learning rate times trust ratio and phi. The file is written with every checkpoint and at the end,
    and a resumed run continues it.

    Args:
        every: optimizer steps between entries.
        max_rows: bound on the table. Beyond it, every other entry is dropped and `every` doubled; two entries are
            always kept.
    """

    picture = LAYER_PICTURE

    def __init__(self, every: int, max_rows: int = MAX_ROWS):
        self.every, self.max_rows = every, max_rows
        #: Whether the plot shows the last training.
        self.has_drawn = False
        self._layers: list[str] = []
        #: step -> ||w||, ||g|| and rate of the layers
        self._entries: dict[int, tuple[list[float], list[float], list[float | None]]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self._layers = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
        self._entries = {}
        self.has_drawn = False
        path = Path(str(args.output_dir)) / LAYER_TABLE
        if state.is_world_process_zero and state.global_step > 0 and path.is_file():
            self._continue(path, state.global_step)

    def _continue(self, path: Path, until: int) -> None:
        """Load the entries of an interrupted run, up to the step from which it resumes."""
        columns = pq.read_table(path).to_pydict()
        values = dict(
            zip(zip(columns["step"], columns["layer"], columns["kind"], strict=True), columns["value"], strict=True)
        )
        steps = sorted({step for step in columns["step"] if step <= until})
        if set(columns["layer"]) != set(self._layers):
            return  # written for another model
        for step in steps:
            norms, gradient_norms = ([values[step, layer, kind] for layer in self._layers] for kind in KINDS[:2])
            rates = [values.get((step, layer, "rate")) for layer in self._layers]
            self._entries[step] = (norms, gradient_norms, rates)
        if len(steps) > 1:  # it may have been thinned
            self.every = max(self.every, steps[1] - steps[0])

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        scaler = getattr(optimizer, "scaler", None)
        # Clipping has already unscaled fp16 gradients; without clipping, the optimizer does so later.
        scale = scaler.get_scale() if scaler is not None and not args.max_grad_norm else 1.0
        params = dict(model.named_parameters())
        norms = [torch.linalg.vector_norm(params[name]) for name in self._layers]
        norms += [
            torch.zeros_like(norm) if params[name].grad is None else torch.linalg.vector_norm(params[name].grad)
            for name, norm in zip(self._layers, norms, strict=True)
        ]
        # Transferred together: one device sync instead of one per norm.
        values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
        self._entries[state.global_step + 1] = (
            values[: len(self._layers)],
            [value / scale for value in values[len(self._layers) :]],
            [None] * len(self._layers),
        )
        if isinstance(inner := innermost(optimizer), LayerwiseOptimizer):
            inner.rates = {}
        while len(self._entries) > 2 and len(self._entries) * len(self._layers) * len(KINDS) > self.max_rows:
            self.every *= 2
            self._entries = {step: e for step, e in self._entries.items() if (step - 1) % self.every == 0}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the rates of the step, if this is one to record."""
        optimizer, params = innermost(kwargs.get("optimizer")), dict(kwargs["model"].named_parameters())
        if (rates := getattr(optimizer, "rates", None)) is None:
            return
        optimizer.rates = None
        if (entry := self._entries.get(state.global_step + 1)) is not None:
            found = [rates.get(params[name]) for name in self._layers]
            self._entries[state.global_step + 1] = (
                *entry[:2],
                [None if rate is None else float(rate) for rate in found],
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._write(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._write(args, state)
        if state.is_world_process_zero and self._entries:
            runs = {"": (self.table(), state.log_history)}
            plot_layer_statistics(runs, Path(str(args.output_dir)) / LAYER_PICTURE)
            self.has_drawn = True

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero and self._entries:
            path = Path(str(args.output_dir)) / LAYER_TABLE
            path.parent.mkdir(parents=True, exist_ok=True)
            # A run stopped while writing leaves the earlier table intact.
            pq.write_table(pa.table(self.table()), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)

    def table(self) -> dict[str, list]:
        """The columns step, layer, kind and value."""
        rows = [
            (step, layer, kind, value)
            for step, entry in self._entries.items()
            for layer, w, g, rate in zip(self._layers, *entry, strict=True)
            for kind, value in zip(KINDS, (w, g, w / g if g > 0 else None, rate), strict=True)
        ]
        return dict(
            zip(("step", "layer", "kind", "value"), (list(column) for column in zip(*rows, strict=True)), strict=True)
        )
